"""COCO's annotations and archives as tables: a row per image, annotation, category and archive member of a split.

Every column that an expectation judges is computed here. Where a value is malformed, the columns that build on it
are neutral, so that one defect is one finding. The column `entry` is what a person knows a row by: its id.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from pipelines.pictures import Picture, find, inspect, members

SPLITS = ("train", "val")
EXTENSIONS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG"}


class ImageEntry(msgspec.Struct, gc=False):
    """What is read of an image's entry, as it comes: validation judges the types."""

    id: Any = None
    file_name: Any = None
    height: Any = None
    width: Any = None


class AnnotationEntry(msgspec.Struct, gc=False):
    """What is read of an annotation; segmentations are skipped unread."""

    id: Any = None
    image_id: Any = None
    category_id: Any = None
    bbox: Any = None
    area: Any = None
    iscrowd: Any = None


class CategoryEntry(msgspec.Struct, gc=False):
    id: Any = None
    name: Any = None


class Document(msgspec.Struct):
    """A COCO JSON file of objects."""

    images: list[ImageEntry]
    annotations: list[AnnotationEntry]
    categories: list[CategoryEntry]


def read_document(path: Path) -> Document:
    """The entries of a COCO JSON file. Raises ValueError that says where it is not one."""
    data = path.read_bytes()
    try:
        try:
            return msgspec.json.decode(data, type=Document)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:  # perhaps NaN, which Python writes though JSON lacks it: its entry can be named
            return msgspec.convert(json.loads(data), Document)
    except msgspec.ValidationError as error:
        raise ValueError(f"{path}: {error}; COCO's format has lists images, annotations, categories") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def tabulate(data: Path, box_tolerance: float, decoded_share: float) -> dict[str, pd.DataFrame]:
    """The tables of both splits, SPLIT_images, _annotations, _categories and _archive, by name.

    `data` holds instances_{train,val}.json and {train,val}.zip, or folders {train,val}/ in their place. Boxes may reach
    `box_tolerance` pixels out; a share of the pictures is decoded in full. Raises ValueError for files that are no
    COCO JSON or no zip.
    """
    tables: dict[str, pd.DataFrame] = {}
    for split in SPLITS:
        document = read_document(data / f"instances_{split}.json")
        images = _images(document.images)
        categories = _categories(document.categories)
        annotations = _annotations(document.annotations, images, categories, box_tolerance)
        del document
        archive = _look_at_pictures(pictures_of(data, split), images, decoded_share)
        _count(images, annotations, categories)
        tables |= {f"{split}_images": images, f"{split}_annotations": annotations}
        tables |= {f"{split}_categories": categories, f"{split}_archive": archive}
    for split, other in (SPLITS, SPLITS[::-1]):
        pairs = set(zip(*(tables[f"{other}_categories"][key] for key in ("id", "name")), strict=True))
        table = tables[f"{split}_categories"]
        table["in_both"] = [pair in pairs for pair in zip(table["id"], table["name"], strict=True)]
    held_out, trained = tables["val_images"], tables["train_images"]
    held_out["leaked"] = (held_out["digest"] != b"") & held_out["digest"].isin(set(trained["digest"]))
    return tables


def pictures_of(data: Path, split: str) -> Path:
    """The archive of a split, or its folder where there is no archive."""
    return data / split if (data / split).is_dir() else data / f"{split}.zip"


def _integers(values: Sequence[Any]) -> pd.Series:
    """Whole numbers as nullable Int64, missing where a value is none or beyond what JSON readers keep exactly."""
    known = np.fromiter((type(v) is int and abs(v) < 2**53 for v in values), bool, len(values))
    numbers = np.fromiter((v if ok else 0 for v, ok in zip(values, known, strict=True)), np.int64, len(values))
    return pd.Series(pd.arrays.IntegerArray(numbers, ~known))


def _names(values: Sequence[Any]) -> pd.Series:
    """Names, missing where a value is not a string or empty."""
    return pd.Series([v if isinstance(v, str) and v else None for v in values], dtype=object)


def _frame(columns: dict[str, pd.Series]) -> pd.DataFrame:
    """The columns with `entry`, the id or, where it is none, the place of the row, and `valid`: nothing is missing."""
    table = pd.DataFrame(columns)
    table["valid"] = ~table.isna().any(axis=1)
    known = columns["id"].notna()
    table["entry"] = columns["id"].astype(object).where(known, [f"entry {row}" for row in range(len(known))])
    return table


def _images(entries: list[ImageEntry]) -> pd.DataFrame:
    sizes = {key: _integers([getattr(e, key) for e in entries]) for key in ("height", "width")}
    sizes = {key: values.where(values > 0) for key, values in sizes.items()}
    ids, names = _integers([e.id for e in entries]), _names([e.file_name for e in entries])
    return _frame({"id": ids, "file_name": names, **sizes})


def _categories(entries: list[CategoryEntry]) -> pd.DataFrame:
    return _frame({"id": _integers([e.id for e in entries]), "name": _names([e.name for e in entries])})


def _annotations(
    entries: list[AnnotationEntry], images: pd.DataFrame, categories: pd.DataFrame, tolerance: float
) -> pd.DataFrame:
    areas = [e.area if _is_number(e.area) else None for e in entries]
    columns = {key: _integers([getattr(e, key) for e in entries]) for key in ("id", "image_id", "category_id")}
    table = _frame({**columns, "area": pd.Series(areas, dtype=float)})
    boxes = np.full((len(entries), 4), np.nan)
    for row, entry in enumerate(entries):
        if isinstance(entry.bbox, list) and len(entry.bbox) == 4 and all(map(_is_number, entry.bbox)):
            boxes[row] = entry.bbox
    finite = np.isfinite(boxes).all(axis=1)
    x, y, width, height = np.where(finite[:, None], boxes, [0, 0, 1, 1]).T
    owner = _row_of(images["id"], columns["image_id"])
    shapes = [images[key].to_numpy(float, na_value=np.inf) for key in ("width", "height")]
    limits = [np.where(owner >= 0, np.append(shape, np.inf)[owner], np.inf) for shape in shapes]
    overhang = np.max([-x, -y, x + width - limits[0], y + height - limits[1]], axis=0)
    area = table["area"].to_numpy()
    thick = (width > tolerance) & (height > tolerance)
    fits = (area >= 0) & (area <= (width + tolerance) * (height + tolerance)) & ((area > 0) | ~thick)
    flags = (e.iscrowd for e in entries)
    crowd = [int(flag) if isinstance(flag, int | float) and flag in (0, 1) else -1 for flag in flags]
    known = columns["category_id"].isna() | columns["category_id"].isin(categories["id"].dropna())
    return table.assign(
        x=x,
        y=y,
        width=width,
        height=height,
        owner=owner,  # row of the image, -1 where it is not known
        finite=finite,
        has_size=(width > 0) & (height > 0),
        overhang=np.where(finite, overhang, 0.0),
        area_fits=fits | np.isnan(area) | (width <= 0) | (height <= 0) | ~finite,
        crowd=np.array(crowd, dtype=np.int8),  # -1 where the flag is neither 0 nor 1
        image_known=(owner >= 0) | columns["image_id"].isna().to_numpy(),
        category_known=known.to_numpy(bool),
    )


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**53)


def _row_of(ids: pd.Series, wanted: pd.Series) -> np.ndarray:
    """The first row of `ids` that holds each of `wanted`, -1 where none does."""
    rows = np.flatnonzero((ids.notna() & ~ids.duplicated()).to_numpy(bool))
    held = pd.Index(ids.to_numpy(np.int64, na_value=-(2**62))[rows])
    found = np.append(rows, -1)[held.get_indexer(wanted.to_numpy(np.int64, na_value=-(2**61)))]
    return found.astype(np.int64)


def _look_at_pictures(path: Path, images: pd.DataFrame, decoded_share: float) -> pd.DataFrame:
    """Adds to `images` what their pictures are; the table of the archive's members."""
    held = members(path)
    names = images["file_name"].fillna("").tolist()
    found = find(names, held)
    sampled = np.diff(np.floor(np.arange(len(names) + 1) * decoded_share)) > 0
    readable = [row for row, members_ in enumerate(found) if members_ and members_[0].stored]
    seen: list[Picture | None] = [None] * len(names)
    for row, picture in zip(
        readable, inspect(path, [found[row][0] for row in readable], sampled[readable].tolist()), strict=True
    ):
        seen[row] = picture
    opened = [picture if picture and picture.opens else None for picture in seen]
    named = [EXTENSIONS.get(name.rpartition(".")[2].lower()) for name in names]
    width, height = (images[key].to_numpy(float, na_value=np.nan) for key in ("width", "height"))
    real = np.array([p[1:3] if p else (np.nan, np.nan) for p in opened], dtype=float).reshape(-1, 2)
    images["found"] = np.where(images["file_name"].isna(), 1, [len(f) for f in found])
    images["opens"] = [picture is None or picture.opens for picture in seen]
    images["whole"] = [p is None or p.whole for p in opened]
    images["decodes"] = [p is None or p.decodes or not p.whole for p in opened]
    images["size_agrees"] = ((real[:, 0] == width) & (real[:, 1] == height)) | np.isnan(real[:, 0] + width + height)
    images["format_agrees"] = [p is None or p.format == kind for p, kind in zip(opened, named, strict=True)]
    images["mode"] = [p.mode if p else "RGB" for p in opened]
    images["orientation"] = [p.orientation if p else 1 for p in opened]
    images["digest"] = np.array([p.digest if p else b"" for p in opened], dtype=object)
    images["repeated"] = images["digest"].duplicated(keep=False) & (images["digest"] != b"")
    wanted = {id(member) for members_ in found for member in members_}
    listed = [id(member) in wanted for member in held]
    archive = pd.DataFrame({"name": [m.name for m in held], "stored": [m.stored for m in held], "listed": listed})
    return archive.assign(entry=archive["name"])


def _count(images: pd.DataFrame, annotations: pd.DataFrame, categories: pd.DataFrame) -> None:
    """Adds the number of objects to images and categories, and of repeated labels to images."""
    owned = annotations["owner"].to_numpy()
    single = (annotations["crowd"] == 0).to_numpy()
    images["num_objects"] = np.bincount(owned[owned >= 0], minlength=len(images))
    images["num_targets"] = np.bincount(owned[(owned >= 0) & single], minlength=len(images))
    same = annotations.loc[owned >= 0, ["owner", "category_id", "x", "y", "width", "height"]]
    extra = same["owner"].to_numpy()[same.duplicated().to_numpy() & annotations["finite"].to_numpy()[owned >= 0]]
    images["num_repeated_labels"] = np.bincount(extra, minlength=len(images))
    counts = annotations.loc[single, "category_id"].value_counts()
    categories["num_objects"] = categories["id"].map(counts).fillna(0).astype(int)
