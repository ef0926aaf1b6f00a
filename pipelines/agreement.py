"""What the sections of params.yaml have to do with each other, and with the files and variables that they need."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detr.model import ModelConfig
from detr.official import URLS
from detr.position import LearnedPosition
from detr.train_config import TrainConfig
from pipelines.data.shapes import CATEGORIES
from pipelines.download import DownloadParams
from pipelines.figures import EvaluateParams
from pipelines.params import find_nearest, from_document, read_yaml
from pipelines.register import RegisterParams
from pipelines.stage import command
from pipelines.validate import ValidateParams

KINDS: dict[str, type] = {
    "download": DownloadParams,
    "validate": ValidateParams,
    "model": ModelConfig,
    "train": TrainConfig,
    "evaluate": EvaluateParams,
    "register": RegisterParams,
}
OFFICIAL = {  # the architecture of all of the authors' weights
    "backbone_width": 1.0,
    "backbone_norm": "frozen",
    "position": "sine",
    "position_temperature": 10000.0,
    "hidden_dim": 256,
    "num_heads": 8,
    "dim_feedforward": 2048,
    "num_encoder_layers": 6,
    "num_decoder_layers": 6,
    "num_queries": 100,
    "pre_norm": False,
}


def read_sections(document: Any) -> dict[str, Any]:
    """Every section of params.yaml as its stage reads it. ValueError names the key, its value and what was expected."""
    return {name: from_document(document, name, kind) for name, kind in KINDS.items()}


def check(document: Any, root: Path = Path()) -> None:
    """`read_sections`, and what they have to do with each other, before anything is downloaded or trained."""
    sections = read_sections(document)
    for contradiction in find_contradictions(root, **sections):
        raise ValueError(contradiction)


def find_contradictions(
    root: Path,
    download: DownloadParams,
    validate: ValidateParams,
    model: ModelConfig,
    train: TrainConfig,
    evaluate: EvaluateParams,
    register: RegisterParams,
) -> Iterator[str]:
    """In words: the key, its value, what it does not go with, what to set."""
    yield from _too_few_images(download, train)
    yield from _too_many_processes(train)
    yield from _misfit_weights(root, model, train)
    side = -(-train.transform.max_size // train.size_multiple) * train.size_multiple
    reach = LearnedPosition(2).col_embed.num_embeddings * model.stride
    if model.position == "learned" and side > reach:
        yield (
            f"model.position is 'learned', which reaches {reach} pixels at model.stride {model.stride}, and "
            f"train.transform.max_size is {train.transform.max_size}; lower it, or set model.position to sine"
        )
    if download.source == "shapes":
        for name in register.protected:
            if name not in CATEGORIES.values():
                known = sorted(CATEGORIES.values())
                yield f"register.protected names {name!r}, no category of the drawn shapes{find_nearest(name, known)}"


def _too_few_images(download: DownloadParams, train: TrainConfig) -> Iterator[str]:
    counts = {"download.max_images": download.max_images}
    if download.source == "shapes":
        counts["download.shapes.num_train"] = download.shapes.num_train
    for key, count in counts.items():
        if 0 < count < train.batch_size:
            yield f"train.batch_size is {train.batch_size}, but {key} is {count}: lower the one or raise the other"


def _too_many_processes(train: TrainConfig) -> Iterator[str]:
    parts = train.batch_size // train.micro_batch
    wanted = os.environ.get("PET_NPROC_PER_NODE", "")
    if wanted.isdecimal() and int(wanted) > parts:
        yield (
            f"train.batch_size {train.batch_size} in micro-batches of {train.micro_batch} feeds {parts} processes, and "
            f"PET_NPROC_PER_NODE asks for {wanted}; lower that or train.micro_batch, or raise train.batch_size"
        )


def _misfit_weights(root: Path, model: ModelConfig, train: TrainConfig) -> Iterator[str]:
    start, backbone = train.initial_weights, model.backbone_weights
    if start in URLS:
        expected = OFFICIAL | {
            "backbone": "resnet101" if "r101" in start else "resnet50",
            "stride": 16 if "dc5" in start else 32,
        }
        if unlike := [f"model.{key}={value}" for key, value in expected.items() if getattr(model, key) != value]:
            yield f"train.initial_weights is {start!r}, which is another architecture; set {', '.join(unlike)}"
    elif start != "none" and not start.startswith(("http://", "https://")):
        if not (root / start).exists():
            yield f"train.initial_weights is {start!r}: no such file or folder, no URL, nor none or {', '.join(URLS)}"
        for name in ("config.json", "model.safetensors"):
            if (root / start).is_dir() and not (root / start / name).is_file():
                yield f"train.initial_weights is {start!r}, a folder that lacks {name}; give a copy of artifacts/train"
    if start != "none" or backbone == "none":
        return
    if backbone != "imagenet":
        if not (root / backbone).is_file():
            yield f"model.backbone_weights is {backbone!r}: no such file; give none, imagenet or a file"
        return
    unlike = ["model.backbone to resnet18, 34, 50 or 101"] * (model.backbone == "resnet10")
    unlike += ["model.backbone_width to 1.0"] * (model.backbone_width != 1)
    unlike += ["model.backbone_norm to frozen"] * (model.backbone_norm == "group")
    if unlike:
        yield f"model.backbone_weights is 'imagenet', of another backbone; set {', '.join(unlike)}, or it to none"


def find_oddities(document: Any) -> list[str]:
    """What is allowed and seldom meant, a sentence each. The document must have been checked."""
    model = from_document(document, "model", ModelConfig)
    train = from_document(document, "train", TrainConfig)
    found = []
    if train.schedule == "step" and train.lr_drop_epoch >= train.epochs:
        found.append(f"train.lr_drop_epoch is {train.lr_drop_epoch} of {train.epochs} epochs: the rate never drops")
    if model.backbone_norm == "frozen" and {model.backbone_weights, train.initial_weights} == {"none"}:
        found.append("model.backbone_norm is frozen without any weights: from random ones group learns better")
    download = from_document(document, "download", DownloadParams)
    images = download.shapes.num_train if download.source == "shapes" else download.max_images
    steps = images // train.batch_size * train.epochs
    if 0 < steps <= train.warmup_steps:
        found.append(f"train.warmup_steps is {train.warmup_steps} of {steps} steps: train.lr is never reached")
    return found


def main() -> None:
    read_sections(read_yaml(Path("params.yaml")))


if __name__ == "__main__":
    command(main)
