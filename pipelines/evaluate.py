"""Stage 4: COCO's judgement of the trained model, and what limits it. `python -m pipelines.evaluate`"""

import csv
import io
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.io import write_png

from detr.bootstrap import IOU_THRESHOLDS, bootstrap_ap, find_interval, match_detections, rank_images
from detr.checkpoint import Category, load_model, write_atomically
from detr.coco import Annotations, CocoDataset, load_annotations
from detr.cost import count_gflops, count_parameters
from detr.detect import detect_all
from detr.distributed import join_process_group
from detr.images import open_images
from detr.metrics import (
    METRICS,
    PER_CLASS,
    average_per_class,
    count_confusions,
    evaluate_detections,
    measure_errors,
    read_metrics,
    read_precision,
    to_results,
)
from detr.transforms import EvalTransform, fit_size
from detr.visualize import beside_truth, draw_slots
from pipelines import figures, params
from pipelines.data.layout import DATA
from pipelines.figures import EvaluateParams
from pipelines.files import write_json
from pipelines.labels import ABSENT, make_drawable, picture_font, say_metric
from pipelines.progress import Progress
from pipelines.stage import command

MODEL_FOLDER = Path("artifacts/train")
OUTPUT = Path("artifacts/evaluate")
NUM_SIZES = 100  # of images whose multiply-adds are counted, as in the paper's table 1
NUM_SLOTS = 20  # of the queries whose boxes are shown, as in the paper's figure 7


def evaluate(config: EvaluateParams, data: Path, model_folder: Path, output: Path) -> None:
    """Writes `metrics.json`, `detections.json`, tables and `plots/` into `output`.

    Raises ValueError when the model's categories are not those of the validation images.
    """
    model, categories, size = load_model(model_folder)
    truth = data / "instances_val.json"
    annotations = load_annotations(truth)
    require_same(categories, annotations, model_folder, truth)
    dataset = CocoDataset(annotations, open_images(data / "val.zip"), EvalTransform(size.short, size.max_size))
    with join_process_group() as process, Progress(None, "evaluate", len(dataset), "image") as bar:
        layers = detect_all(model, dataset, size.size_multiple, process, bar.update, every_layer=True)
    if not process.is_main:
        return
    judges = [evaluate_detections(truth, detections) for detections in layers]
    metrics = read_metrics(judges[-1])
    resampled = bootstrap_ap([match_detections(truth, layers[-1])], config.num_resamples, config.seed)[0]
    ends = find_interval(resampled, config.confidence, len(dataset), lowest=0)
    metrics["AP_low"], metrics["AP_high"] = ends if metrics["AP"] != ABSENT else (ABSENT, ABSENT)
    metrics["parameters_millions"] = count_parameters(model) / 1e6
    if len(dataset):
        first = annotations.sizes_hw[:NUM_SIZES].tolist()
        metrics["gflops"] = count_gflops(model, [fit_size((h, w), size.short, size.max_size) for h, w in first])
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "detections.json", to_results(layers[-1]))
    write_json(output / "metrics.json", {name: round(value, 6) for name, value in metrics.items()})
    shown = layers[-1][layers[-1][:, 5] >= config.picture_threshold]
    matches = match_detections(truth, shown)
    on_crowds = matches.row[matches.ignored[:, 0]]
    errors = measure_errors(judges[-1])
    confusions = count_confusions(evaluate_detections(truth, np.delete(shown, on_crowds, axis=0)))
    write_tables(judges, annotations, errors, confusions, output)
    plots = output / "plots"
    shutil.rmtree(plots, ignore_errors=True)
    plots.mkdir()
    names = list(annotations.category_names)
    figures.draw_precision_recall(read_precision(judges[-1]), names, plots / "precision_recall.png")
    figures.draw_limits(errors, plots / "errors.png")
    figures.draw_confusion(confusions, names, plots / "confusion.png")
    draw_images(rank_images(matches), dataset, layers[-1], config, plots)
    print(", ".join(f"{name} {say_metric(value)}" for name, value in metrics.items()), flush=True)


def require_same(categories: list[Category], annotations: Annotations, model_folder: Path, truth: Path) -> None:
    """Raises ValueError that names differences when the model's categories are not those of the data."""
    pairs = zip(annotations.category_ids, annotations.category_names, strict=True)
    held = [Category(int(key), name) for key, name in pairs]
    if held != categories:
        different = sorted({c.name for c in held} ^ {c.name for c in categories}) or ["their ids"]
        raise ValueError(
            f"{model_folder} was trained on {len(categories)} categories, {truth} has {len(held)}; "
            f"they differ in {', '.join(different[:5])}: train again on this data"
        )


def write_tables(
    judges: list[Any],
    annotations: Annotations,
    errors: dict[str, tuple[float, int]],
    confusions: np.ndarray,
    output: Path,
) -> None:
    """Writes what `dvc plots` draws, of the judgements of every decoder layer; the last one is the model's."""
    precision, names = read_precision(judges[-1]), list(annotations.category_names)
    counts = np.bincount(annotations.labels, minlength=len(names)).tolist()
    per_class = zip(annotations.category_ids.tolist(), names, counts, average_per_class(precision), strict=True)
    write_table(
        output / "per_class.csv",
        ["category_id", "name", "num_objects", *PER_CLASS],
        (  # without any object the cells are empty, and so is the place of its bar
            [category_id, name, count, *(values if values[PER_CLASS.index("AP")] != ABSENT else [""] * len(values))]
            for category_id, name, count, values in per_class
        ),
    )
    write_table(
        output / "per_layer.csv",
        ["layer", *METRICS],
        ([number, *read_metrics(judge).values()] for number, judge in enumerate(judges, start=1)),
    )
    present = precision[0, 0, :, 0, 2] > -1
    curves: Any = precision[:, :, present, 0, 2].mean(axis=2) if present.any() else np.zeros(precision.shape[:2])
    write_table(
        output / "precision_recall.csv",
        ["recall", *(f"{iou:.2f}" for iou in IOU_THRESHOLDS)],
        ([recall / 100, *curves[:, recall].tolist()] for recall in range(curves.shape[1])),
    )
    write_table(
        output / "errors.csv",
        ["error", "AP50_to_gain", "count"],
        ([name, gain, count] for name, (gain, count) in errors.items()),
    )
    labels = [*names, "background"]
    pairs = ([labels[k], labels[j]] for k, j in np.ndindex(*confusions.shape) for _ in range(confusions[k, j]))
    write_table(output / "confusion.csv", ["actual", "detected"], pairs)


def draw_images(
    ranked: tuple[np.ndarray, np.ndarray],
    dataset: CocoDataset,
    detections: np.ndarray,
    config: EvaluateParams,
    folder: Path,
) -> None:
    """Writes the query slots' boxes and the worst and best images, as `rank_images` gives them."""
    record = dataset.annotations
    if len(dataset):
        boxes = slot_boxes(detections, record.sizes_hw)
        write_png(draw_slots(boxes, range(min(NUM_SLOTS, boxes.shape[1]))), str(folder / "slots.png"))
    names, font = make_drawable(record.category_names), picture_font(record.category_names)
    by_id = np.argsort(record.image_ids)
    for kind, indices in zip(("worst", "best"), ranked, strict=True):
        for number, index in enumerate(by_id[indices[: config.num_pictures]].tolist()):
            picture = beside_truth(dataset, detections, index, config.picture_threshold, names, font)
            write_png(picture, str(folder / f"{kind}_{number:02d}.png"))


def slot_boxes(detections: np.ndarray, sizes_hw: np.ndarray) -> torch.Tensor:
    """boxes_cxcywh [N, Q, 4] in fractions of each image, of detections [N Q, 7] in the order of images and queries."""
    boxes = torch.from_numpy(detections[:, 1:5].reshape(len(sizes_hw), -1, 4)).clone()
    boxes[..., :2] += boxes[..., 2:] / 2
    return boxes / torch.from_numpy(sizes_hw[:, [1, 0, 1, 0]])[:, None]


def write_table(path: Path, header: list[str], rows: Iterable[list[Any]]) -> None:
    """Writes a CSV file, whole or not at all; fractions with six digits."""
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(header)
    for row in rows:
        writer.writerow([f"{value:.6f}" if isinstance(value, float) else value for value in row])
    write_atomically(path, lambda file: file.write(table.getvalue().encode()))


def main() -> None:
    evaluate(params.load("evaluate", EvaluateParams), DATA, MODEL_FOLDER, OUTPUT)


if __name__ == "__main__":
    command(main)
