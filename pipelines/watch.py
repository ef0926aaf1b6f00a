"""Whether the source of the data is what it was at the last look; nothing is fetched."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import requests

from pipelines import params
from pipelines.fetch import AS_IT_IS, shown
from pipelines.git import full_commit, git
from pipelines.history import data_version
from pipelines.sources import PICTURES, addresses, sources_in
from pipelines.stage import FILES, write_json

Look = dict[str, dict[str, Any]]  # what was seen, by what it is about
TIMEOUT = (5.0, 5.0)  # seconds to connect, and without an answer after that


@contextmanager
def watched(root: Path, preset: str | None, ref: str, check: Callable[[Any], None]) -> Iterator[list[str] | None]:
    """What changed since the last look at the data of `ref` with `preset`, in words; None at the first look.

    It is remembered when the block ends well. `check` is given the parameters before a file is looked at. Raises
    ValueError or OSError where something cannot be looked at, which is no change.
    """
    name = hashlib.sha256(json.dumps([preset, ref]).encode()).hexdigest()[:16]
    path = root / "scratch" / "watch" / f"{name}.json"
    commit = full_commit(root, ref)
    document = parameters(root, preset, commit)
    check(document)
    now = look(root, document) | {"dvc.lock": locked(root, commit)}
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError:
        raise ValueError(f"{path} is damaged; remove it, and the next look is the first") from None
    yield None if before is None else changes(before, now)
    write_json(path, now)


def parameters(root: Path, preset: str | None, commit: str) -> Any:
    """params.yaml of a commit with one of its presets on top; nothing is checked out."""
    listed = git(root, "ls-tree", "--name-only", commit, "--", "params.yaml", "presets/").splitlines()
    with tempfile.TemporaryDirectory() as folder:
        for name in listed:
            copy = Path(folder, name)
            copy.parent.mkdir(exist_ok=True)
            copy.write_text(git(root, "show", f"{commit}:./{name}"), encoding="utf-8")
        return params.merged(Path(folder), preset, [])


def locked(root: Path, commit: str) -> dict[str, str]:
    """The MD5s of the data that dvc.lock of a commit names, by file."""
    try:
        version = data_version(root, commit)
    except ValueError:
        return {}
    return {name: version.files[name].md5 for name in FILES}


def look(root: Path, document: Any) -> Look:
    """What the download stage would take, as its places tell it now; of `shapes`, the parameters."""
    kinds = {"source": str | dict[str, str], "max_images": int, "mirrors": dict[str, list[str]], "shapes": dict}
    download = params.checked(document, "download", kinds)
    source = download["source"]
    if source == "shapes":
        return {"download.shapes": dict(download["shapes"])}
    places = dict(source) if isinstance(source, dict) else asdict(sources_in(source, root))
    seen: Look = {"download": {"max_images": download["max_images"]}}
    with ThreadPoolExecutor(len(places)) as pool:
        found = pool.map(lambda place: _look_at(root, place, download["mirrors"]), places.values())
        return seen | {f"download.source.{name}": one for name, one in zip(places, found, strict=True)}


def _look_at(root: Path, place: str, mirrors: dict[str, list[str]]) -> dict[str, Any]:
    address = place.partition("#")[0]
    if "://" in address:
        return {"place": shown(place)} | _ask_any(addresses(address, mirrors))
    path = root / address
    if path.is_dir():
        return {"place": place} | _folder(path)
    if not path.exists():
        raise ValueError(f"download.source: {address} does not exist; put it back, or correct params.yaml")
    found = path.stat()
    return {"place": place, "bytes": found.st_size, "modified": _time(found.st_mtime_ns)}


def _folder(path: Path) -> dict[str, Any]:
    """Number, bytes, newest time and a digest (of names, sizes and times) of the pictures in a folder."""
    found = []
    for parent, _, names in os.walk(path):
        for name in names:
            if name.lower().endswith(PICTURES):
                one = Path(parent, name).stat()
                found.append((Path(parent, name).relative_to(path).as_posix(), one.st_size, one.st_mtime_ns))
    if not found:
        raise ValueError(f"{path} holds no pictures ({', '.join(PICTURES)})")
    return {
        "pictures": len(found),
        "bytes": sum(size for _, size, _ in found),
        "newest": _time(max(time for _, _, time in found)),
        "digest": hashlib.sha256(json.dumps(sorted(found)).encode()).hexdigest()[:16],
    }


def _time(nanoseconds: int) -> str:
    """A time in words, to the nanosecond."""
    seconds, rest = divmod(nanoseconds, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}.{rest:09d}"


def _ask_any(places: Collection[str]) -> dict[str, Any]:
    """What the first server that answers says of a file."""
    failures = []
    for address in places:
        try:
            return {"address": shown(address)} | _ask(address)
        except requests.RequestException as error:
            failures.append(f"{shown(address)} cannot be reached: {shown(error)}")
        except ValueError as error:
            failures.append(f"{shown(address)} {error}")
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


def changes(before: Look, now: Look) -> list[str]:
    """In words, what two looks saw differently. Of two mirrors of one place, only the sizes are compared."""
    lines = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name, {}), now.get(name, {})
        is_mirror = old.get("place") == new.get("place") and old.get("address") != new.get("address")
        for key in ["bytes"] if is_mirror else dict.fromkeys([*old, *new]):
            if old.get(key) != new.get(key):
                lines.append(f"{name}: {key} was {old.get(key, 'none')}, is {new.get(key, 'none')}")
    return lines
