"""A COCO JSON file as detection takes it: the gate, training, the judge and the registration read it here.

What detection does not use can hold anything and is skipped unread. Of what it uses, a missing `iscrowd` counts as 0,
as the authors have it, and a missing `area` as that of the box, as pycocotools has it for detections. Needs no torch,
so that the gate does not wait for it. N images, M annotations, C categories.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
from msgspec import UNSET

T = TypeVar("T")


class ImageEntry(msgspec.Struct, gc=False):
    """What is read of an image's entry, as it comes; so of the other entries."""

    id: Any = UNSET
    file_name: Any = UNSET
    height: Any = UNSET
    width: Any = UNSET


class AnnotationEntry(msgspec.Struct, gc=False):
    id: Any = UNSET
    image_id: Any = UNSET
    category_id: Any = UNSET
    bbox: Any = UNSET
    area: Any = UNSET
    iscrowd: Any = UNSET


class CategoryEntry(msgspec.Struct, gc=False):
    id: Any = UNSET
    name: Any = UNSET


class Document(msgspec.Struct):
    images: list[ImageEntry]
    annotations: list[AnnotationEntry]
    categories: list[CategoryEntry]


class Skipped(msgspec.Struct, gc=False):
    """A JSON object of which nothing is read."""


class Entries(msgspec.Struct):
    """A COCO JSON file, to be counted."""

    images: list[Skipped]
    annotations: list[Skipped]
    categories: list[Skipped]


@dataclass(frozen=True)
class Truth:
    """A document whose every value is as expected.

    image_ids [N]; file_names [N]; sizes_hw [N, 2]; category_ids [C] ascending, with their names; of the annotations
    image_of, category_of [M]: ids; boxes_xywh [M, 4], areas [M] float64; crowd [M] bool.
    """

    image_ids: np.ndarray
    file_names: tuple[str, ...]
    sizes_hw: np.ndarray
    category_ids: np.ndarray
    category_names: tuple[str, ...]
    image_of: np.ndarray
    category_of: np.ndarray
    boxes_xywh: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray


def read_document(path: Path) -> Document:
    """The entries of a COCO JSON file. Raises ValueError that says where it is not one."""
    return parse(path.read_bytes(), Document, str(path))


def parse(data: bytes, kind: type[T], name: str) -> T:
    """COCO JSON in UTF-8, -16 or -32, with a byte order mark or without. Raises ValueError that says what is wrong."""
    try:
        data = as_utf8(data)
        try:
            return msgspec.json.decode(data, type=kind)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:  # perhaps NaN, which Python writes though JSON lacks it: its entry can be named
            return msgspec.convert(json.loads(data, parse_int=_integer), kind)
    except msgspec.ValidationError as error:
        remedy = "" if "[" in str(error) else "; COCO's format has lists images, annotations, categories"
        raise ValueError(f"{name}: {error}{remedy}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not valid JSON: {_stray_byte(data, error)}; save it as UTF-8") from error
    except RecursionError as error:
        raise ValueError(f"{name} holds lists in lists, or objects in objects, too deep to be read") from error
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from error


def as_utf8(data: bytes) -> bytes:
    """JSON in UTF-8 without a byte order mark. Raises UnicodeDecodeError for damaged UTF-16 or UTF-32."""
    encoding = json.detect_encoding(data)
    if encoding == "utf-8":
        return data
    return data[3:] if encoding == "utf-8-sig" else data.decode(encoding).encode()


def _stray_byte(data: bytes, error: UnicodeDecodeError) -> str:
    try:
        data.decode()
    except UnicodeDecodeError as found:  # at its place in the whole file
        error = found
    near = error.object[max(0, error.start - 20) : error.start + 10].decode("latin-1")
    byte = f"0x{error.object[error.start]:02x} (near {near!r})"
    return f"byte {error.start} is {byte}, which is not {error.encoding.upper()}"


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < 400 else float(digits)  # Python refuses thousands of digits


def whole(value: Any) -> int | None:
    """A whole number, also as 7.0; None for what is none or beyond what JSON readers keep exactly. So the others."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and abs(value) < 2**53 else None


def natural(value: Any) -> int | None:
    number = whole(value)
    return number if number is not None and number >= 0 else None


def side(value: Any) -> int | None:
    return natural(value) or None


def text(value: Any) -> str | None:
    """A name that a file can have and UTF-8 can write."""
    if not isinstance(value, str) or not value or "\0" in value:
        return None
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a pair
        return None
    return value


def number(value: Any) -> float | None:
    """A number, infinite too, but not NaN."""
    held = type(value) is int and abs(value) < 10**308
    return float(value) if held or (type(value) is float and value == value) else None


def box(value: Any) -> list[float] | None:
    if not isinstance(value, list) or len(value) != 4:
        return None
    numbers = [n for v in value if (n := number(v)) is not None and abs(n) < 2**53]
    return numbers if len(numbers) == 4 else None


def flag(value: Any) -> int | None:
    if value is UNSET:
        return 0
    return int(value) if isinstance(value, int | float) and value in (0, 1) else None


class Reading(NamedTuple):
    """How a value is taken, and what is expected of it."""

    read: Callable[[Any], Any]
    expected: str


ID = Reading(natural, "a whole number, 0 or more and below 2^53")
SIDE = Reading(side, "a whole number of pixels, 1 or more and below 2^53")
READINGS: dict[str, dict[str, Reading]] = {
    "images": {
        "id": ID,
        "file_name": Reading(text, "a file name"),
        "height": SIDE,
        "width": SIDE,
    },
    "annotations": {
        "id": Reading(whole, "a whole number between -2^53 and 2^53"),
        "image_id": ID,
        "category_id": ID,
        "bbox": Reading(box, "four finite numbers below 2^53, [left, top, width, height] in pixels"),
        "area": Reading(number, "a number"),
        "iscrowd": Reading(flag, "0 or 1"),
    },
    "categories": {"id": ID, "name": Reading(text, "a name")},
}


def take(entries: Sequence[Any], kind: str, key: str) -> list[Any]:
    """What `key` of each of the images, annotations or categories is taken as, None where it is not as expected."""
    read = READINGS[kind][key].read
    if key == "area":
        return [_area(entry) if entry.area is UNSET else read(entry.area) for entry in entries]
    return [read(getattr(entry, key)) for entry in entries]


def _area(entry: AnnotationEntry) -> float:
    held = box(entry.bbox)
    return held[2] * held[3] if held else 0.0  # without a box, the box is what is wrong


def complain(kind: str, index: int, key: str, value: Any) -> str:
    """`annotations[3].iscrowd is 2, expected 0 or 1`"""
    read, expected = READINGS[kind][key]
    hint = ", without quotes" if isinstance(value, str) and read(_unquoted(value)) is not None else ""
    return f"{kind}[{index}].{key} is {shown(value)}, expected {expected}{hint}"


def _unquoted(text: str) -> Any:
    """What a short text says as JSON; None where it is none."""
    try:
        return json.loads(text) if len(text) < 80 else None
    except ValueError:
        return None


def shown(value: Any) -> str:
    """A value as JSON has it, in one short line."""
    if value is UNSET:
        return "missing"
    line = json.dumps(value)
    return line if len(line) <= 80 else f"{line[:77]}..."


def read_truth(path: Path) -> Truth:
    """What detection needs of a COCO JSON file. Raises ValueError that names the first value that cannot be taken."""
    return take_truth(read_document(path), path)


def column(document: Document, kind: str, key: str, name: str) -> list[Any]:
    """`take` of a document's entries. Raises ValueError that names the first value that is not as expected."""
    entries = getattr(document, kind)
    values = take(entries, kind, key)
    if None in values:
        index = values.index(None)
        raise ValueError(f"{name}: {complain(kind, index, key, getattr(entries[index], key))}")
    return values


def take_truth(document: Document, path: Path) -> Truth:
    """`read_truth` of what was read of `path` before."""

    def integers(kind: str, key: str) -> np.ndarray:
        return np.array(column(document, kind, key, str(path)), dtype=np.int64)

    def reals(key: str) -> np.ndarray:
        return np.array(column(document, "annotations", key, str(path)), dtype=np.float64)

    image_ids, category_ids = (_unique(integers(kind, "id"), kind, path) for kind in ("images", "categories"))
    order = np.argsort(category_ids)
    names = column(document, "categories", "name", str(path))
    truth = Truth(
        image_ids,
        tuple(column(document, "images", "file_name", str(path))),
        np.stack([integers("images", key) for key in ("height", "width")], axis=1),
        category_ids[order],
        tuple(names[k] for k in order),
        integers("annotations", "image_id"),
        integers("annotations", "category_id"),
        reals("bbox").reshape(-1, 4),
        reals("area"),
        reals("iscrowd") > 0,
    )
    _refuse(truth.image_of, image_ids, f"{path}: annotations have image ids", "images")
    _refuse(truth.category_of, category_ids, f"{path}: annotations have category ids", "categories")
    return truth


def _unique(ids: np.ndarray, kind: str, path: Path) -> np.ndarray:
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"{path}: {kind} have the ids {values[counts > 1][:10].tolist()} more than once, expected once"
        )
    return ids


def _refuse(used: np.ndarray, known: np.ndarray, what: str, lists: str) -> None:
    if (unknown := np.setdiff1d(used, known)).size:
        raise ValueError(f"{what} {unknown[:10].tolist()}, which its {lists} do not list")
