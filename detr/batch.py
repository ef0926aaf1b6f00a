"""Images and targets of different sizes as one padded batch.

B images, T targets of all of them together, H W padded size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detr.boxes import xyxy_to_cxcywh

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Sample:
    """One image after its transform, with its targets.

    image [3, h, w] uint8; boxes_xyxy [t, 4] float32 pixels of `image`; labels [t] int64 in 0..C-1;
    image_id as in the annotations; original_size_hw of the file, before any transform.
    """

    image: Tensor
    boxes_xyxy: Tensor
    labels: Tensor
    image_id: int
    original_size_hw: tuple[int, int]


@dataclass(frozen=True)
class Targets:
    """The targets of all images of a batch, image after image.

    boxes_cxcywh [T, 4] fractions of the unpadded image; labels [T] in 0..C-1; owners [T] the image that each
    belongs to; counts, one per image, is known without asking the device.
    """

    boxes_cxcywh: Tensor
    labels: Tensor
    owners: Tensor
    counts: tuple[int, ...]

    @classmethod
    def join(cls, boxes_cxcywh: Sequence[Tensor], labels: Sequence[Tensor]) -> "Targets":
        """The targets of images with boxes [t, 4] and labels [t] each."""
        counts = tuple(map(len, labels))
        owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64))
        return cls(torch.cat(list(boxes_cxcywh)), torch.cat(list(labels)), owners, counts)


@dataclass(frozen=True)
class Batch:
    """Padded samples. Invariant: whatever stands in the padding never changes a result.

    images [B, 3, H, W] uint8; padding [B, H, W] bool, True outside the image; image_ids [B];
    original_sizes_hw [B, 2].
    """

    images: Tensor
    padding: Tensor
    targets: Targets
    image_ids: Tensor
    original_sizes_hw: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> "Batch":
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return _map_tensors(self, Tensor.pin_memory)

    def __reduce__(self) -> tuple[Callable[..., "Batch"], tuple]:
        """On the way from a worker the images alone are shared memory: small tensors travel faster by value."""
        sizes_hw = torch.stack([(~self.padding[:, :, 0]).sum(1), (~self.padding[:, 0]).sum(1)], dim=1)
        targets = self.targets
        rest = (sizes_hw, targets.boxes_cxcywh, targets.labels, targets.owners, self.image_ids, self.original_sizes_hw)
        return _rebuild_batch, (self.images, targets.counts, [tensor.numpy() for tensor in rest])


def _rebuild_batch(images: Tensor, counts: tuple[int, ...], rest: list[np.ndarray]) -> Batch:
    sizes_hw, boxes_cxcywh, labels, owners, image_ids, original_sizes_hw = map(torch.from_numpy, rest)
    targets = Targets(boxes_cxcywh, labels, owners, counts)
    return Batch(images, _build_padding(sizes_hw, *images.shape[2:]), targets, image_ids, original_sizes_hw)


def _build_padding(sizes_hw: Tensor, height: int, width: int) -> Tensor:
    """The padding [B, height, width] of images of `sizes_hw` [B, 2]."""
    below, right = torch.arange(height) >= sizes_hw[:, :1], torch.arange(width) >= sizes_hw[:, 1:]
    return below[:, :, None] | right[:, None]


def _map_tensors(record: Any, change: Callable[[Tensor], Tensor]) -> Any:
    changed = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = change(value)
        elif is_dataclass(value):
            changed[field.name] = _map_tensors(value, change)
    return replace(record, **changed)


def collate(samples: Sequence[Sample], size_multiple: int = 1) -> Batch:
    """One `Batch` of the samples, padded right and below to the largest height and width.

    Padded sizes are rounded up to `size_multiple`, which bounds the number of shapes that a compiled
    model meets.
    """
    height = max(sample.image.shape[1] for sample in samples)
    width = max(sample.image.shape[2] for sample in samples)
    height, width = (-(-size // size_multiple) * size_multiple for size in (height, width))
    images = torch.from_numpy(np.zeros((len(samples), height, width, 3), np.uint8)).permute(0, 3, 1, 2)
    boxes = []
    for i, sample in enumerate(samples):
        h, w = sample.image.shape[1:]
        images[i, :, :h, :w] = sample.image
        boxes.append(xyxy_to_cxcywh(sample.boxes_xyxy) / torch.tensor([w, h, w, h]))
    return Batch(
        images,
        _build_padding(torch.tensor([sample.image.shape[1:] for sample in samples]), height, width),
        Targets.join(boxes, [sample.labels for sample in samples]),
        torch.tensor([sample.image_id for sample in samples]),
        torch.tensor([sample.original_size_hw for sample in samples]),
    )


def normalize(images: Tensor, padding: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """ImageNet-normalised float images [B, 3, H, W], channels last, of uint8 ones; zero in the padding.

    Runs on the device of `images`, so that a quarter of the bytes is copied there. The result lies in `out`, a float
    tensor of any shape that is resized to fit, where one is given: fresh memory costs a CPU more than the arithmetic.
    """
    batch, _, height, width = images.shape
    mean, std = (torch.tensor(values, device=images.device) for values in (IMAGENET_MEAN, IMAGENET_STD))
    scale, shift = (1 / (255 * std)).repeat(width), (-mean / std).repeat(width)  # of a row of interleaved channels
    source = images.permute(0, 2, 3, 1).reshape(batch, height, width * 3)
    out = (torch.empty(0, device=images.device) if out is None else out).resize_(batch, height, width * 3)
    if images.device.type == "cpu":
        _normalize_in_cache(source, padding, scale, shift, out)
    else:
        torch.addcmul(shift, out.copy_(source), scale, out=out)
        if padding is not None:
            out.view(batch, height, width, 3).masked_fill_(padding[..., None], 0.0)
    return out.view(batch, height, width, 3).permute(0, 3, 1, 2)


def _normalize_in_cache(source: Tensor, padding: Tensor | None, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """source * scale + shift of rows [B, H, 3 W] where there is an image, a few rows at a time, and zero elsewhere."""
    for index, (rows, into) in enumerate(zip(source, out, strict=True)):
        height, width = rows.shape
        if padding is not None:
            height, width = int((~padding[index, :, 0]).sum()), 3 * int((~padding[index, 0]).sum())
        for top in range(0, height, 32):
            part = into[top : min(top + 32, height), :width]
            torch.addcmul(shift[:width], part.copy_(rows[top : top + len(part), :width]), scale[:width], out=part)
        into[height:] = 0.0
        into[:height, width:] = 0.0
