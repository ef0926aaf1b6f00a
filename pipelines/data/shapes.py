"""Draws the embedded dataset: textured scenes of overlapping shapes with COCO annotations.

A category is a shape that leans to a hue; the hues of neighbours overlap, so colour helps but does not decide.
Every scene is a pure function of (seed, split, index), so any number of processes draws the same bytes.
"""

import colorsys
import io
import json
import os
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image, ImageDraw

from detr.config import Key, check_keys
from pipelines.progress import Progress

CATEGORIES = {3: "ellipse", 7: "box", 12: "triangle", 31: "star", 58: "cross"}  # ids with gaps, as COCO's
SPLITS = ("train", "val")
SUPERSAMPLE = 2
BLOTCHES = 12  # of the background, per side; three of them are one coarse blotch
DULL, COARSE, FINE = 25, 35, 20  # strengths of the background's colour and of its blotches, of 255
HUE_SPREAD = 0.12  # of a category's fill around its own hue, of a full turn: neighbours overlap
ZIP_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class ShapesParams:
    """The drawn dataset: `download.shapes` of params.yaml. Sizes in pixels, shares in 0..1."""

    seed: Annotated[int, Key("random seed of the scenes", ge=0)]
    num_train: Annotated[int, Key("training images", ge=1)]
    num_val: Annotated[int, Key("validation images", ge=1)]
    image_size: Annotated[int, Key("longest side of an image, in pixels")]
    max_objects: Annotated[int, Key("most objects per image", ge=1)]
    min_object_size: Annotated[int, Key("smallest side that objects are drawn with, in pixels", ge=8)]
    max_object_size: Annotated[
        int, Key("largest side that objects are drawn with, in pixels; at most 0.7 of image_size")
    ]
    empty_share: Annotated[float, Key("share of images without any object", ge=0, le=1)]
    crowd_share: Annotated[float, Key("share of images with a heap that is annotated as one crowd", ge=0, le=1)]

    def __post_init__(self) -> None:
        check_keys(self, "download.shapes")
        if not 8 <= self.min_object_size <= self.max_object_size <= self.image_size * 0.7:
            raise ValueError(
                f"download.shapes: sizes must be 8 <= min_object_size ({self.min_object_size}) <= "
                f"max_object_size ({self.max_object_size}) <= 0.7 * image_size ({self.image_size * 0.7:g})"
            )


def compute_outline(category: str, size: tuple[float, float], angle: float) -> np.ndarray:
    """Corner points [n, 2] of a shape of `size` (width, height), around the origin, turned by `angle` radians."""
    if category == "ellipse":
        turns = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        points = np.stack([np.cos(turns), np.sin(turns)], axis=1)
    elif category == "box":
        points = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=float)
    elif category == "triangle":
        points = np.array([[0, -1], [1, 1], [-1, 1]], dtype=float)
    elif category == "star":
        turns = np.arange(10) * np.pi / 5 - np.pi / 2
        points = np.stack([np.cos(turns), np.sin(turns)], axis=1) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None]
    else:
        a, b = 0.32, 1.0
        points = np.array(
            [[-a, -b], [a, -b], [a, -a], [b, -a], [b, a], [a, a], [a, b], [-a, b], [-a, a], [-b, a], [-b, -a], [-a, -a]]
        )
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return (points * np.array(size) / 2) @ turn


@dataclass(eq=False)
class Drawn:
    """One annotated thing of a scene; pixels are supersampled."""

    category_id: int
    crowd: bool
    number: int = 0  # in `Scene.drawn`, from 1
    pixels: int = 0  # before occlusion
    hidden: int = 0  # of them, under later shapes


class Scene:
    """A canvas under the painter's hand: colours [h, w, 3] uint8, owner [h, w] (0 background, k the k-th of `drawn`).

    Both are supersampled. Invariant: at least half of the pixels of every drawn thing stay visible.
    """

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.rng = rng
        self.colours = _background(rng, height * SUPERSAMPLE, width * SUPERSAMPLE)
        self.owner = np.zeros(self.colours.shape[:2], dtype=np.uint8)
        self.drawn: list[Drawn] = []

    def add(self, category_id: int, sides: tuple[float, float]) -> None:
        """One object with a side between `sides` in pixels, if one of 20 random sizes and places is free."""
        for _ in range(20):
            side = np.exp(self.rng.uniform(*np.log(sides)))
            aspect = np.exp(self.rng.uniform(-0.35, 0.35))
            points = self._turned(category_id, (side * aspect, side / aspect))
            low, high = -points.min(axis=0), self.owner.shape[::-1] - points.max(axis=0)
            fits = (low <= high).all()
            if fits and self._paint(points + self.rng.uniform(low, high), Drawn(category_id, crowd=False)):
                return

    def add_heap(self, category_id: int, side: float, spread: float) -> None:
        """A heap of shapes of about `side` pixels, strewn by `spread`, annotated as one crowd."""
        size = np.array(self.owner.shape[::-1])
        middle = self.rng.uniform(0.25 * size, 0.75 * size)
        heap = Drawn(category_id, crowd=True)
        for _ in range(12):
            points = self._turned(category_id, (side * self.rng.uniform(0.6, 1.0),) * 2)
            points += middle + self.rng.normal(0, spread * SUPERSAMPLE, 2)
            if (points >= 0).all() and (points <= size).all():
                self._paint(points, heap)

    def _turned(self, category_id: int, size: tuple[float, float]) -> np.ndarray:
        """A supersampled outline at a random angle, around the origin."""
        return compute_outline(CATEGORIES[category_id], size, self.rng.uniform(-0.4, 0.4)) * SUPERSAMPLE

    def _paint(self, points: np.ndarray, thing: Drawn) -> bool:
        """Paints a polygon [n, 2] as a part of `thing`, unless it would hide too much of another one."""
        left, top = np.floor(points.min(axis=0)).astype(int).tolist()
        right, bottom = np.ceil(points.max(axis=0)).astype(int).tolist()
        stencil = Image.new("1", (right - left, bottom - top))
        ImageDraw.Draw(stencil).polygon([tuple(p) for p in points - [left, top]], fill=1)
        mask = np.asarray(stencil)
        window = (slice(top, bottom), slice(left, right))
        number = thing.number or len(self.drawn) + 1
        covered = np.bincount(self.owner[window][mask], minlength=number + 1)
        hides = [(other, int(n)) for other, n in zip(self.drawn, covered[1:], strict=False) if other is not thing]
        if any(other.hidden + n > 0.5 * other.pixels for other, n in hides):
            return False
        for other, n in hides:
            other.hidden += n
        thing.pixels += int(mask.sum() - covered[number])
        if not thing.number:
            thing.number = number
            self.drawn.append(thing)
        colours = self.colours[window]
        hue = list(CATEGORIES).index(thing.category_id) / len(CATEGORIES)
        fill = _fill(self.rng, hue, colours[len(colours) // 2].mean(axis=0), *mask.shape)
        np.copyto(colours, fill, where=mask[..., None])
        self.owner[window][mask] = number
        return True


def draw_scene(params: ShapesParams, split: str, index: int) -> tuple[bytes, tuple[int, int], list[dict]]:
    """One scene: its JPEG bytes, its (height, width) and its annotations without ids.

    Boxes enclose what is visible after occlusion; every object keeps at least half of its pixels.
    """
    rng = np.random.default_rng([params.seed, SPLITS.index(split), index])
    short = params.image_size * 3 // 4
    height, width = [(params.image_size,) * 2, (params.image_size, short), (short, params.image_size)][rng.integers(3)]
    scene = Scene(rng, height, width)
    if rng.random() >= params.empty_share:
        ids = list(CATEGORIES)
        if rng.random() < params.crowd_share:
            scene.add_heap(ids[rng.integers(len(ids))], 0.8 * params.min_object_size, params.image_size / 10)
        for _ in range(rng.integers(1, params.max_objects + 1)):
            scene.add(ids[rng.integers(len(ids))], (params.min_object_size, params.max_object_size))
    image = Image.fromarray(scene.colours).reduce(SUPERSAMPLE)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue(), (height, width), [_annotation(scene.owner, thing) for thing in scene.drawn]


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A dull colour with coarse and fine blotches, [height, width, 3] uint8."""
    ground = rng.uniform(60, 195) + rng.uniform(-DULL, DULL, 3)
    coarse = rng.uniform(-COARSE, COARSE, (BLOTCHES // 3, BLOTCHES // 3, 3)).repeat(3, axis=0).repeat(3, axis=1)
    fine = rng.uniform(-FINE, FINE, (BLOTCHES, BLOTCHES, 3))
    small = Image.fromarray((ground + coarse + fine).clip(0, 255).astype(np.uint8))
    return np.array(small.resize((width, height), Image.Resampling.BICUBIC))


def _fill(rng: np.random.Generator, hue: float, behind: np.ndarray, height: int, width: int) -> np.ndarray:
    """Striped colours [height, width, 3] uint8.

    The ground colour is near `hue` (0..1), and of three drawn the one farthest from the colour `behind`.
    """
    hsv = rng.uniform([hue - HUE_SPREAD, 0.4, 0.4], [hue + HUE_SPREAD, 1, 1], (3, 3))
    choices = 255 * np.array([colorsys.hsv_to_rgb(*row) for row in hsv], dtype=np.float32)
    colour = choices[np.abs(choices - behind).max(axis=1).argmax()]
    direction, wavelength = rng.uniform(0, np.pi), rng.uniform(4, 12) * SUPERSAMPLE
    x, y = (np.arange(n) * (2 * np.pi / wavelength) for n in (width, height))
    waves = np.exp(1j * y * np.sin(direction))[:, None] * np.exp(1j * x * np.cos(direction))
    stripes = waves.imag.astype(np.float32) * rng.uniform(0, 30)
    return (colour + stripes[..., None]).clip(0, 255).astype(np.uint8)


def _annotation(owner: np.ndarray, thing: Drawn) -> dict:
    mask = owner == thing.number
    x, y = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    left, top, right, bottom = (float(v) / SUPERSAMPLE for v in (x[0], y[0], x[-1] + 1, y[-1] + 1))
    return {
        "category_id": thing.category_id,
        "bbox": [left, top, right - left, bottom - top],
        "area": int(mask.sum()) / SUPERSAMPLE**2,
        "iscrowd": int(thing.crowd),
        "segmentation": [],
    }


def _draw_all(params: ShapesParams, split: str, count: int) -> Iterator[tuple[bytes, tuple[int, int], list[dict]]]:
    """The scenes 0..count-1, drawn by all cores; who stops reading early waits for none that is not begun."""
    pool = ProcessPoolExecutor(os.cpu_count())
    try:
        scenes = pool.map(partial(draw_scene, params, split), range(count), chunksize=64)
        yield from Progress(scenes, f"draw {split}", count, "image")
    finally:
        pool.shutdown(cancel_futures=True)


def write_shapes(params: ShapesParams, folder: Path) -> None:
    """Draws the four dataset files into `folder`: {train,val}.zip and instances_{train,val}.json."""
    for split, count in (("train", params.num_train), ("val", params.num_val)):
        images: list[dict] = []
        annotations: list[dict] = []
        with zipfile.ZipFile(folder / f"{split}.zip", "w", zipfile.ZIP_STORED) as archive:
            for index, (jpeg, (height, width), objects) in enumerate(_draw_all(params, split, count)):
                image_id = index * 7 + 11  # ids with gaps, as COCO's
                name = f"{image_id:012d}.jpg"
                archive.writestr(zipfile.ZipInfo(name, ZIP_DATE), jpeg)
                images.append({"id": image_id, "file_name": name, "height": height, "width": width})
                annotations += [
                    {"id": len(annotations) + k, "image_id": image_id, **o} for k, o in enumerate(objects, 1)
                ]
        document = {
            "info": {"description": f"drawn shapes, seed {params.seed}"},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": key, "name": name, "supercategory": "shape"} for key, name in CATEGORIES.items()],
        }
        (folder / f"instances_{split}.json").write_text(json.dumps(document), encoding="utf-8")
