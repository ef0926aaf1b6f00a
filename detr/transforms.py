"""Training and evaluation transforms. t targets of one image; h w its size."""

import random
from dataclasses import dataclass

import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor


@dataclass(frozen=True)
class TransformConfig:
    """The paper's augmentations (section 4, "Technical details"): `train.transform` of params.yaml. Pixels."""

    scales: tuple[int, ...]  # the short side is drawn from these; the last one is the evaluation size
    max_size: int  # of the long side
    flip: float  # probability
    crop: float  # probability of the crop branch
    crop_scales: tuple[int, ...]  # short side before the crop
    crop_range: tuple[int, int]  # sides of the crop

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) < 1 or self.max_size < max(self.scales):
            raise ValueError(
                f"train.transform: scales {self.scales} must not be empty nor exceed max_size {self.max_size}"
            )
        if self.crop > 0 and (not self.crop_scales or not 0 < self.crop_range[0] <= self.crop_range[1]):
            raise ValueError("train.transform: with crop above 0, crop_scales and an ascending crop_range are needed")
        if self.crop > 0 and min(self.crop_scales) < self.crop_range[0]:
            raise ValueError(
                f"train.transform: a crop of at least {self.crop_range[0]} does not fit "
                f"crop_scales {self.crop_scales}; lower crop_range or raise crop_scales"
            )


@dataclass(frozen=True)
class View:
    """What to cut from an image, and how large to make it.

    region is left, top, right, bottom in pixels of the original; size_hw is the result's size.
    """

    region: tuple[float, float, float, float]
    size_hw: tuple[int, int]
    flip: bool


def fit_size(size_hw: tuple[int, int], short: int, max_size: int) -> tuple[int, int]:
    """The (height, width) with the short side at `short`, or less where the long side would pass `max_size`."""
    low, high = min(size_hw), max(size_hw)
    if high / low * short > max_size:
        short = max(1, round(max_size * low / high))
    height, width = size_hw
    return (short, int(short * width / height)) if height <= width else (int(short * height / width), short)


def draw_view(rng: random.Random, size_hw: tuple[int, int], config: TransformConfig) -> View:
    """A random view of an image of `size_hw`: flip, then multi-scale, or resize, crop and multi-scale."""
    flip = rng.random() < config.flip
    height, width = size_hw
    region = (0.0, 0.0, float(width), float(height))
    shape = size_hw
    if rng.random() < config.crop:
        resized_h, resized_w = fit_size(size_hw, rng.choice(config.crop_scales), max_size=10**9)
        low, high = config.crop_range
        crop_w, crop_h = rng.randint(low, min(resized_w, high)), rng.randint(low, min(resized_h, high))
        top, left = rng.randint(0, resized_h - crop_h), rng.randint(0, resized_w - crop_w)
        scale_x, scale_y = width / resized_w, height / resized_h
        region = (left * scale_x, top * scale_y, (left + crop_w) * scale_x, (top + crop_h) * scale_y)
        shape = (crop_h, crop_w)
    return View(region, fit_size(shape, rng.choice(config.scales), config.max_size), flip)


def apply_view(image: Tensor, boxes_xyxy: Tensor, labels: Tensor, view: View) -> tuple[Tensor, Tensor, Tensor]:
    """The view of an image [3, h, w] uint8 and of its boxes [t, 4] in pixels; boxes cut to nothing are dropped.

    The pixels are resampled once: the region, rounded to whole pixels, goes to its final size in one step.
    """
    height, width = view.size_hw
    left, top, right, bottom = view.region
    boxes = (boxes_xyxy - torch.tensor([left, top, left, top])).clamp(min=0)
    boxes = torch.minimum(boxes, torch.tensor([right - left, bottom - top] * 2))
    kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    boxes, labels = boxes[kept] * torch.tensor([width / (right - left), height / (bottom - top)] * 2), labels[kept]
    x0, y0 = round(left), round(top)
    image = image[:, y0 : max(round(bottom), y0 + 1), x0 : max(round(right), x0 + 1)]
    if image.shape[1:] != (height, width):
        image = TF.resize(image, [height, width], antialias=True)
    if view.flip:
        image = image.flip(-1)
        boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
    return image, boxes, labels


@dataclass(frozen=True)
class TrainTransform:
    """A random view keyed by (seed, epoch, index)."""

    config: TransformConfig
    seed: int

    def __call__(
        self, image: Tensor, boxes: Tensor, labels: Tensor, key: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        rng = random.Random(f"{self.seed}/{key[0]}/{key[1]}")
        return apply_view(image, boxes, labels, draw_view(rng, (image.shape[1], image.shape[2]), self.config))


@dataclass(frozen=True)
class EvalTransform:
    """The whole image at the evaluation size."""

    short: int
    max_size: int

    def __call__(
        self, image: Tensor, boxes: Tensor, labels: Tensor, key: tuple[int, int] = (0, 0)
    ) -> tuple[Tensor, Tensor, Tensor]:
        height, width = image.shape[1:]
        view = View(
            (0.0, 0.0, float(width), float(height)), fit_size((height, width), self.short, self.max_size), False
        )
        return apply_view(image, boxes, labels, view)
