"""Detections of a model over a dataset, and COCO's judgement of them by pycocotools."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from detr.batch import normalize
from detr.coco import CocoDataset
from detr.distributed import Process
from detr.loader import Loader
from detr.model import DETR, for_inference
from detr.postprocess import postprocess

METRICS = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip


def batches_of_one_size(sizes_hw: Sequence[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Indices of `sizes_hw` in batches of images of one size, which bring no padding to each other.

    Padding is not free of effect: convolutions and norms reach into it, and detections suffer. So an image's
    detections do not depend on the batch size.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(sizes_hw):
        groups.setdefault(size, []).append(index)
    return [group[k : k + batch_size] for group in groups.values() for k in range(0, len(group), batch_size)]


@torch.no_grad()
def detect(
    model: DETR, dataset: CocoDataset, batches: list[list[int]], size_multiple: int, device: torch.device
) -> Iterator[list[dict]]:
    """COCO detections {image_id, category_id, bbox [x, y, w, h], score}, one list per batch of indices.

    `size_multiple` is that of the model's `InputSize`.
    Coordinates are rounded to 1/100 pixel and scores to 6 digits, which no COCO metric sees.
    """
    model = for_inference(model).to(device)
    category_ids = dataset.annotations.category_ids
    keys = [[(0, index) for index in batch] for batch in batches]
    for batch in Loader(dataset, keys, size_multiple, device):
        padding = batch.padding if batch.padding.any() else None
        logits, boxes = model(normalize(batch.images, batch.padding), padding)
        scores, labels, boxes_xyxy = (x.cpu() for x in postprocess(logits, boxes, batch.original_sizes_hw))
        boxes_xyxy[..., 2:] -= boxes_xyxy[..., :2]
        found = []
        for image, image_id in enumerate(batch.image_ids.tolist()):
            rows = zip(scores[image].tolist(), labels[image].tolist(), boxes_xyxy[image].tolist(), strict=True)
            found += [
                {
                    "image_id": image_id,
                    "category_id": int(category_ids[label]),
                    "bbox": [round(v, 2) for v in box],
                    "score": round(score, 6),
                }
                for score, label, box in rows
            ]
        yield found


def detect_all(
    model: DETR,
    dataset: CocoDataset,
    batch_size: int,
    size_multiple: int,
    process: Process,
    progress: Callable[[int], object] = lambda num_images: None,
) -> list[dict]:
    """The detections of the whole dataset in its order, each process doing its share; every process gets all.

    `progress` is called with the number of images after each batch of this process.
    """
    sizes_hw = [(height, width) for height, width in dataset.annotations.sizes_hw.tolist()]
    mine = batches_of_one_size(sizes_hw, batch_size)[process.rank :: process.num_processes]
    found: list[dict] = []
    for batch, rows in zip(mine, detect(model, dataset, mine, size_multiple, process.device), strict=True):
        found += rows
        progress(len(batch))
    merged = [row for part in process.gather(found) for row in part]
    order = {image_id: index for index, image_id in enumerate(dataset.annotations.image_ids.tolist())}
    return sorted(merged, key=lambda row: order[row["image_id"]])


def coco_metrics(annotations: Path, detections: list[dict]) -> tuple[dict[str, float], np.ndarray]:
    """COCO's 12 bbox numbers (0..1, -1 where the data has no such object) and the precision array.

    The array [10, 101, C, 4, 3] is over IoU thresholds 0.50:0.05:0.95, recall thresholds 0:0.01:1, categories by
    ascending id, areas all/small/medium/large, and 1/10/100 detections per image; -1 marks an absent category.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        truth = COCO(str(annotations))
        truth.dataset.setdefault("info", {})
        rows = [[d["image_id"], *d["bbox"], d["score"], d["category_id"]] for d in detections]
        found = truth.loadRes(np.array(rows, dtype=np.float64)) if rows else COCO()
        judge = COCOeval(truth, found, "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return dict(zip(METRICS, map(float, judge.stats), strict=True)), judge.eval["precision"]


def ap_per_class(precision: np.ndarray) -> list[tuple[float, float]]:
    """(AP, AP50) of each category, -1 where it is absent, from `coco_metrics`' precision array."""

    def mean(values: np.ndarray) -> float:
        present = values[values > -1]
        return float(present.mean()) if present.size else -1.0

    return [(mean(precision[:, :, k, 0, 2]), mean(precision[0, :, k, 0, 2])) for k in range(precision.shape[2])]
