"""The paper's table 1 on this machine. `python -m pipelines table`"""

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchvision
from torch import nn

from detr.checkpoint import build_model
from detr.coco import CocoDataset, load_annotations
from detr.cost import count_gflops, count_multiply_adds, count_parameters, measure_seconds
from detr.detect import detect_all
from detr.distributed import join_process_group
from detr.images import open_images
from detr.metrics import compute_coco_metrics
from detr.model import ModelConfig, for_inference
from detr.official import COCO_CATEGORIES, URLS, load_official
from detr.transforms import EvalTransform
from pipelines import params
from pipelines.data.layout import DATA
from pipelines.figures import save_figure
from pipelines.files import write_json
from pipelines.progress import Progress
from pipelines.registry import aliases, tracking
from pipelines.registry.markdown import format_table as markdown

PICTURE = Path("scratch/table.png")
NUM_VAL = 5000  # images of COCO val2017
ROUNDS = range(3, 51)  # how often each model is timed: as often as BUDGET_SECONDS allow
BUDGET_SECONDS = 120


@dataclass(frozen=True)
class Figures:
    """What the table says of a model: parameters in millions, 10^9 multiply-adds, images per second, AP in points."""

    parameters: float
    gflops: float
    fps: float
    ap: float | None


PAPER = {  # table 1; FPS on a V100
    "Faster R-CNN-FPN": Figures(42, 180, 26, 40.2),
    "DETR": Figures(41, 86, 28, 42.0),
    "DETR-DC5": Figures(41, 187, 12, 43.3),
    "DETR-R101": Figures(60, 152, 20, 43.5),
    "DETR-DC5-R101": Figures(60, 253, 10, 44.9),
}
OFFICIAL = {"DETR": "detr-r50", "DETR-DC5": "detr-dc5-r50", "DETR-R101": "detr-r101", "DETR-DC5-R101": "detr-dc5-r101"}


def write_table(root: Path, quick: bool) -> str:
    """The table in Markdown, the paper's figures beside this machine's; its picture goes to scratch/table.png.

    Parameters, multiply-adds and speed are measured with random weights, which change none of them. AP is the best of
    a registered version of that architecture that was evaluated on COCO val2017, else that of the authors' weights
    where torch.hub's folder has them and data/coco is COCO's; `quick` computes none anew.
    """
    size_hw = (160, 213) if quick else (800, 1066)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours, notes = {}, []
    measured, rounds = measure(root, size_hw, 0 if quick else BUDGET_SECONDS, device)
    for name, figures in measured.items():
        ap, note = (
            find_accuracy(root, OFFICIAL[name], quick) if name in OFFICIAL else (None, "only its cost is measured")
        )
        ours[name] = replace(figures, ap=ap)
        notes.append(f"- AP of {name}: {note}")
    if any(ours[name].ap is None for name in OFFICIAL):
        notes.append(
            "- For an AP, train: python -m pipelines run --preset coco-detr-r50 (-dc5-r50, -r101, -dc5-r101); or fetch "
            f"the authors' weights from {URLS['detr-r50'].rpartition('/')[0]}/ ({', '.join(map(file_name, URLS))}) to "
            f"{Path(torch.hub.get_dir(), 'checkpoints')}, and have COCO val2017 in {DATA}."
        )
    draw(ours, root / PICTURE, name_device(device))
    header = ["model", "params (M)", "paper", "GFLOPs", "paper", "FPS", "paper", "AP", "paper"]
    rows = [header, *([name, *format_cells(ours[name], paper)] for name, paper in PAPER.items())]
    size = "{} x {}".format(*size_hw)
    here = f"{name_device(device)}, PyTorch {torch.__version__}, torchvision {torchvision.__version__}"
    facts = (
        f"- Here: {here}; FPS of one {size} image at a time, the median of {rounds}, with random weights.",
        f"- GFLOPs: multiply-adds of one {size} image; the paper's are the mean of the first 100 images of val2017, "
        "6 to 8% more than at 800 x 1066. The paper's FPS are of a V100.",
    )
    return "\n".join([markdown(rows), "", *facts, *notes, f"- Picture: {PICTURE}"])


def format_cells(ours: Figures, paper: Figures) -> list[str]:
    speed = f"{ours.fps:.1f}" if ours.fps >= 1 else f"{ours.fps:.2f}"
    ap = "-" if ours.ap is None else f"{ours.ap:.1f}"
    pairs = (
        (f"{ours.parameters:.1f}", f"{paper.parameters:.0f}"),
        (f"{ours.gflops:.1f}", f"{paper.gflops:.0f}"),
        (speed, f"{paper.fps:.0f}"),
        (ap, f"{paper.ap:.1f}"),
    )
    return [cell for pair in pairs for cell in pair]


def read_preset(root: Path, official: str) -> Any:
    """The parameters of the paper's model."""
    return params.merge_parameters(root, f"coco-{official}", [])


def measure(
    root: Path, size_hw: tuple[int, int], budget_seconds: float, device: torch.device
) -> tuple[dict[str, Figures], int]:
    """Cost of the models of PAPER, AP still None, and how often each was timed.

    They take turns, so that the machine's moods meet all alike; a first round warms up and says how many fit.
    """
    image = torch.zeros(3, *size_hw, device=device)
    with Progress(None, "table", (1 + ROUNDS[0]) * len(PAPER), "image") as bar:
        (rival,) = PAPER.keys() - OFFICIAL
        other = faster_rcnn(size_hw).to(device)
        runs: dict[str, Callable[[], object]] = {rival: lambda: other([image])}
        found = {rival: Figures(count_parameters(other) / 1e6, count_multiply_adds(runs[rival]) / 1e9, 0.0, None)}
        for name, official in OFFICIAL.items():
            config = params.from_document(read_preset(root, official), "model", ModelConfig)
            model = build_model(replace(config, backbone_weights="none"), len(COCO_CATEGORIES))
            ready = for_inference(model).to(device)
            runs[name] = lambda ready=ready: ready(image[None])  # type: ignore[misc]
            found[name] = Figures(count_parameters(model) / 1e6, count_gflops(model, [size_hw]), 0.0, None)

        def turn() -> dict[str, float]:
            times = {}
            for name, run in runs.items():
                times[name] = measure_seconds(run, device)
                bar.update(1)
            return times

        rounds = min(max(int(budget_seconds / sum(turn().values())), ROUNDS[0]), ROUNDS[-1])
        bar.total = (1 + rounds) * len(PAPER)
        times = [turn() for _ in range(rounds)]
    fps = {name: 1 / median(one[name] for one in times) for name in found}
    return {name: replace(figures, fps=fps[name]) for name, figures in found.items()}, rounds


def faster_rcnn(size_hw: tuple[int, int]) -> nn.Module:
    """torchvision's Faster R-CNN R50-FPN for COCO, with random weights, whose input size is `size_hw`."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None)  # norms frozen, as with its weights
    model = FasterRCNN(backbone, 91, min_size=min(size_hw), max_size=max(size_hw))
    return model.eval().requires_grad_(False)


def find_accuracy(root: Path, official: str, quick: bool) -> tuple[float | None, str]:
    """AP in points of the paper's model on COCO val2017, and where it comes from or why there is none."""
    found, why = find_registered(root, official)
    if found is not None:
        return 100 * found, why
    weights = find_official_weights(official)
    data = root / DATA
    if weights is None or not is_val2017(data):
        return None, why
    kept = root / "scratch" / "table" / f"{official}.json"
    key = {"weights": weights.name, "annotations": tracking.sha256(data / "instances_val.json")}
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    if {name: known.get(name) for name in key} != key:
        if quick:
            return None, f"{weights} is there; without --quick it is evaluated"
        known = key | {"AP": measure_official_ap(weights, data)}
        write_json(kept, known)
    return 100 * known["AP"], f"the authors' weights, {weights.name}, evaluated here"


def find_registered(root: Path, official: str) -> tuple[float | None, str]:
    """The best AP (0..1) of the registered versions of an architecture on COCO val2017, and of which or why of none."""
    if not tracking.is_there():
        return None, "nothing is registered yet"
    wanted = {
        key: str(value) for key, value in tracking.flatten({"model": read_preset(root, official)["model"]}).items()
    }
    best: tuple[float, str] | None = None
    try:
        with aliases.explain_errors("the search for an AP"):
            client = tracking.connect()
            for version in tracking.list_versions(client):
                logged = client.get_run(version.run_id or "").data.params
                ap = float(version.tags.get("AP", "-1"))
                same = all(logged.get(key) == value for key, value in wanted.items())
                if same and (best is None or ap > best[0]) and is_of_val2017(client, version.run_id or ""):
                    best = ap, f"models:/{tracking.MODEL}/{version.version}"
    except ValueError as error:
        return None, f"not known: {error}"
    return best or (None, "no registered version of this architecture was evaluated on COCO val2017")


def is_of_val2017(client: Any, run_id: str) -> bool:
    """Whether a run's validation images were those of COCO val2017, by their number and classes."""
    with tempfile.TemporaryDirectory() as folder:
        path = tracking.fetch_artifact(client, run_id, "validate/statistics.json", Path(folder))
        held: dict[str, Any] = (
            json.loads(path.read_text(encoding="utf-8"))["val"] if path else {"images": 0, "class": {}}
        )
    return held["images"] == NUM_VAL and set(held["class"]) == {category.name for category in COCO_CATEGORIES}


def is_val2017(data: Path) -> bool:
    """Whether the validation images in `data` are those of COCO val2017, by their number and categories."""
    if not (data / "instances_val.json").exists():
        return False
    held = load_annotations(data / "instances_val.json")
    pairs = list(zip(held.category_ids.tolist(), held.category_names, strict=True))
    return len(held.image_ids) == NUM_VAL and pairs == [(category.id, category.name) for category in COCO_CATEGORIES]


def file_name(official: str) -> str:
    return URLS[official].rpartition("/")[2]


def find_official_weights(official: str) -> Path | None:
    """The authors' file in torch.hub's folder, None where it is not there whole; its name ends with its digest."""
    path = Path(torch.hub.get_dir(), "checkpoints", file_name(official))
    if not path.is_file():
        return None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return path if digest.startswith(path.stem.rpartition("-")[2]) else None


def measure_official_ap(weights: Path, data: Path) -> float:
    """AP (0..1) of the authors' model on the validation images, at the authors' size."""
    model, _, size = load_official(weights)
    annotations = load_annotations(data / "instances_val.json")
    dataset = CocoDataset(annotations, open_images(data / "val.zip"), EvalTransform(size.short, size.max_size))
    with join_process_group() as process, Progress(None, weights.stem, len(dataset), "image") as bar:
        detections = detect_all(model, dataset, size.size_multiple, process, bar.update)
    return compute_coco_metrics(data / "instances_val.json", detections[-1])["AP"]


def name_device(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def draw(ours: dict[str, Figures], path: Path, where: str) -> None:
    """Multiply-adds and images per second against AP. Where AP is not known here a hollow mark has the paper's."""

    def paint(figure: Any, axes: Any) -> None:
        axes.remove()
        for side, (key, label) in zip(
            figure.subplots(1, 2, sharey=True),
            (("gflops", "GFLOPs of an image"), ("fps", "images per second, one at a time")),
            strict=True,
        ):
            side.scatter([getattr(p, key) for p in PAPER.values()], [p.ap for p in PAPER.values()], c="#999999")
            for name, paper in PAPER.items():
                place = (getattr(paper, key), paper.ap)
                side.annotate(name, place, (-4, 5), textcoords="offset points", ha="right", fontsize=7)
                own = ours[name]
                face = "none" if own.ap is None else "#4363d8"
                height = paper.ap if own.ap is None else own.ap
                side.scatter([getattr(own, key)], [height], marker="D", facecolors=face, edgecolors="#4363d8")
            side.set(xlabel=label, xscale="log")
            side.margins(0.15)
        figure.axes[0].set_ylabel("AP on COCO val2017")
        figure.suptitle(f"grey: the paper; blue: {where} (hollow: its cost at the paper's AP)", fontsize=8)

    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(path, (10, 4), paint)
