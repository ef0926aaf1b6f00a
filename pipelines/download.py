"""Stage 1: the four dataset files. `python -m pipelines.download`"""

import hashlib
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec

from detr.annotation_file import Entries, as_utf8, parse
from detr.config import Key, check_keys
from pipelines import params
from pipelines.data import looks
from pipelines.data.archive import check_space, copy, extract, open_checked, pack
from pipelines.data.fetch import Remote, ask_sizes, claim, fetch_all
from pipelines.data.layout import DATA, FILES
from pipelines.data.shapes import ShapesParams, write_shapes
from pipelines.data.sources import (
    PICTURES,
    FileSources,
    addresses,
    is_url,
    pictures_in,
    require_files,
    sources_in,
    split_place,
)
from pipelines.redaction import redact_url
from pipelines.stage import command

DOWNLOADS = Path("scratch/downloads")


@dataclass(frozen=True)
class DownloadParams:
    """The `download` section of params.yaml."""

    source: Annotated[
        str | FileSources,
        Key("shapes (drawn), a folder in COCO's format, or a mapping that names the four files, a path or URL each"),
    ]
    sha256: Annotated[dict[str, str], Key("SHA-256 of each download, by URL or path; may be empty")]
    mirrors: Annotated[
        dict[str, list[str]], Key("other servers to try when a URL fails: lists, by the beginning of the URL")
    ]
    max_images: Annotated[
        int, Key("number of images to take from each split, the first in the annotations; 0 for all", ge=0)
    ]
    shapes: ShapesParams

    def __post_init__(self) -> None:
        check_keys(self, "download")
        for place, digest in self.sha256.items():
            if len(digest) != 64:
                raise ValueError(f"download.sha256 of {redact_url(place)} has {len(digest)} characters, expected 64")
        for url in (*self.mirrors, *(mirror for mirrors in self.mirrors.values() for mirror in mirrors)):
            if not is_url(url):
                raise ValueError(f"download.mirrors has {url!r}, expected the beginning of an http or https URL")


@dataclass(frozen=True)
class Found:
    """A file or folder on this machine."""

    path: Path
    name: str  # the place as params.yaml has it, for messages
    ours: bool  # fetched or unpacked by this stage, so nobody misses it


class Image(msgspec.Struct):
    id: int | float | str
    file_name: str


class Annotation(msgspec.Struct):
    image_id: int | float | str


def download(config: DownloadParams, data: Path, downloads: Path) -> None:
    """Makes the four files in `data`, all or none.

    Images end as a zip of stored members, annotations as COCO JSON. What is fetched stays in `downloads` until
    then, so a run that was cut, killed or failed later goes on from there. Raises ValueError or OSError that
    names what is missing, torn, unsafe, too large for the disk or different from its checksum.
    """
    data.mkdir(parents=True, exist_ok=True)
    if config.source == "shapes":
        with _all_or_none(data) as partial:
            write_shapes(config.shapes, partial)
        return
    source = config.source if isinstance(config.source, FileSources) else sources_in(config.source)
    remotes = _remotes(config, source)
    with claim(remotes, downloads):
        sizes = ask_sizes(remotes)
        missing = [(downloads, remote.missing_in(downloads, sizes[remote.url])) for remote in remotes]
        check_space([*missing, (data, _copied(config, source, sizes, downloads, data))])
        fetched = fetch_all(remotes, downloads, sizes)
        with _all_or_none(data) as partial:
            found = {key: _find(place, fetched, partial / key) for key, place in asdict(source).items()}
            wanted = {
                split: _take_annotations(
                    found[f"{split}_annotations"], partial / f"instances_{split}.json", config.max_images
                )
                for split in ("train", "val")
            }
            for split, names in wanted.items():
                _take_images(found[f"{split}_images"], partial / f"{split}.zip", names)


@contextmanager
def _all_or_none(data: Path) -> Iterator[Path]:
    """A folder for the four files, which are moved to `data` when the block ends well."""
    partial = data.parent / f".{data.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for name in FILES:
            with (partial / name).open("rb") as file:
                os.fsync(file.fileno())
        for name in FILES:
            os.replace(partial / name, data / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remotes(config: DownloadParams, source: FileSources) -> list[Remote]:
    """What is to be fetched. Raises ValueError for local files that cannot be taken or differ from their checksum."""
    require_files(source)
    remotes = []
    for place in dict.fromkeys(split_place(place)[0] for place in asdict(source).values()):
        sha256 = config.sha256.get(place, "").lower()
        if is_url(place):
            remotes.append(Remote(addresses(place, config.mirrors), sha256))
        elif sha256:
            with Path(place).open("rb") as file:
                got = hashlib.file_digest(file, "sha256").hexdigest()
            if got != sha256:
                raise ValueError(
                    f"{place} has sha256 {got}, expected {sha256}; fetch it again or correct download.sha256"
                )
    return remotes


def _copied(config: DownloadParams, source: FileSources, sizes: dict[str, int], downloads: Path, data: Path) -> int:
    """How many bytes go to `data` as they are; what is fetched there costs nothing on the same file system."""
    total = 0
    for place in asdict(source).values():
        address, member = split_place(place)
        if config.max_images or member:
            continue  # the size is known when it is unpacked
        if address in sizes:
            total += sizes[address] if downloads.stat().st_dev != data.stat().st_dev else 0
        elif Path(address).is_file():
            total += Path(address).stat().st_size
    return total


def _find(place: str, fetched: dict[str, Path], unpacked: Path) -> Found:
    """The file of a place, fetched before; when it is a member of a zip, it is unpacked to the path `unpacked`."""
    address, member = split_place(place)
    found = Found(fetched.get(address, Path(address)), redact_url(address), address in fetched)
    if not member:
        return found
    with open_checked(found.path, found.name) as archive:
        if member not in archive.namelist():
            raise ValueError(f"{found.name} holds no {member}; it holds {', '.join(archive.namelist()[:10])}")
        extract(archive, member, unpacked)
    return Found(unpacked, f"{found.name}#{member}", True)


def _put(found: Found, target: Path) -> None:
    """What is ours gets a second name and costs no room, unless on another file system; the user's is copied."""
    if found.ours:
        with suppress(OSError):
            return os.link(found.path, target)
    return copy(found.path, target)


def _take_annotations(found: Found, target: Path, max_images: int) -> set[str] | None:
    """COCO JSON, as it is or its first `max_images` images; the file names to keep, None for all.

    Nothing is made into Python's objects but the records' ids.
    """
    data = found.path.read_bytes()
    parse(data, Entries, found.name)
    if not max_images:
        _put(found, target)
        return None
    try:
        document = msgspec.json.decode(as_utf8(data), type=dict[str, msgspec.Raw])
    except msgspec.DecodeError as error:
        raise ValueError(
            f"{found.name} holds NaN, Infinity or half a character, which JSON lacks ({error}); mend it, or set "
            "max_images to 0"
        ) from error
    raw = list[msgspec.Raw]
    try:
        kept = msgspec.json.decode(document["images"], type=raw)[:max_images]
        images = [msgspec.json.decode(image, type=Image) for image in kept]
        ids = {image.id for image in images}
        owner = msgspec.json.Decoder(Annotation)
        owned = [a for a in msgspec.json.decode(document["annotations"], type=raw) if owner.decode(a).image_id in ids]
    except msgspec.ValidationError as error:
        raise ValueError(f"{found.name}: an entry is not as COCO's format has it: {error}") from error
    target.write_bytes(msgspec.json.encode(document | {"images": kept, "annotations": owned}))
    return {Path(image.file_name).name for image in images}


def _take_images(found: Found, target: Path, wanted: set[str] | None) -> None:
    """A zip of stored members: the given one as it is if it is so already, or packed anew in the order of names."""

    def kept(sizes: dict[str, int]) -> dict[str, int]:
        return {name: size for name, size in sizes.items() if wanted is None or Path(name).name in wanted}

    if found.path.is_dir():
        sizes = {name: one.st_size for name, one in pictures_in(found.path).items()}
        if not sizes:
            raise ValueError(f"{found.name} holds no pictures ({', '.join(PICTURES)}), or only behind links to folders")
        if odd := [name for name in sizes if not params.is_utf8(name)]:
            raise ValueError(f"{found.name} holds {odd[0]!r}, whose name is no UTF-8; rename it, there and in the JSON")
        pack(kept(sizes), lambda name: _open_picture(found.path / name, sizes[name]), target)
        return
    with open_checked(found.path, found.name) as archive:
        members = [entry for entry in archive.infolist() if not entry.is_dir()]
        if wanted is None and all(entry.compress_type == zipfile.ZIP_STORED for entry in members):
            _put(found, target)
        else:
            pack(kept({entry.filename: entry.file_size for entry in members}), archive.open, target)


def _open_picture(path: Path, size: int) -> BinaryIO:
    """Opens a picture of a person's folder. Raises ValueError where it is not as it was when the folder was listed."""
    with suppress(FileNotFoundError):
        file = path.open("rb")
        if os.fstat(file.fileno()).st_size == size:
            return file
        file.close()
    raise ValueError(f"{path} was changed while its folder was read; run again when nothing writes there any more")


def main() -> None:
    config, document = params.load("download", DownloadParams), params.read_yaml(Path("params.yaml"))
    seen = looks.look_at_files(Path(), document)
    download(config, DATA, DOWNLOADS)
    if config.source != "shapes":
        looks.keep_taken(looks.find_record(Path(), document), seen, {})


if __name__ == "__main__":
    command(main)
