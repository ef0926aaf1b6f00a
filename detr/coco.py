"""COCO images and annotations for training. N images, M annotations, C classes."""

import json
import mmap
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_image

from detr.batch import Sample


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
    """The annotations of a COCO JSON file. Raises ValueError for a category id that it does not list."""
    document = json.loads(path.read_text())
    images, categories = document["images"], sorted(document["categories"], key=lambda category: category["id"])
    image_ids = np.array([image["id"] for image in images], dtype=np.int64)
    sizes_hw = np.array([(image["height"], image["width"]) for image in images], dtype=np.int64).reshape(-1, 2)
    category_ids = np.array([category["id"] for category in categories], dtype=np.int64)
    kept = [a for a in document["annotations"] if not a.get("iscrowd", 0)]
    boxes = np.array([a["bbox"] for a in kept], dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    position = {image_id: index for index, image_id in enumerate(image_ids.tolist())}
    owner = np.array([position[a["image_id"]] for a in kept], dtype=np.int64)
    limits = sizes_hw[owner][:, [1, 0, 1, 0]].astype(np.float32)
    boxes = np.clip(boxes, 0, limits)
    unknown = {a["category_id"] for a in kept} - set(category_ids.tolist())
    if unknown:
        raise ValueError(f"{path}: annotations have category ids {sorted(unknown)}, which its categories do not list")
    labels = np.searchsorted(category_ids, np.array([a["category_id"] for a in kept], dtype=np.int64))
    solid = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    order = np.flatnonzero(solid)[np.argsort(owner[solid], kind="stable")]
    return Annotations(
        image_ids,
        np.array([image["file_name"] for image in images]),
        sizes_hw,
        boxes[order],
        labels[order],
        np.searchsorted(owner[order], np.arange(len(images) + 1)),
        category_ids,
        tuple(category["name"] for category in categories),
    )


class ImageArchive:
    """The files of a zip of stored members, each read at its offset through one memory map.

    A member is found by its path in the zip or by its bare name, as COCO's `train2017/000000000009.jpg` is
    listed as `000000000009.jpg`. Safe with forked and spawned workers. Raises ValueError for compressed
    members and for an archive that is cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.members: dict[str, tuple[int, int]] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    if info.is_dir():
                        continue
                    if info.compress_type != zipfile.ZIP_STORED:
                        raise ValueError(f"{path}: {info.filename} is compressed; store images: zip -0")
                    self.members[info.filename] = (info.header_offset, info.file_size)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is not a whole zip file ({error}); fetch it again") from error
        for name in list(self.members):
            self.members.setdefault(name.rsplit("/", 1)[-1], self.members[name])
        self._map: mmap.mmap | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_map": None}

    def read(self, name: str) -> bytes:
        """The bytes of one member; FileNotFoundError names it when it is missing."""
        if name not in self.members:
            raise FileNotFoundError(f"{name} is not in {self.path}")
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        offset, size = self.members[name]
        if offset < 0 or self._map[offset : offset + 4] != b"PK\x03\x04":
            raise ValueError(f"{self.path} is damaged: {name} is not where its directory says; fetch it again")
        name_size, extra_size = struct.unpack_from("<HH", self._map, offset + 26)
        start = offset + 30 + name_size + extra_size
        return self._map[start : start + size]


class CocoDataset(Dataset[Sample]):
    """Samples by key (epoch, index): `transform(image, boxes_xyxy, labels, key)` may depend on both.

    The key, not the order of reading, carries the randomness, so workers and restarts change nothing.
    """

    def __init__(
        self,
        annotations: Annotations,
        archive: ImageArchive,
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
            decode(self.archive.read(str(record.file_names[index])), str(record.file_names[index])),
            torch.from_numpy(record.boxes_xyxy[owned]),
            torch.from_numpy(record.labels[owned]),
            key,
        )
        height, width = record.sizes_hw[index].tolist()
        return Sample(image, boxes, labels, int(record.image_ids[index]), (height, width))


def decode(data: bytes, name: str) -> Tensor:
    """An RGB image [3, h, w] uint8 of JPEG or PNG bytes; ValueError names the picture that does not decode."""
    try:
        return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{name} does not decode as an image: {str(error).splitlines()[0]}") from error
