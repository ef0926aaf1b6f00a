"""COCO images and annotations for training. N images, M annotations, C classes."""

import contextlib
import glob
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor
from torch.utils.data import Dataset

from detr.batch import Sample
from detr.checkpoint import write_atomically
from detr.images import ImageArchive, ImageFolder
from detr.pixels import decode_pixels

if TYPE_CHECKING:
    from detr.annotation_file import Truth


@dataclass(frozen=True)
class Annotations:
    """One `instances_*.json` as flat arrays, which forked workers share instead of copying objects.

    image_ids [N]; file_names [N]; sizes_hw [N, 2]; boxes_xyxy [M, 4] float32 pixels, clipped to the image,
    grouped by image; labels [M] in 0..C-1; starts [N+1]: image i owns annotations starts[i]:starts[i+1].
    Crowds and boxes without area are left out. category_ids [C] ascending: label k is category_ids[k], the
    only place where ids and labels meet.
    """

    image_ids: np.ndarray
    file_names: np.ndarray
    sizes_hw: np.ndarray
    boxes_xyxy: np.ndarray
    labels: np.ndarray
    starts: np.ndarray
    category_ids: np.ndarray
    category_names: tuple[str, ...]


def load_annotations(path: Path) -> Annotations:
    """The annotations of a COCO JSON file, which is parsed once: then they are read from a cache beside it.

    The cache is a hidden file that is named by a digest of the code that reads and of the JSON's bytes, so that it is
    never stale. Where it is damaged or cannot be written, the JSON is parsed again. Raises ValueError that names the
    first value that is not as expected, and for annotations of an image or a category that it does not list.
    """
    from detr import annotation_file  # serving a model, which needs no annotations, may lack what this imports

    with path.open("rb") as file:
        code = b"".join(Path(name).read_bytes() for name in (__file__, annotation_file.__file__))
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(code, digest_size=16))
        cache = path.with_name(f".{path.name}.{digest.hexdigest()}.safetensors")
        if (kept := _restore(cache)) is not None:
            return kept
        file.seek(0)
        document = annotation_file.parse(file.read(), annotation_file.Document, str(path))
    annotations = _flatten_truth(annotation_file.take_truth(document, path))
    with contextlib.suppress(OSError):
        _store(annotations, cache, path)
    return annotations


def _flatten_truth(truth: "Truth") -> Annotations:
    """The annotations that can be learnt from, grouped by image; crowds and boxes without area are left out."""
    kept = ~truth.crowd
    position = np.argsort(truth.image_ids, kind="stable")
    owner = position[np.searchsorted(truth.image_ids, truth.image_of[kept], sorter=position)]
    labels = np.searchsorted(truth.category_ids, truth.category_of[kept])
    boxes = clip_boxes(truth.boxes_xywh[kept], truth.sizes_hw[owner])
    solid = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    order = np.flatnonzero(solid)[np.argsort(owner[solid], kind="stable")]
    return Annotations(
        truth.image_ids,
        np.array(truth.file_names, dtype=np.str_),
        truth.sizes_hw,
        boxes[order],
        labels[order],
        np.searchsorted(owner[order], np.arange(len(truth.image_ids) + 1)),
        truth.category_ids,
        truth.category_names,
    )


def clip_boxes(boxes_xywh: np.ndarray, sizes_hw: np.ndarray) -> np.ndarray:
    """Corner boxes [M, 4] float32 of left, top, width, height [M, 4], cut to the size [M, 2] of each one's image."""
    boxes = boxes_xywh.astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    return np.clip(boxes, 0, sizes_hw[:, [1, 0, 1, 0]].astype(np.float32))


def _store(annotations: Annotations, cache: Path, path: Path) -> None:
    """Writes the cache of `path`, whole or not at all, and removes those of earlier bytes and earlier code."""
    arrays = dict(vars(annotations))
    names = json.dumps([arrays.pop("file_names").tolist(), arrays.pop("category_names")])
    arrays["names"] = np.frombuffer(names.encode(), np.uint8)
    content = save(arrays | {"checksum": _checksum(arrays)})
    write_atomically(cache, lambda file: file.write(content))
    name = glob.escape(path.name)
    for stale in {*path.parent.glob(f".{name}.*.safetensors"), *path.parent.glob(f"..{name}.*.partial")} - {cache}:
        stale.unlink(missing_ok=True)


def _restore(cache: Path) -> Annotations | None:
    """The annotations of a cache, None if it is absent or damaged."""
    try:
        arrays = load(cache.read_bytes())
    except (OSError, SafetensorError):
        return None
    if not np.array_equal(arrays.pop("checksum", np.empty(0)), _checksum(arrays)):
        return None
    file_names, category_names = json.loads(arrays.pop("names").tobytes())
    return Annotations(file_names=np.array(file_names, dtype=np.str_), category_names=tuple(category_names), **arrays)


def _checksum(arrays: dict[str, np.ndarray]) -> np.ndarray:
    total = hashlib.blake2b(digest_size=16)
    for name, array in sorted(arrays.items()):
        total.update(f"{name} {array.dtype} {array.shape}".encode())
        total.update(array.tobytes())
    return np.frombuffer(total.digest(), np.uint8)


class CocoDataset(Dataset[Sample]):
    """Samples by key (epoch, index): `transform(image, boxes_xyxy, labels, key)` may depend on both.

    The key, not the order of reading, carries the randomness, so workers and restarts change nothing.
    """

    def __init__(
        self,
        annotations: Annotations,
        archive: ImageArchive | ImageFolder,
        transform: Callable[[Tensor, Tensor, Tensor, tuple[int, int]], tuple[Tensor, Tensor, Tensor]],
    ) -> None:
        self.annotations = annotations
        self.archive = archive
        self.transform = transform

    def __len__(self) -> int:
        return len(self.annotations.image_ids)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        index = key[1]
        record = self.annotations
        owned = slice(record.starts[index], record.starts[index + 1])
        image, boxes, labels = self.transform(
            decode_image(self.archive.read(str(record.file_names[index])), str(record.file_names[index])),
            torch.from_numpy(record.boxes_xyxy[owned]),
            torch.from_numpy(record.labels[owned]),
            key,
        )
        height, width = record.sizes_hw[index].tolist()
        return Sample(image, boxes, labels, int(record.image_ids[index]), (height, width))


def decode_image(data: bytes, name: str) -> Tensor:
    """An RGB image [3, h, w] uint8 of JPEG or PNG bytes; ValueError names the picture that is none, and why."""
    try:
        return torch.from_numpy(decode_pixels(data)).permute(2, 0, 1)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from error
