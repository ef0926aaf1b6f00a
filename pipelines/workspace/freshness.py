"""The download stage of a source that may have changed: DVC knows its parameters, and nothing of its content."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipelines.data import looks
from pipelines.data.looks import Look, Taken
from pipelines.data.sources import is_url, split_place
from pipelines.params import read_yaml
from pipelines.redaction import redact_url
from pipelines.workspace import dvc
from pipelines.workspace.history import read_data_version


def reproduce_download(root: Path, log: Callable[[str], None], force: bool = False) -> str:
    """`dvc.reproduce` of the download stage, by force where its source is not as it was when data was taken from it.

    One line says what is used, and of when. Where the content is the same after all, DVC leaves the later stages as
    they are. Raises StageFailed.
    """
    document = read_yaml(root / "params.yaml")
    source = document["download"]["source"]
    if source == "shapes":
        return dvc.reproduce("download", root, log, force)
    record, now, failure = looks.find_record(root, document), None, ""
    taken = looks.read_taken(record)
    try:
        pinned = [name for name, place in looks.find_places(root, source).items() if is_pinned(document, place)]
        now = looks.look(root, document, pinned)
    except (ValueError, OSError) as error:
        failure = str(error)
    if now is not None:
        log(f"source: {describe(source, now)}, {compare(taken, now)}")
        force = force or must_be_taken(taken, now)
    outcome = dvc.reproduce("download", root, log, force)
    if now is None:  # the stage has not missed it
        log(f"warning: the source cannot be looked at, so its data is what was taken before: {failure}")
        return outcome
    if outcome != "ran" and taken and taken.md5s and taken.md5s != read_md5s(root):
        log("source: DVC had its content of another time; it is taken again")
        outcome = dvc.reproduce("download", root, log, True)
    at = None if outcome == "ran" else taken.at if taken else ""
    looks.keep_taken(record, now, read_md5s(root), at)
    return outcome


def is_pinned(document: Any, place: str) -> bool:
    """Whether a place is on the web and has a checksum: another content is an error there, not a change."""
    return is_url(place) and split_place(place)[0] in document["download"]["sha256"]


def must_be_taken(taken: Taken | None, now: Look) -> bool:
    """Whether DVC may have another content; what is on the web is taken to be as it was until it was looked at."""
    if taken is None:
        return any(looks.EXACT in one for one in now.values())
    return not looks.is_as_it_was(taken.seen, now)


def describe(source: Any, now: Look) -> str:
    """The source, how much it is and when it was changed last."""
    place = redact_url(source) if isinstance(source, str) else f"{redact_url(next(iter(source.values())))} and others"
    size = tqdm.format_sizeof(sum(int(one.get("bytes", 0)) for one in now.values()), "B", 1000)
    newest = max((one.get("newest") or one.get("modified") or "" for one in now.values()), default="")
    return f"{place} ({size}, newest of {newest[:19]} UTC)" if newest else place


def compare(taken: Taken | None, now: Look) -> str:
    if taken is None:
        return "looked at for the first time"
    when = f"since it was taken on {taken.at}" if taken.at else "since the last look"
    if looks.is_as_it_was(taken.seen, now):
        return f"unchanged {when}"
    different = [name.removeprefix("download.source.") for name, one in now.items() if taken.seen.get(name) != one]
    return f"changed {when}, and taken again: {', '.join(different)}"


def read_md5s(root: Path) -> dict[str, str]:
    """Of the four files, as dvc.lock has them."""
    try:
        return {name: file.md5 for name, file in read_data_version(root, None).files.items()}
    except ValueError:
        return {}
