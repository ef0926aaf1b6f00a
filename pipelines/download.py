"""Stage 1: the four dataset files. `python -m pipelines.download`"""

import hashlib
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

from pipelines import params
from pipelines.shapes import ZIP_DATE, ShapesParams, write_shapes
from pipelines.stage import DATA, FILES, Progress, command

PICTURES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class FileSources:
    """Where the four files come from: a URL or path each; `archive.zip#member` takes one file out of a zip."""

    train_images: str  # a zip, or a folder of pictures
    val_images: str
    train_annotations: str
    val_annotations: str


@dataclass(frozen=True)
class DownloadParams:
    """The `download` section of params.yaml."""

    source: str | FileSources  # shapes, a folder, or four URLs or paths
    sha256: dict[str, str]  # of what is fetched, by URL or path without fragment; may be empty
    max_images: int  # per split, the first ones of the annotations; 0 for all
    shapes: ShapesParams

    def __post_init__(self) -> None:
        for place, digest in self.sha256.items():
            if len(digest) != 64:
                raise ValueError(f"download.sha256 of {place} has {len(digest)} characters, expected 64")


def download(config: DownloadParams, data: Path) -> None:
    """Makes the four files in `data`, all or none.

    Images end as a zip of stored members, annotations as COCO JSON. Raises ValueError or OSError that names
    what is missing, torn or different from its checksum.
    """
    data.mkdir(parents=True, exist_ok=True)
    partial = data.parent / f".{data.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        if config.source == "shapes":
            write_shapes(config.shapes, partial)
        else:
            _collect(config, partial)
        for name in FILES:
            os.replace(partial / name, data / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _collect(config: DownloadParams, folder: Path) -> None:
    source = config.source if isinstance(config.source, FileSources) else _sources_in(Path(config.source))
    fetched: dict[str, Path] = {}

    def local(place: str) -> tuple[Path, str]:
        """The file or folder of `place`, fetched once if it is a URL, and the fragment."""
        place, _, member = place.partition("#")
        if place not in fetched:
            if urlparse(place).scheme in ("http", "https"):
                fetched[place] = folder / f"fetched-{len(fetched)}"
                _fetch(place, fetched[place])
            else:
                fetched[place] = Path(place)
                if not fetched[place].exists():
                    raise ValueError(f"download.source: {place} does not exist")
            if place in config.sha256:
                _check_digest(fetched[place], place, config.sha256[place])
        return fetched[place], member

    for split in ("train", "val"):
        path, member = local(getattr(source, f"{split}_annotations"))
        wanted = _take_annotations(path, member, folder / f"instances_{split}.json", config.max_images)
        path, _ = local(getattr(source, f"{split}_images"))
        _take_images(path, folder / f"{split}.zip", wanted)


def _sources_in(folder: Path) -> FileSources:
    """The four files of a user's folder; images as {train,val}.zip or folders {train,val}/."""
    if not folder.is_dir():
        raise ValueError(f"download.source is {str(folder)!r}: no such folder; give shapes, a folder, or four files")
    places: dict[str, str] = {}
    for split in ("train", "val"):
        annotations = folder / f"instances_{split}.json"
        if not annotations.is_file():
            raise ValueError(
                f"{annotations} is missing: a source folder holds instances_train.json and instances_val.json"
            )
        images = [path for path in (folder / f"{split}.zip", folder / split) if path.exists()]
        if not images:
            raise ValueError(f"{folder} has neither {split}.zip nor a folder {split}/ with pictures")
        places |= {f"{split}_annotations": str(annotations), f"{split}_images": str(images[0])}
    return FileSources(**places)


def _fetch(url: str, target: Path) -> None:
    """Streams a URL to a file with bounded retries, going on where a cut connection stopped."""
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    session = requests.Session()
    retry = Retry(total=5, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504))
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    for attempt in range(5):
        have = target.stat().st_size if target.exists() else 0
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        try:
            with session.get(url, stream=True, timeout=30, headers=headers) as answer:
                answer.raise_for_status()
                have = have if answer.status_code == 206 else 0
                total = have + int(answer.headers.get("Content-Length", 0))
                with target.open("ab" if have else "wb") as file, Progress(None, f"fetch {url}", total, "B") as bar:
                    bar.update(have)
                    for block in answer.iter_content(1 << 20):
                        file.write(block)
                        bar.update(len(block))
            if not total or target.stat().st_size == total:
                return
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            if attempt == 4:
                raise ValueError(f"{url} cannot be fetched: {error}; check the address and the network") from error
        except requests.HTTPError as error:
            raise ValueError(f"{url} answers {error.response.status_code}; check the address") from error
    raise ValueError(f"{url} ends at {target.stat().st_size} of {total} bytes after 5 attempts")


def _check_digest(path: Path, place: str, expected: str) -> None:
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != expected.lower():
        raise ValueError(f"{place} has sha256 {got}, expected {expected}; fetch it again or correct download.sha256")


@contextmanager
def _open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is not a whole zip file ({error}); fetch it again") from error


def _take_annotations(path: Path, member: str, target: Path, max_images: int) -> set[str] | None:
    """Copies COCO JSON, or its first `max_images` images; the file names to keep, None for all."""
    if member:
        with _open_zip(path) as archive:
            if member not in archive.namelist():
                raise ValueError(f"{path} holds no {member}; it holds {', '.join(archive.namelist()[:10])}")
            target.write_bytes(archive.read(member))
    else:
        shutil.copyfile(path, target)
    try:
        document = json.loads(target.read_bytes())
    except ValueError as error:
        raise ValueError(f"{member or path} is not valid JSON: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(key), list):
            raise ValueError(f"{member or path} has no list {key!r}; COCO's format has images, annotations, categories")
    if not max_images:
        return None
    document["images"] = document["images"][:max_images]
    try:
        ids = {image["id"] for image in document["images"]}
        names = {Path(image["file_name"]).name for image in document["images"]}
        document["annotations"] = [a for a in document["annotations"] if a["image_id"] in ids]
    except KeyError as error:
        raise ValueError(f"{member or path}: an entry lacks {error}") from error
    target.write_text(json.dumps(document))
    return names


def _take_images(path: Path, target: Path, wanted: set[str] | None) -> None:
    """A zip of stored members: the given one as it is if it is so already, or packed anew in the order of names."""
    if path.is_dir():
        names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.suffix.lower() in PICTURES)
        if not names:
            raise ValueError(f"{path} holds no pictures ({', '.join(PICTURES)})")
        _pack(names, lambda name: (path / name).read_bytes(), target, wanted)
        return
    with _open_zip(path) as archive:
        members = [info for info in archive.infolist() if not info.is_dir()]
        for info in members:
            if info.filename.startswith("/") or ".." in Path(info.filename).parts:
                raise ValueError(f"{path} holds {info.filename!r}, a path out of the archive; do not trust this file")
        if wanted is None and all(info.compress_type == zipfile.ZIP_STORED for info in members):
            shutil.copyfile(path, target)
        else:
            _pack([info.filename for info in members], archive.read, target, wanted)


def _pack(names: list[str], read: Callable[[str], bytes], target: Path, wanted: set[str] | None) -> None:
    kept = [name for name in names if wanted is None or Path(name).name in wanted]
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as packed:
        for name in Progress(kept, f"pack {target.name}", len(kept), "image"):
            packed.writestr(zipfile.ZipInfo(name, ZIP_DATE), read(name))


def main() -> None:
    download(params.load("download", DownloadParams), DATA)


if __name__ == "__main__":
    command(main)
