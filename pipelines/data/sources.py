"""Where the four dataset files come from."""

import os
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Annotated

from pipelines.redaction import redact_url

OTHERS = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".tif", ".tiff", ".webp")
PICTURES = (".jpg", ".jpeg", ".png", *OTHERS)  # what is taken out of a folder: the gate tells what cannot be used


@dataclass(frozen=True)
class FileSources:
    """Where the four files come from: a URL or path each; `archive.zip#member` takes one file out of a zip."""

    train_images: Annotated[str, "training pictures: a zip or a folder"]
    val_images: Annotated[str, "validation pictures, likewise"]
    train_annotations: Annotated[str, "annotations of the training pictures: JSON in COCO's format"]
    val_annotations: Annotated[str, "annotations of the validation pictures, likewise"]


def sources_in(place: str, root: Path = Path()) -> FileSources:
    """The four files of a folder that `root` has; images as {train,val}.zip or folders {train,val}/."""
    if is_url(place) or not (root / place).is_dir():
        what = "one URL" if is_url(place) else "a file" if (root / place).exists() else "no such folder"
        raise ValueError(f"download.source is {redact_url(place)!r}: {what}; give shapes, a folder, or four files")
    places: dict[str, str] = {}
    for split in ("train", "val"):
        annotations = Path(place) / f"instances_{split}.json"
        if not (root / annotations).is_file():
            raise ValueError(
                f"{annotations} is missing: a source folder holds instances_train.json and instances_val.json"
            )
        images = [path for path in (Path(place) / f"{split}.zip", Path(place) / split) if (root / path).exists()]
        if not images:
            raise ValueError(f"{place} has neither {split}.zip nor a folder {split}/ with pictures")
        places |= {f"{split}_annotations": str(annotations), f"{split}_images": str(images[0])}
    return FileSources(**places)


def require_files(source: FileSources, root: Path = Path()) -> None:
    """Raises ValueError for a file of this machine that cannot be what it is given for. Reads no content."""
    for name, place in asdict(source).items():
        if not is_url(place):
            address, member = split_place(place, root)
            if problem := find_problem(root / address, member, name.endswith("_images")):
                raise ValueError(f"download.source: {address} {problem}")


def find_problem(path: Path, member: str, is_images: bool) -> str:
    """Why a path cannot hold pictures or, in itself or as a member, annotations; "" where it may."""
    try:
        if path.is_dir():
            if member or not is_images:
                return f"is a folder, expected {'a zip' if member else 'a JSON'} file"
            return "" if has_pictures(path) else f"holds no pictures ({', '.join(PICTURES)}), or behind links alone"
        if not path.exists():
            return "does not exist; put it there, or correct params.yaml"
        if not path.is_file():
            return "is neither a file nor a folder"
        with path.open("rb") as file:
            is_empty, is_zip = not file.read(1), zipfile.is_zipfile(file)
    except OSError as error:
        return f"cannot be read ({error.strerror}); give this user access to it, or another path"
    if is_empty:
        return "is empty; fetch it again"
    if is_images or member:
        return "" if is_zip else "is not a whole zip file (it has no directory at its end); fetch it again"
    return "is a zip file, expected JSON; name the file in it: PATH.zip#instances_train.json" if is_zip else ""


def has_pictures(folder: Path) -> bool:
    return any(name.lower().endswith(PICTURES) for _, _, names in os.walk(folder) for name in names)


def split_place(place: str, root: Path = Path()) -> tuple[str, str]:
    """The address of a place and the member of the zip there that is meant, mostly none.

    A path of this machine that exists as a whole is that path, whatever `#` it holds; else what stands before one of
    them and is a file.
    """
    address, _, member = place.partition("#")
    if is_url(place) or not member:
        return address, member
    if (root / place).exists():
        return place, ""
    parts = place.split("#")
    for number in range(1, len(parts)):
        if (root / (start := "#".join(parts[:number]))).is_file():
            return start, "#".join(parts[number:])
    return (address, member) if address.lower().endswith(".zip") else (place, "")


def pictures_in(folder: Path) -> dict[str, os.stat_result]:
    """The pictures in a folder and its folders, by their path in it. Links to folders are not followed."""
    found = {}
    for parent, _, names in os.walk(folder):
        inside = "" if Path(parent) == folder else f"{Path(parent).relative_to(folder).as_posix()}/"
        for name in names:
            if name.lower().endswith(PICTURES):
                with suppress(OSError):  # a link that leads nowhere, or to itself
                    stat = os.stat(os.path.join(parent, name))
                    if S_ISREG(stat.st_mode):
                        found[inside + name] = stat
    return dict(sorted(found.items()))


def addresses(url: str, mirrors: dict[str, list[str]]) -> tuple[str, ...]:
    """A URL, and what may stand in its place: mirrors are given by the beginning of a URL, and tried in order."""
    known = ((start, mirror) for start, some in mirrors.items() for mirror in some if url.startswith(start))
    return url, *(mirror + url.removeprefix(start) for start, mirror in known)


def is_url(place: str) -> bool:
    scheme, separator, _ = place.partition("://")
    if separator and scheme.lower() not in ("http", "https"):
        raise ValueError(
            f"{redact_url(place)} has the scheme {scheme!r}; http, https and local paths work: mount it, and give its "
            "path"
        )
    return bool(separator)
