"""COCO's annotations and archives as tables: a row per image, annotation, category and archive member of a split.

Every column that an expectation judges is computed here, and what its message says of a row. Where a value is
malformed, the columns that build on it are neutral, so that one defect is one finding. The column `entry` is what a
person knows a row by: its id.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pandas as pd
from msgspec import UNSET

from detr.annotation_file import READINGS, AnnotationEntry, CategoryEntry, ImageEntry, complain, read_document, take
from pipelines.data.pictures import Member, Picture, find, find_nearest, inspect, list_members, pictures_of

SPLITS = ("train", "val")
EXTENSIONS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG"}
JUDGED_AREA = 1e10  # pixels, up to which pycocotools counts an object


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
        if split == "val":
            annotations["of_use"] &= annotations["area"].between(0, JUDGED_AREA) | annotations["area"].isna()
        annotations["some_of_use"] = annotations["of_use"].any()
        del document
        archive = _look_at_pictures(pictures_of(data, split), images, decoded_share)
        _count(images, annotations, categories)
        tables |= {f"{split}_images": images, f"{split}_annotations": annotations}
        tables |= {f"{split}_categories": categories, f"{split}_archive": archive}
    _compare(*(tables[f"{split}_categories"] for split in SPLITS))
    for split, other in (SPLITS, SPLITS[::-1]):  # what the other split has is missing here: said of the category
        used = tables[f"{split}_annotations"]
        used["category_known"] |= used["category_id"].isin(tables[f"{other}_categories"]["id"].dropna()).to_numpy(bool)
    held_out, trained = tables["val_images"], tables["train_images"]
    of_training = dict(zip(trained["digest"], trained["file_name"], strict=True)) | {b"": None}
    held_out["trained"] = held_out["digest"].map(of_training)
    held_out["leaked"] = held_out["trained"].notna()
    return tables


def _compare(train: pd.DataFrame, val: pd.DataFrame) -> None:
    """Adds to the categories of both splits whether the other has them, and what it has under their ids.

    Of two that differ in their names alone it is said once; of malformed and repeated ones it cannot be said.
    """
    for table, other, name in ((train, val, "val"), (val, train, "train")):
        pairs = set(zip(other["id"], other["name"], strict=True))
        named = dict(pairs)
        own = zip(table["id"], table["name"], strict=True)
        in_both = np.array([pair in pairs or (table is val and pair[0] in named) for pair in own], dtype=bool)
        in_both |= not (_are_sure(other) and table["valid"].all() and other["valid"].all())
        table["in_both"] = in_both | table["id"].duplicated(keep=False) | table["name"].duplicated(keep=False)
        table["beside"] = [
            f"which is {named[k]!r} in {name}" if k in named else f"which {name} lacks" for k in table["id"]
        ]


def _are_sure(entries: pd.DataFrame) -> bool:
    """Whether images or categories can be told by their ids: there are some, each has one, and none twice."""
    return len(entries) > 0 and bool(entries["id"].notna().all()) and bool(entries["id"].is_unique)


def _integers(values: Sequence[int | None]) -> pd.Series:
    """Whole numbers as nullable Int64."""
    known = np.fromiter((value is not None for value in values), bool, len(values))
    numbers = np.fromiter((value or 0 for value in values), np.int64, len(values))
    return pd.Series(pd.arrays.IntegerArray(numbers, ~known))


def _problems(entries: Sequence[Any], kind: str, values: dict[str, list[Any]]) -> pd.Series:
    """What is wrong with each entry, of these keys and what they are taken as; None where nothing is."""
    found: list[str | None] = [None] * len(entries)
    for key, column in reversed(values.items()):
        for row, value in enumerate(column):
            if value is None:
                found[row] = complain(kind, row, key, getattr(entries[row], key))
    return pd.Series(found, dtype=object)


def _frame(entries: Sequence[Any], kind: str, keys: Sequence[str]) -> pd.DataFrame:
    """A column per key with `entry`, the id or, where it is none, the place of the row; `problem` and `valid`."""
    values = {key: take(entries, kind, key) for key in keys}
    texts = ("file_name", "name")
    columns = {key: pd.Series(v, dtype=object) if key in texts else _integers(v) for key, v in values.items()}
    table = pd.DataFrame(columns)
    table["problem"] = _problems(entries, kind, values)
    table["valid"] = table["problem"].isna()
    places = pd.Series([f"{kind}[{row}]" for row in range(len(table))], dtype=object)
    table["entry"] = table["id"].astype(object).where(table["id"].notna(), places)
    return table


def _images(entries: list[ImageEntry]) -> pd.DataFrame:
    return _frame(entries, "images", [*READINGS["images"]])


def _categories(entries: list[CategoryEntry]) -> pd.DataFrame:
    return _frame(entries, "categories", [*READINGS["categories"]])


def _annotations(
    entries: list[AnnotationEntry], images: pd.DataFrame, categories: pd.DataFrame, tolerance: float
) -> pd.DataFrame:
    table = _frame(entries, "annotations", ["id", "image_id", "category_id"])
    taken = {key: take(entries, "annotations", key) for key in ("bbox", "area", "iscrowd")}
    problems = {key: _problems(entries, "annotations", {key: values}) for key, values in taken.items()}
    boxes = np.array([box or [np.nan] * 4 for box in taken["bbox"]], dtype=float).reshape(-1, 4)
    area = np.array(taken["area"], dtype=float)  # NaN where there is none
    crowd = np.array([-1 if flag is None else flag for flag in taken["iscrowd"]], dtype=np.int8)
    finite = np.isfinite(boxes).all(axis=1)
    x, y, width, height = np.where(finite[:, None], boxes, [0, 0, 2, 2]).T
    owner = _row_of(images["id"], table["image_id"])
    shapes = [images[key].to_numpy(float, na_value=np.inf) for key in ("width", "height")]
    limits = [np.where(owner >= 0, np.append(shape, np.inf)[owner], np.inf) for shape in shapes]
    overhang = np.max([-x, -y, x + width - limits[0], y + height - limits[1]], axis=0)
    thick = (width > tolerance) & (height > tolerance)
    corners = np.stack([x, y, x + width, y + height]).astype(np.float32)  # as training has them
    has_size = (corners[2:] > corners[:2]).all(axis=0)
    fits = (area >= 0) & (area <= (width + tolerance) * (height + tolerance)) & ((area > 0) | ~thick)
    known = table["category_id"].isna() | table["category_id"].isin(categories["id"].dropna())
    known |= not _are_sure(categories)
    return table.assign(
        problem=table["problem"].fillna(problems["area"]),
        valid=table["valid"] & problems["area"].isna(),
        area=area,
        area_given=[entry.area is not UNSET for entry in entries],
        x=x,
        y=y,
        width=width,
        height=height,
        owner=owner,  # row of the image, -1 where it is not known
        file_name=np.array([*images["file_name"], None], dtype=object)[owner],
        image_width=limits[0],
        image_height=limits[1],
        finite=finite,
        box_problem=problems["bbox"],
        has_size=has_size,
        in_pixels=_in_pixels(np.stack([x, y, width, height]), owner, len(images)) | ~has_size,
        overhang=np.where(finite, overhang, 0.0),
        area_fits=fits | np.isnan(area) | ~has_size | ~finite,
        crowd=crowd,  # -1 where the flag is neither 0 nor 1
        crowd_given=[entry.iscrowd is not UNSET for entry in entries],
        crowd_problem=problems["iscrowd"],
        of_use=has_size & (crowd != 1),
        image_known=(owner >= 0) | table["image_id"].isna().to_numpy() | (not _are_sure(images)),
        category_known=known.to_numpy(bool),
    )


def _in_pixels(boxes: np.ndarray, owner: np.ndarray, num_images: int) -> np.ndarray:
    """Whether not all boxes [4, M] of an image lie in its first pixel, as fractions of the image do."""
    outside = (boxes.max(axis=0) > 1) | (boxes.min(axis=0) < 0)
    others = np.bincount(owner[outside & (owner >= 0)], minlength=num_images) > 0
    return outside | np.append(others, False)[owner]


def _row_of(ids: pd.Series, wanted: pd.Series) -> np.ndarray:
    """The first row of `ids` that holds each of `wanted`, -1 where none does."""
    rows = np.flatnonzero((ids.notna() & ~ids.duplicated()).to_numpy(bool))
    held = pd.Index(ids.to_numpy(np.int64, na_value=-(2**62))[rows])
    found = np.append(rows, -1)[held.get_indexer(wanted.to_numpy(np.int64, na_value=-(2**61)))]
    return found.astype(np.int64)


def _look_at_pictures(path: Path, images: pd.DataFrame, decoded_share: float) -> pd.DataFrame:
    """Adds to `images` what their pictures are; the table of the archive's members."""
    held = list_members(path)
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
    images["whereabouts"] = _whereabouts(path, names, found, held)
    images["found"] = np.where(images["file_name"].isna(), 1, [len({m.name for m in f}) for f in found])
    images["opens"] = [picture is None or picture.opens for picture in seen]
    images["whole"] = [p is None or p.whole for p in opened]
    images["decodes"] = [p is None or p.decodes or not p.whole for p in opened]
    images["size_agrees"] = ((real[:, 0] == width) & (real[:, 1] == height)) | np.isnan(real[:, 0] + width + height)
    images["elongation"] = np.maximum(width, height) / np.minimum(width, height)
    images["format_agrees"] = [p is None or p.format == kind for p, kind in zip(opened, named, strict=True)]
    images["real_width"], images["real_height"] = real.T
    images["format"] = [p.format if p else "" for p in opened]
    images["picture_problem"] = [p.problem if p else "" for p in seen]
    images["mode"] = [p.mode if p else "RGB" for p in opened]
    images["orientation"] = [p.orientation if p else 1 for p in opened]
    images["digest"] = np.array([p.digest if p else b"" for p in opened], dtype=object)
    looked_at = images.loc[(images["digest"] != b"") & ~images["file_name"].duplicated(), "digest"]
    images["repeated"] = looked_at.duplicated(keep=False).reindex(images.index, fill_value=False)
    images["twin"] = _twins(images, images["repeated"])
    wanted = {id(member) for members_ in found for member in members_}
    are_named = len(images) > 0 and images["file_name"].notna().all()
    listed = [id(member) in wanted or not are_named for member in held]
    archive = pd.DataFrame({"name": [m.name for m in held], "stored": [m.stored for m in held], "listed": listed})
    return archive.assign(entry=archive["name"])


def _twins(images: pd.DataFrame, repeated: pd.Series) -> list[str]:
    """Of each repeated picture the name of another one with its bytes."""
    first = images[repeated].drop_duplicates("digest")
    second = images[repeated & ~images.index.isin(first.index)]
    names = [dict(zip(some["digest"], some["file_name"], strict=True)) for some in (first, second)]
    rows = zip(images.index, images["digest"], repeated, strict=True)
    return [names[row in first.index][digest] if has_twin else "" for row, digest, has_twin in rows]


def _whereabouts(path: Path, names: list[str], found: list[list[Member]], held: list[Member]) -> list[str]:
    """Of each file name that is not there once: where it is, or which member is nearest."""
    rows = [row for row, members_ in enumerate(found) if not members_ and names[row]]
    near = dict(zip(rows, find_nearest([names[row] for row in rows], [m.name for m in held]), strict=True))
    said = []
    for row, members_ in enumerate(found):
        several = f"is {len(members_)} times in {path.name}: {', '.join(repr(m.name) for m in members_[:3])}"
        missing = f"is not in {path.name}; {_advice(names[row], near.get(row, ''), len(held))}"
        said.append(several if len(members_) > 1 else "" if members_ else missing)
    return said


def _advice(name: str, near: str, number: int) -> str:
    if near:
        alike = (
            f", of other letters that look alike, {near!a}" if normalize("NFC", near) == normalize("NFC", name) else ""
        )
        return f"nearest member: {near!r}{alike}"
    if name.rpartition(".")[2].lower() not in EXTENSIONS:
        return "only .jpg, .jpeg and .png files are taken: convert it"
    return f"none of its {number} files is like it"


def _count(images: pd.DataFrame, annotations: pd.DataFrame, categories: pd.DataFrame) -> None:
    """Adds the number of objects to images and categories, and of repeated labels to images.

    `told_objects` has it where it can be told: not where ids are malformed, or there are no annotations at all.
    """
    owned = annotations["owner"].to_numpy()
    single = (annotations["crowd"] == 0).to_numpy()
    images["num_objects"] = np.bincount(owned[owned >= 0], minlength=len(images))
    images["num_targets"] = np.bincount(owned[(owned >= 0) & single], minlength=len(images))
    same = annotations.loc[owned >= 0, ["owner", "category_id", "x", "y", "width", "height"]]
    extra = same["owner"].to_numpy()[same.duplicated().to_numpy() & annotations["finite"].to_numpy()[owned >= 0]]
    images["num_repeated_labels"] = np.bincount(extra, minlength=len(images))
    counts = annotations.loc[single, "category_id"].value_counts()
    categories["num_objects"] = categories["id"].map(counts).fillna(0).astype(int)
    for table, key in ((images, "image_id"), (categories, "category_id")):
        told = _are_sure(table) and len(annotations) > 0 and annotations[key].notna().all()
        table["told_objects"] = table["num_objects"].astype(float) if told else np.nan
