"""COCO's judgement of detections, and what limits it. C categories by ascending id, n detections.

In arrays a detection is a row (image id, left, top, width, height, score, category id): boxes in pixels of the original
image, scores in 0..1, float64.
The numbers come from hotcoco, which gives those of pycocotools bit for bit in a fiftieth of its time; the tests and
benchmarks/coco_eval.py hold the two equal.
"""

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np

METRICS = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
PER_CLASS = ("AP50", "AP", "AP_small", "AP_medium", "AP_large")
COLUMNS = 7
LIMITS = {
    "Cls": "classification",
    "Loc": "localisation",
    "Both": "classification and localisation",
    "Dupe": "duplicates",
    "Bkg": "background",
    "Miss": "missed",
}


def to_results(detections: np.ndarray) -> list[dict]:
    """Rows [n, 7] in the form of COCO's results files: {image_id, category_id, bbox, score}."""
    return [
        {"image_id": int(row[0]), "category_id": int(row[6]), "bbox": row[1:5], "score": row[5]}
        for row in detections.tolist()
    ]


def from_results(results: list[dict]) -> np.ndarray:
    """Rows [n, 7] of what a COCO results file holds."""
    rows = [[row["image_id"], *row["bbox"], row["score"], row["category_id"]] for row in results]
    return np.array(rows, dtype=np.float64).reshape(-1, COLUMNS)


def build_evaluator(annotations: Path, detections: np.ndarray) -> Any:
    """hotcoco's COCOeval of detections [n, 7], not evaluated yet. ValueError names images that the annotations lack.

    Annotations count by their place, whatever their ids: pycocotools takes an object of id 0 for none.
    """
    from hotcoco import COCO, COCOeval

    from detr.annotation_file import read_truth

    held = read_truth(annotations)
    unknown = np.setdiff1d(detections[:, 0], held.image_ids)
    if unknown.size:
        raise ValueError(f"detections are of image ids {unknown[:10].astype(int).tolist()}, not in {annotations}")
    truth = COCO.from_arrays(
        [
            {"id": image_id, "height": height, "width": width, "file_name": ""}
            for image_id, (height, width) in zip(held.image_ids.tolist(), held.sizes_hw.tolist(), strict=True)
        ],
        [{"id": k, "name": name} for k, name in zip(held.category_ids.tolist(), held.category_names, strict=True)],
        held.image_of,
        held.category_of,
        held.boxes_xywh,
        ids=np.arange(1, len(held.areas) + 1),
        area=held.areas,
        iscrowd=held.crowd.astype(np.int64),
    )
    return COCOeval(truth, truth.load_res(np.ascontiguousarray(detections, dtype=np.float64)), "bbox")


def evaluate_detections(annotations: Path, detections: np.ndarray) -> Any:
    """hotcoco's COCOeval of detections [n, 7], summarised. ValueError names images that the annotations lack."""
    judge = build_evaluator(annotations, detections)
    judge.evaluate()
    judge.accumulate()
    with contextlib.redirect_stdout(io.StringIO()):
        judge.summarize()
    return judge


def compute_coco_metrics(annotations: Path, detections: np.ndarray) -> dict[str, float]:
    """COCO's 12 bbox numbers (0..1, -1 where the data has no such object) of detections [n, 7]."""
    return read_metrics(evaluate_detections(annotations, detections))


def read_metrics(judge: Any) -> dict[str, float]:
    return dict(zip(METRICS, map(float, judge.stats), strict=True))


def read_precision(judge: Any) -> np.ndarray:
    """The precision array [10, 101, C, 4, 3], -1 where a category is absent.

    Over IoU thresholds 0.50:0.05:0.95, recall thresholds 0:0.01:1, categories, areas all/small/medium/large, and
    1/10/100 detections per image.
    """
    return np.asarray(judge.eval["precision"])


def average_per_class(precision: np.ndarray) -> list[tuple[float, ...]]:
    """PER_CLASS of each category, -1 where it has no such object, from the precision array."""

    def mean(values: np.ndarray) -> float:
        present = values[values > -1]
        return float(present.mean()) if present.size else -1.0

    return [
        (mean(precision[0, :, k, 0, 2]), *(mean(precision[:, :, k, area, 2]) for area in range(4)))
        for k in range(precision.shape[2])
    ]


def measure_errors(judge: Any) -> dict[str, tuple[float, int]]:
    """By what limits the AP: AP50 that would be gained (0..1) if all errors of the kind were mended, and their number.

    Source: Bolya et al., TIDE: A General Toolbox for Identifying Object Detection Errors, ECCV 2020; an error is a
    false positive, or an object that no detection explains.
    """
    found = judge.tide_errors()
    return {name: (float(found["delta_ap"][key]), int(found["counts"][key])) for key, name in LIMITS.items()}


def count_confusions(judge: Any) -> np.ndarray:
    """Counts [C+1, C+1] of true and, along columns, detected categories at IoU 0.50; the last is background.

    All detections count, those on crowds as of background: leave them out before.
    """
    return np.asarray(judge.confusion_matrix(iou_thr=0.5)["matrix"]).astype(np.int64)
