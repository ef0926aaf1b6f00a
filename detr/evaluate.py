"""Detections of a model over a dataset, and COCO's judgement of them by pycocotools."""

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from detr.batch import collate, normalize
from detr.coco import CocoDataset
from detr.distributed import Process
from detr.model import DETR
from detr.postprocess import postprocess

METRICS = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip


@torch.no_grad()
def detect(
    model: DETR, dataset: CocoDataset, indices: list[int], batch_size: int, size_multiple: int, device: torch.device
) -> Iterator[list[dict]]:
    """COCO detections {image_id, category_id, bbox [x, y, w, h], score}, one list per batch of images.

    Coordinates are rounded to 1/100 pixel and scores to 6 digits, which no COCO metric sees.
    """
    model.to(device).eval()
    loader = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=[[(0, i) for i in indices[k : k + batch_size]] for k in range(0, len(indices), batch_size)],  # type: ignore[arg-type]
        collate_fn=partial(collate, size_multiple=size_multiple),
    )
    category_ids = dataset.annotations.category_ids
    for batch in loader:
        batch = batch.to(device)
        logits, boxes = model(normalize(batch.images, batch.padding), batch.padding)
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


def detect_all(model: DETR, dataset: CocoDataset, batch_size: int, size_multiple: int, process: Process) -> list[dict]:
    """The detections of the whole dataset, each process doing its share; every process gets all.

    Shares are whole batches, so images share their padding with the same others for any number of processes.
    """
    stride = batch_size * process.num_processes
    starts = range(process.rank * batch_size, len(dataset), stride)
    mine = [index for start in starts for index in range(start, min(start + batch_size, len(dataset)))]
    found = [row for rows in detect(model, dataset, mine, batch_size, size_multiple, process.device) for row in rows]
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
