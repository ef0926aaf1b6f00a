"""Draws docs/detections.png, of a trained model in artifacts/train and its data: python -m docs.draw_detections"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.ops import box_iou

from detr.coco import Annotations, load_annotations
from detr.detector import Detections, Detector
from detr.images import open_images
from detr.pixels import decode_pixels

ROOT = Path(__file__).parent.parent
ACROSS, DOWN, SIDE, MARGIN = 4, 2, 320, 12  # cells, and pixels of each
MIN_OBJECTS, MIN_SCORE, MIN_IOU = 2, 0.7, 0.5
COLOURS = ("#ffd60a", "#30d158", "#ff453a", "#0a84ff", "#bf5af2")


def rank_scene(found: Detections, boxes: np.ndarray, labels: np.ndarray) -> tuple[int, float]:
    """Returns the number of mistakes, and less the overlap of the object that is found worst: the lower, the better."""
    overlap = box_iou(torch.from_numpy(found.boxes_xyxy), torch.from_numpy(boxes)).numpy()
    best = np.where(found.labels[:, None] == labels, overlap, 0).max(axis=0, initial=0)
    return int((best < MIN_IOU).sum()) + abs(len(found.labels) - len(labels)), -float(best.min())


def find_scenes(record: Annotations, data: Path, detector: Detector) -> list[tuple[np.ndarray, Detections]]:
    """Returns the pixels and the detections of the best validation images of several objects."""
    images, scenes = open_images(data / "val.zip"), []
    for index, (start, stop) in enumerate(zip(record.starts, record.starts[1:], strict=False)):
        if stop - start >= MIN_OBJECTS:
            pixels = decode_pixels(images.read(str(record.file_names[index])))
            found = detector(pixels, MIN_SCORE)
            rank = rank_scene(found, record.boxes_xyxy[start:stop], record.labels[start:stop])
            scenes.append((rank, index, (pixels, found)))
    return [scene for _, _, scene in sorted(scenes, key=lambda scene: scene[:2])[: ACROSS * DOWN]]


def draw_scene(pixels: np.ndarray, found: Detections) -> Image.Image:
    """Returns a cell with the enlarged picture, and each detection with its name in the colour of its class."""
    scale = SIDE / max(pixels.shape[:2])
    size = (round(pixels.shape[1] * scale), round(pixels.shape[0] * scale))
    picture = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(20)
    for box, score, label, name in reversed(
        list(zip(found.boxes_xyxy, found.scores, found.labels, found.names, strict=True))
    ):
        left, top, right, bottom = (float(v) * scale for v in box)
        colour, text = COLOURS[int(label) % len(COLOURS)], f"{name} {score:.2f}"
        pen.rectangle((left, top, right, bottom), outline=colour, width=3)
        wide = pen.textlength(text, font) + 8
        at = (min(max(0.0, left), size[0] - wide), top - 26 if top >= 26 else top)
        pen.rectangle((*at, at[0] + wide, at[1] + 26), fill=colour)
        pen.text((at[0] + 4, at[1] + 1), text, "black", font)
    cell = Image.new("RGB", (SIDE, SIDE), "white")
    cell.paste(picture, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return cell


def draw_detections(model: Path, data: Path) -> Image.Image:
    scenes = find_scenes(load_annotations(data / "instances_val.json"), data, Detector.load(model))
    step = SIDE + MARGIN
    sheet = Image.new("RGB", (ACROSS * step - MARGIN, DOWN * step - MARGIN), "white")
    for number, scene in enumerate(scenes):
        sheet.paste(draw_scene(*scene), (number % ACROSS * step, number // ACROSS * step))
    return sheet


if __name__ == "__main__":
    draw_detections(ROOT / "artifacts/train", ROOT / "data/coco").save(ROOT / "docs/detections.png", optimize=True)
