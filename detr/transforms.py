"""Training and evaluation transforms. t targets of one image; h w its size."""

import random
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor

from detr.config import Key, check_keys


@dataclass(frozen=True)
class TransformConfig:
    """The paper's augmentations (section 4, "Technical details"): `train.transform` of params.yaml. Pixels."""

    scales: Annotated[
        tuple[int, ...], Key("short sides, one drawn per image; the last one is that of evaluation", ge=1)
    ]
    max_size: Annotated[int, Key("longest long side, in training and evaluation", ge=1)]
    flip: Annotated[float, Key("probability of a mirror image", ge=0, le=1)]
    crop: Annotated[float, Key("probability of a random crop", ge=0, le=1)]
    crop_scales: Annotated[tuple[int, ...], Key("short sides before the crop, one drawn per image", ge=1)]
    crop_range: Annotated[tuple[int, int], Key("shortest and longest side of the crop", ge=0)]

    def __post_init__(self) -> None:
        check_keys(self, "train.transform")
        if not self.scales or self.max_size < max(self.scales):
            raise ValueError(
                f"train.transform: scales {self.scales} must not be empty nor exceed max_size {self.max_size}"
            )
        if self.crop > 0 and (not self.crop_scales or not 0 < self.crop_range[0] <= self.crop_range[1]):
            raise ValueError(
                f"train.transform.crop is {self.crop}, with crop_scales {self.crop_scales} and crop_range "
                f"{self.crop_range}; expected at least one scale and an ascending range, or a crop of 0"
            )
        if self.crop > 0 and min(self.crop_scales) < self.crop_range[0]:
            raise ValueError(
                f"train.transform: a crop of at least {self.crop_range[0]} does not fit "
                f"crop_scales {self.crop_scales}; lower crop_range or raise crop_scales"
            )


@dataclass(frozen=True)
class View:
    """What to show of an image: flipped or not, at `resized_hw`, of that the `crop`, and that at `size_hw`. Pixels.

    crop is top, left, height, width.
    """

    flip: bool
    resized_hw: tuple[int, int]
    crop: tuple[int, int, int, int]
    size_hw: tuple[int, int]


def fit_size(size_hw: tuple[int, int], short: int, max_size: int) -> tuple[int, int]:
    """The (height, width) with the short side at `short`, or less where the long side would pass `max_size`.

    Of an image so long that its short side would be none, which the authors' code cannot resize, that is one pixel.
    """
    height, width = size_hw
    low, high = min(size_hw), max(size_hw)
    if high / low * short > max_size:
        short = round(max_size * low / high)
        if not short:
            return (1, max_size) if height <= width else (max_size, 1)
    return (short, int(short * width / height)) if height <= width else (int(short * height / width), short)


def view_whole(size_hw: tuple[int, int], short: int, max_size: int, flip: bool = False) -> View:
    """The view of the whole image with its short side at `short`."""
    return View(flip, size_hw, (0, 0, *size_hw), fit_size(size_hw, short, max_size))


def draw_view(rng: random.Random, size_hw: tuple[int, int], config: TransformConfig) -> View:
    """A random view of an image of `size_hw`: flip, then multi-scale, or resize, crop and multi-scale.

    Draws in the order of the authors' code: equal draws give equal views.
    """
    flip = rng.random() < config.flip
    if rng.random() < 1 - config.crop:
        return view_whole(size_hw, rng.choice(config.scales), config.max_size, flip)
    resized_h, resized_w = fit_size(size_hw, rng.choice(config.crop_scales), max_size=10**9)
    low, high = config.crop_range
    width, height = rng.randint(low, min(resized_w, high)), rng.randint(low, min(resized_h, high))
    top, left = rng.randint(0, resized_h - height), rng.randint(0, resized_w - width)
    size = fit_size((height, width), rng.choice(config.scales), config.max_size)
    return View(flip, (resized_h, resized_w), (top, left, height, width), size)


def apply_view(image: Tensor, boxes_xyxy: Tensor, labels: Tensor, view: View) -> tuple[Tensor, Tensor, Tensor]:
    """The view of an image [3, h, w] uint8 and of its boxes [t, 4] in pixels; boxes cut to nothing are dropped.

    Boxes are exact. Pixels are resampled once instead of twice: the crop, rounded to whole pixels of the original,
    goes to its final size in one step, which shifts its edges by half a pixel of the original at most.
    """
    source_h, source_w = image.shape[1:]
    resized_h, resized_w = view.resized_hw
    top, left, height, width = view.crop
    boxes = boxes_xyxy
    if view.flip:
        boxes = boxes[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1]) + torch.tensor([source_w, 0, source_w, 0])
    boxes = boxes * torch.tensor([resized_w / source_w, resized_h / source_h] * 2)
    boxes = torch.minimum(boxes - torch.tensor([left, top, left, top]), torch.tensor([width, height] * 2)).clamp(min=0)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    boxes = boxes[kept] * torch.tensor([view.size_hw[1] / width, view.size_hw[0] / height] * 2)

    if view.flip:
        left = resized_w - left - width
    rows, columns = (
        slice(round(start * scale), max(round((start + size) * scale), round(start * scale) + 1))
        for start, size, scale in ((top, height, source_h / resized_h), (left, width, source_w / resized_w))
    )
    image = image[:, rows, columns]
    if view.flip:
        image = image.flip(-1)
    if image.shape[1:] != view.size_hw:
        image = TF.resize(image, list(view.size_hw), antialias=True)
    return image, boxes, labels[kept]


@dataclass(frozen=True)
class TrainTransform:
    """A random view keyed by (seed, epoch, index)."""

    config: TransformConfig
    seed: int

    def view(self, size_hw: tuple[int, int], key: tuple[int, int]) -> View:
        """Of the image `key`, (epoch, index), of that size."""
        return draw_view(random.Random(f"{self.seed}/{key[0]}/{key[1]}"), size_hw, self.config)

    def view_sizes(self, sizes_hw: np.ndarray, epoch: int) -> np.ndarray:
        """The (height, width) [N, 2] that each of the images of `sizes_hw` [N, 2] is shown at in that epoch."""
        sizes = [(height, width) for height, width in sizes_hw.tolist()]
        return np.array([self.view(size, (epoch, index)).size_hw for index, size in enumerate(sizes)])

    def __call__(
        self, image: Tensor, boxes: Tensor, labels: Tensor, key: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return apply_view(image, boxes, labels, self.view((image.shape[1], image.shape[2]), key))


@dataclass(frozen=True)
class EvalTransform:
    """The whole image at the evaluation size."""

    short: int
    max_size: int

    def __call__(
        self, image: Tensor, boxes: Tensor, labels: Tensor, key: tuple[int, int] = (0, 0)
    ) -> tuple[Tensor, Tensor, Tensor]:
        view = view_whole((image.shape[1], image.shape[2]), self.short, self.max_size)
        return apply_view(image, boxes, labels, view)
