"""A dataset's four files behind a web server with a bad line, and a download of them."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.data.layout import FILES
from pipelines.data.sources import FileSources
from pipelines.download import DownloadParams, download
from tests.bad_line import Site, serving
from tests.projects import SHAPES


@contextmanager
def coco_site(source: Path) -> Iterator[Site]:
    """A web server with the four files of a folder, and with the annotations in a zip as well."""
    with zipfile.ZipFile(source / "annotations.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for split in ("train", "val"):
            archive.write(source / f"instances_{split}.json", f"annotations/instances_{split}.json")
    with serving(Site(**{path.name: path.read_bytes() for path in source.iterdir()})) as site:
        yield site


def urls(base: str, annotations: str = "annotations.zip#annotations/instances_{}.json") -> FileSources:
    """Where the site at `base` has the four files."""
    places = {f"{s}_images": f"{base}/{s}.zip" for s in ("train", "val")}
    return FileSources(**places, **{f"{s}_annotations": f"{base}/{annotations.format(s)}" for s in ("train", "val")})


def fetch(
    source: str | FileSources,
    data: Path,
    sha256: dict[str, str] | None = None,
    max_images: int = 0,
    mirrors: dict[str, list[str]] | None = None,
) -> None:
    config = DownloadParams(source, sha256 or {}, mirrors or {}, max_images, SHAPES)
    download(config, data, data.parent / "scratch" / "downloads")


def same(data: Path, source: Path) -> bool:
    """Whether both folders have the same four files."""
    return all((data / name).read_bytes() == (source / name).read_bytes() for name in FILES)


def unpacked(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}
