"""Where the four dataset files come from."""

from dataclasses import dataclass
from pathlib import Path

from pipelines.fetch import shown

OTHERS = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".tif", ".tiff", ".webp")
PICTURES = (".jpg", ".jpeg", ".png", *OTHERS)  # what is taken out of a folder: the gate tells what cannot be used


@dataclass(frozen=True)
class FileSources:
    """Where the four files come from: a URL or path each; `archive.zip#member` takes one file out of a zip."""

    train_images: str  # a zip, or a folder of pictures
    val_images: str
    train_annotations: str
    val_annotations: str


def sources_in(place: str, root: Path = Path()) -> FileSources:
    """The four files of a folder that `root` has; images as {train,val}.zip or folders {train,val}/."""
    if is_url(place) or not (root / place).is_dir():
        raise ValueError(f"download.source is {shown(place)!r}: no such folder; give shapes, a folder, or four files")
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


def addresses(url: str, mirrors: dict[str, list[str]]) -> tuple[str, ...]:
    """A URL, and what may stand in its place: mirrors are given by the beginning of a URL, and tried in order."""
    known = ((start, mirror) for start, some in mirrors.items() for mirror in some if url.startswith(start))
    return url, *(mirror + url.removeprefix(start) for start, mirror in known)


def is_url(place: str) -> bool:
    scheme, separator, _ = place.partition("://")
    if separator and scheme.lower() not in ("http", "https"):
        raise ValueError(
            f"{shown(place)} has the scheme {scheme!r}; http, https and local paths work: mount it, and give its path"
        )
    return bool(separator)
