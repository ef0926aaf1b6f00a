"""Small projects to run in, and what they are made of: parameters, drawn data, trained models without a training."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import cache_from_source
from pathlib import Path

import numpy as np
import torch

from detr.checkpoint import Category, InputSize, save_model
from detr.loss import LossConfig
from detr.matcher import MatcherConfig
from detr.metrics import compute_coco_metrics, from_results
from detr.model import DETR, ModelConfig
from detr.train_config import TrainConfig
from detr.transforms import TransformConfig
from pipelines.data.rules import ValidateParams
from pipelines.data.shapes import ShapesParams
from pipelines.params import from_document, merge_parameters, read_yaml, to_yaml
from pipelines.registry.database import relocate
from tests.running import ROOT, call

TINY = [
    "download.shapes.num_train=48",
    "download.shapes.num_val=16",
    "model.hidden_dim=32",
    "model.num_heads=4",
    "model.dim_feedforward=64",
    "model.num_encoder_layers=1",
    "train.epochs=2",
    "train.batch_size=8",
    "train.micro_batch=4",
    "train.log_steps=2",
    "train.evaluate_epochs=1",
    "train.warmup_steps=2",
    "train.checkpoint_minutes=0.0",
    "evaluate.num_pictures=2",
]
TINY_MODEL = ModelConfig(
    backbone="resnet10",
    backbone_width=0.25,
    backbone_norm="group",
    backbone_weights="none",
    stride=32,
    position="sine",
    position_temperature=20.0,
    hidden_dim=32,
    num_heads=4,
    dim_feedforward=64,
    num_encoder_layers=1,
    num_decoder_layers=2,
    num_queries=5,
    dropout=0.0,
    attention_dropout=0.0,
    pre_norm=False,
)
TINY_TRAIN = TrainConfig(
    seed=0,
    initial_weights="none",
    epochs=3,
    batch_size=8,
    micro_batch=4,
    group_window=0,
    lr=1e-3,
    lr_backbone=1e-4,
    weight_decay=1e-4,
    schedule="cosine",
    lr_drop_epoch=0,
    warmup_steps=2,
    clip_norm=0.1,
    ema_decay=0.0,
    precision="float32",
    compile=False,
    deterministic=False,
    size_multiple=32,
    log_steps=2,
    evaluate_epochs=0,
    patience=0,
    keep="last",
    max_skipped=0,
    checkpoint_minutes=0.0,
    matcher=MatcherConfig(1.0, 5.0, 2.0),
    loss=LossConfig(1.0, 5.0, 2.0, 0.1, auxiliary=True),
    transform=TransformConfig((64,), 96, flip=0.5, crop=0.0, crop_scales=(), crop_range=(0, 0)),
)
SHAPES = ShapesParams(
    seed=3,
    num_train=24,
    num_val=12,
    image_size=96,
    max_objects=3,
    min_object_size=20,
    max_object_size=60,
    empty_share=0.1,
    crowd_share=0.2,
)


def validate_params(tolerated: int | None = None, **changes: object) -> ValidateParams:
    """The parameters of params.yaml, with one number tolerated of every rule and other changes."""
    params = from_document(merge_parameters(ROOT, None, []), "validate", ValidateParams)
    if tolerated is not None:
        params = replace(params, tolerated=dict.fromkeys(params.tolerated, tolerated))
    return replace(params, **changes)


def small_project(folder: Path, *overrides: str) -> Path:
    """A committed copy of the project's files with a small dataset and model as its params.yaml."""
    _copy_project(folder, overrides)
    commit(folder, "start", "--all")
    return folder


def quick_project(folder: Path, *overrides: str) -> Path:
    """A small project with quick stages (tests/quick.py) in the place of the real ones, in the same graph."""
    _copy_project(folder, overrides)
    shutil.copy(Path(__file__).with_name("quick.py"), folder)
    graph = read_yaml(folder / "dvc.yaml")
    for name, stage in graph["stages"].items():
        stage["cmd"] = f"python quick.py {name}"
        made = [dep for dep in stage["deps"] if dep.startswith(("data/", "artifacts/"))]
        stage["deps"] = ["quick.py", *made]
    graph.pop("plots")  # of tables that the quick stages do not make
    (folder / "dvc.yaml").write_text(to_yaml(graph), encoding="utf-8")
    commit(folder, "start", "--all")
    return folder


def _copy_project(folder: Path, overrides: Sequence[str]) -> None:
    listed = call(ROOT, "git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    for name in listed:
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
            compiled = Path(cache_from_source(ROOT / name))
            if name.endswith(".py") and compiled.exists():  # it is of these times, too
                (folder / name).parent.joinpath("__pycache__").mkdir(exist_ok=True)
                shutil.copy2(compiled, cache_from_source(folder / name))
    (folder / "dvc.lock").unlink(missing_ok=True)
    (folder / "params.yaml").write_text(to_yaml(merge_parameters(ROOT, None, [*TINY, *overrides])), encoding="utf-8")
    call(folder, "git", "init", "--quiet", "--initial-branch=main")


def commit(folder: Path, message: str, *files: str) -> str:
    """The short name of a commit of these files."""
    call(folder, "git", "add", *files)
    author = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    call(folder, "git", *author, "commit", "--quiet", "-m", message)
    return call(folder, "git", "rev-parse", "--short", "HEAD").strip()


def reference(folder: Path) -> Path:
    """A small project after one `dvc repro`, its dvc.lock not committed: a copy in `folder` to work in.

    It is made once for all tests of the same code and parameters, and kept in scratch/ for the next session.
    """
    kept = ROOT / "scratch" / "tests"
    kept.mkdir(parents=True, exist_ok=True)
    place = kept / f"reference-{_digest()}"
    with (kept / "lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            for old in kept.glob("reference-*"):
                shutil.rmtree(old)
            made = small_project(kept / "reference-.partial")
            call(made, "dvc", "repro")
            made.rename(place)
            relocate(place / "mlflow.db")
        shutil.copytree(place, folder, symlinks=True, dirs_exist_ok=True, copy_function=_Linked())
    relocate(folder / "mlflow.db")
    return folder


class _Linked:
    """Copies files; those that are one file there are one file here, as DVC's cache and the working tree are."""

    def __init__(self) -> None:
        self.copied: dict[int, str] = {}

    def __call__(self, source: str, target: str) -> None:
        found = os.stat(source, follow_symlinks=False)
        if found.st_nlink > 1 and found.st_ino in self.copied:
            os.link(self.copied[found.st_ino], target)
            return
        shutil.copy2(source, target, follow_symlinks=False)
        self.copied[found.st_ino] = target


def _digest() -> str:
    """Of all that a reference project is made of."""
    total = hashlib.sha256(json.dumps(TINY).encode())
    for name in sorted(call(ROOT, "git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines()):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            total.update(name.encode() + (ROOT / name).read_bytes())
    return total.hexdigest()[:16]


def detections_like(annotations: Path, shift: float, seed: int = 0, lost: str | None = None) -> list[dict]:
    """COCO detections made from the truth: boxes shifted by normal `shift` pixels, none of the category `lost`."""
    rng = np.random.default_rng(seed)
    document = json.loads(annotations.read_text(encoding="utf-8"))
    names = {category["id"]: category["name"] for category in document["categories"]}
    return [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": [round(value + float(rng.normal(0, shift)), 2) for value in a["bbox"]],
            "score": round(float(rng.uniform(0.5, 1)), 6),
        }
        for a in document["annotations"]
        if not a["iscrowd"] and names[a["category_id"]] != lost
    ]


def trained_project(folder: Path, data: Path, mark: str, detections: list[dict], **register: object) -> Path:
    """What the register stage reads, of a small untrained model with its own weights and the given detections."""
    document = merge_parameters(ROOT, None, TINY)
    document["register"] |= register
    for name in ("validate/dataset", "evaluate/plots", "train"):
        (folder / "artifacts" / name).mkdir(parents=True)
    (folder / "params.yaml").write_text(to_yaml(document), encoding="utf-8")
    (folder / "dvc.lock").write_text("stages: {}\n", encoding="utf-8")
    shutil.copytree(data, folder / "data/coco")
    report = [{"outcome": outcome} for outcome in ("holds", "holds", "warning")]
    categories = json.loads((data / "instances_val.json").read_text(encoding="utf-8"))["categories"]
    metrics = compute_coco_metrics(data / "instances_val.json", from_results(detections))
    rows = {
        "validate/passed.json": {"data": "0123"},
        "validate/report.json": report,
        "validate/statistics.json": {},
        "evaluate/detections.json": detections,
        "evaluate/metrics.json": metrics | {"AP_low": 0.0, "AP_high": 1.0},
    }
    for name, content in rows.items():
        (folder / "artifacts" / name).write_text(json.dumps(content), encoding="utf-8")
    table = [f"{c['id']},{c['name']},0.25" for c in categories]
    (folder / "artifacts/evaluate/per_class.csv").write_text(
        "\n".join(["category_id,name,AP", *table, ""]), encoding="utf-8"
    )
    torch.manual_seed(int(hashlib.sha256(mark.encode()).hexdigest()[:8], 16))
    labels = [Category(c["id"], c["name"]) for c in categories]
    save_model(DETR(TINY_MODEL, len(labels)), labels, InputSize(96, 96, 1), mark, folder / "artifacts/train")
    (folder / "artifacts/train/history.jsonl").write_text(
        '{"step": 2, "loss": 1.5}\n{"step": 4, "loss": 1.25}\n', encoding="utf-8"
    )
    (folder / "scratch" / mark).mkdir(parents=True)
    timings = [json.dumps({"step": step, "images_per_second": 4.0}) for step in (2, 4)]
    (folder / "scratch" / mark / "timings.jsonl").write_text("\n".join([*timings, ""]), encoding="utf-8")
    return folder
