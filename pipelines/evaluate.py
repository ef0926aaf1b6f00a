"""Stage 4: COCO's judgement of the trained model. `python -m pipelines.evaluate`"""

import csv
import io
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchvision.io import write_png

from detr.checkpoint import Category, load_model, write_atomically
from detr.coco import CocoDataset, load_annotations
from detr.distributed import process_group
from detr.evaluate import ap_per_class, coco_metrics, detect_all
from detr.images import open_images
from detr.transforms import EvalTransform
from detr.visualize import beside_truth
from pipelines import params
from pipelines.stage import DATA, Progress, command, write_json

MODEL_FOLDER = Path("artifacts/train")
OUTPUT = Path("artifacts/evaluate")


@dataclass(frozen=True)
class EvaluateParams:
    """The `evaluate` section of params.yaml."""

    batch_size: int
    num_pictures: int  # of predictions beside the ground truth
    picture_threshold: float  # score from which a detection is drawn

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.num_pictures < 0 or not 0 <= self.picture_threshold <= 1:
            raise ValueError(
                "evaluate: batch_size must be at least 1, num_pictures 0 or more, picture_threshold in 0..1"
            )


def evaluate(config: EvaluateParams, data: Path, model_folder: Path, output: Path) -> None:
    """Writes `metrics.json`, `per_class.csv`, `detections.json` and `plots/` into `output`.

    Raises ValueError when the model's categories are not those of the validation images.
    """
    model, categories, size = load_model(model_folder)
    annotations = load_annotations(data / "instances_val.json")
    held = [
        Category(int(key), name) for key, name in zip(annotations.category_ids, annotations.category_names, strict=True)
    ]
    if held != categories:
        different = sorted({c.name for c in held} ^ {c.name for c in categories}) or ["their ids"]
        raise ValueError(
            f"{model_folder} was trained on {len(categories)} categories, {data}/instances_val.json has {len(held)}; "
            f"they differ in {', '.join(different[:5])}: train again on this data"
        )
    dataset = CocoDataset(annotations, open_images(data / "val.zip"), EvalTransform(size.short, size.max_size))
    with process_group() as process, Progress(None, "evaluate", len(dataset), "image") as bar:
        detections = detect_all(model, dataset, config.batch_size, size.size_multiple, process, bar.update)
    metrics, precision = coco_metrics(data / "instances_val.json", detections)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "detections.json", detections)
    write_json(output / "metrics.json", {name: round(value, 6) for name, value in metrics.items()})
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["category_id", "name", "AP", "AP50"])
    for category, (ap, ap50) in zip(categories, ap_per_class(precision), strict=True):
        writer.writerow([category.id, category.name, f"{ap:.6f}", f"{ap50:.6f}"])
    write_atomically(output / "per_class.csv", lambda file: file.write(table.getvalue().encode()))
    plots = output / "plots"
    shutil.rmtree(plots, ignore_errors=True)
    plots.mkdir()
    _plot_precision_recall(precision, [category.name for category in categories], plots / "precision_recall.png")
    for index in range(min(config.num_pictures, len(dataset))):
        picture = beside_truth(dataset, detections, index, config.picture_threshold)
        write_png(picture, str(plots / f"detections_{index:02d}.png"))
    print(", ".join(f"{name} {value:.3f}" for name, value in metrics.items()), flush=True)


def _plot_precision_recall(precision: np.ndarray, names: list[str], path: Path) -> None:
    """Precision over recall at IoU 0.50 for every category, at most 20 of them, and their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    recall = np.linspace(0, 1, precision.shape[1])
    curves = precision[0, :, :, 0, 2]  # [101, C]
    present = curves[0] > -1
    figure, axes = plt.subplots(figsize=(6, 4.5), dpi=120)
    for k in np.flatnonzero(present)[:20]:
        axes.plot(recall, curves[:, k], linewidth=1, label=names[k])
    if present.any():
        axes.plot(recall, curves[:, present].mean(axis=1), linewidth=2.5, color="black", label="mean")
    axes.set(xlabel="recall", ylabel="precision", title="IoU 0.50", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    evaluate(params.load("evaluate", EvaluateParams), DATA, MODEL_FOLDER, OUTPUT)


if __name__ == "__main__":
    command(main)
