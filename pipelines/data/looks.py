"""How the source of the data looks now, and whether it is as it was when the data was taken; nothing is fetched."""

import hashlib
import json
import sys
import time
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import requests

from pipelines import params
from pipelines.data.fetch import AS_IT_IS
from pipelines.data.sources import PICTURES, addresses, is_url, pictures_in, sources_in, split_place
from pipelines.files import write_json
from pipelines.redaction import redact_url

Look = dict[str, dict[str, Any]]  # what was seen, by what it is about
TIMEOUT = (5.0, 5.0)  # seconds to connect, and without an answer after that
RECORDS = Path("scratch/sources")  # in the root of the project: looks at what the data was taken from
EXACT = "state"  # of local files, what a change that keeps size and time changes too; not said, only compared
COARSE, FINE = 2_000_000_000, 50_000_000  # nanoseconds within which two changes of a file can have one time


@dataclass(frozen=True)
class Taken:
    """A look at the source just before data was taken from it, when that was, and the MD5s of what came of it."""

    at: str  # empty where it is not known
    seen: Look
    md5s: dict[str, str]  # of the four files, where DVC has told


def look(root: Path, document: Any, but: Collection[str] = ()) -> Look:
    """What the download stage would take, as its places tell it now, `but` some; of `shapes`, the parameters."""
    kinds = {"source": str | dict[str, str], "max_images": int, "mirrors": dict[str, list[str]], "shapes": dict}
    download = params.check_section(document, "download", kinds)
    if download["source"] == "shapes":
        return {"download.shapes": dict(download["shapes"])}
    seen: Look = {"download": {"max_images": download["max_images"]}}
    places = {name: place for name, place in find_places(root, download["source"]).items() if name not in but}
    if not places:
        return seen
    with ThreadPoolExecutor(len(places)) as pool:
        found = pool.map(lambda place: _look_at(root, place, download["mirrors"]), places.values())
        return seen | {f"download.source.{name}": one for name, one in zip(places, found, strict=True)}


def find_places(root: Path, source: str | Mapping[str, str]) -> dict[str, str]:
    """The four places of a source that is not `shapes`, by their names. Raises ValueError."""
    return asdict(sources_in(source, root)) if isinstance(source, str) else dict(source)


def _look_at(root: Path, place: str, mirrors: dict[str, list[str]]) -> dict[str, Any]:
    if is_url(place):
        address = split_place(place)[0]
        return {"place": redact_url(place)} | _ask_any(addresses(address, mirrors))
    return {"place": place} | look_at_path(root / split_place(place, root)[0])


def look_at_path(path: Path) -> dict[str, Any]:
    """Bytes, time and, for `EXACT`, a digest of a file, or of the names of all pictures in a folder. Reads no content.

    A file that was changed just now may change again and keep its time: its look is like no other.
    """
    if path.is_dir():
        found = pictures_in(path)
        if not found:
            raise ValueError(f"{path} holds no pictures ({', '.join(PICTURES)}), or only behind links to folders")
    elif path.exists():
        found = {"": path.stat()}
    else:
        raise ValueError(f"download.source: {path} does not exist; put it back, or correct params.yaml")
    newest = max(one.st_mtime_ns for one in found.values())
    names, states, latest = hashlib.sha256(), hashlib.sha256(), 0
    for name, one in found.items():
        names.update(f"{name}/{one.st_size}/{one.st_mtime_ns}\0".encode(errors="surrogateescape"))
        states.update(f"{one.st_ino}/{one.st_ctime_ns}\0".encode())
        latest = max(latest, one.st_ctime_ns)
    now = time.time_ns()
    if now - latest < (FINE if latest % 10**9 else COARSE):
        states.update(str(now).encode())
    exact = {EXACT: states.hexdigest()[:16]}
    if not path.is_dir():
        return {"bytes": found[""].st_size, "modified": _time(newest)} | exact
    size = sum(one.st_size for one in found.values())
    digest = names.hexdigest()[:16]
    return {"pictures": len(found), "bytes": size, "newest": _time(newest), "digest": digest} | exact


def _time(nanoseconds: int) -> str:
    """A time in words, to the nanosecond."""
    seconds, rest = divmod(nanoseconds, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}.{rest:09d}"


def _ask_any(places: Collection[str]) -> dict[str, Any]:
    """What the first server that answers says of a file."""
    failures = []
    for address in places:
        try:
            return {"address": redact_url(address)} | _ask(address)
        except requests.RequestException as error:
            failures.append(f"{redact_url(address)} cannot be reached: {redact_url(error)}")
        except ValueError as error:
            failures.append(f"{redact_url(address)} {error}")
    raise ValueError("; ".join(failures))


def _ask(address: str) -> dict[str, Any]:
    """ETag, date and size of a file on the web; by its first byte where HEAD is not answered."""
    failure = ""
    for method, headers in (("HEAD", AS_IT_IS), ("GET", AS_IT_IS | {"Range": "bytes=0-0"})):
        with requests.request(
            method, address, headers=headers, timeout=TIMEOUT, stream=True, allow_redirects=True
        ) as answer:
            told = {name: answer.headers[name] for name in ("ETag", "Last-Modified") if name in answer.headers}
            if answer.status_code == 206:
                size = answer.headers.get("Content-Range", "").rpartition("/")[2]
            else:
                size = answer.headers.get("Content-Length", "")
            if not answer.ok:
                failure = f"answers {answer.status_code}; check the address"
            elif told or size.isdecimal():
                return told | ({"bytes": int(size)} if size.isdecimal() else {})
            else:
                failure = "tells neither ETag, Last-Modified nor size; it cannot be watched"
    raise ValueError(failure)


def describe_changes(before: Look, now: Look) -> list[str]:
    """In words, what two looks saw differently. Of two mirrors of one place, only the sizes are compared."""
    lines = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name, {}), now.get(name, {})
        is_mirror = old.get("place") == new.get("place") and old.get("address") != new.get("address")
        for key in ["bytes"] if is_mirror else dict.fromkeys([*old, *new]):
            if old.get(key) != new.get(key) and key != EXACT:
                lines.append(f"{name}: {key} was {old.get(key, 'none')}, is {new.get(key, 'none')}")
    return lines


def is_as_it_was(before: Look, now: Look) -> bool:
    """Whether nothing differs between two looks, times of writing and places on the disk of local files among it."""
    exact = [{name: one[EXACT] for name, one in seen.items() if EXACT in one} for seen in (before, now)]
    return not describe_changes(before, now) and exact[0] == exact[1]


def find_record(root: Path, document: Any) -> Path:
    """Where it is kept what the data of these parameters was taken from."""
    chosen = json.dumps([document["download"][key] for key in ("source", "max_images")])
    return root / RECORDS / f"{hashlib.sha256(chosen.encode()).hexdigest()[:16]}.json"


def read_taken(record: Path) -> Taken | None:
    """What was kept; None where nothing was, or it is damaged."""
    try:
        return msgspec.json.decode(record.read_bytes(), type=Taken)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def keep_taken(record: Path, seen: Look, md5s: dict[str, str], at: str | None = None) -> None:
    write_json(record, asdict(Taken(time.strftime("%Y-%m-%d %H:%M:%S") if at is None else at, seen, md5s)))


def look_at_files(root: Path, document: Any) -> Look:
    """`look`, without what is on the web."""
    source = document["download"]["source"]
    remote = [] if source == "shapes" else [k for k, place in find_places(root, source).items() if is_url(place)]
    return look(root, document, remote)


def warn_of_other_source(root: Path) -> None:
    """Prints a warning where files that the data was taken from have changed since."""
    try:
        document = params.read_yaml(root / "params.yaml")
        taken, now = read_taken(find_record(root, document)), look_at_files(root, document)
    except (ValueError, OSError):  # that it is gone changes nothing
        return
    if taken and not is_as_it_was({name: one for name, one in taken.seen.items() if name in now}, now):
        print(
            f"warning: the source of the data has changed since {taken.at}, and these results are of what it was then: "
            "python -m pipelines run takes it anew, and so does dvc repro --force download",
            file=sys.stderr,
            flush=True,
        )
