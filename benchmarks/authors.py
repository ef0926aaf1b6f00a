"""The authors' code, a peer to measure against, in a folder apart: python benchmarks/authors.py installs it.

Also what the measurements beside it share: interleaved timing and the report.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parent.parent
FOLDER = Path(os.environ.get("DETR_AUTHORS", ROOT / "scratch" / "authors"))
PACKAGE = "detr==0.1.4"
VARIANTS = {  # backbone, dilation
    "detr-r50": ("resnet50", False),
    "detr-dc5-r50": ("resnet50", True),
    "detr-r101": ("resnet101", False),
    "detr-dc5-r101": ("resnet101", True),
}
sys.path.insert(0, str(ROOT))


def install() -> None:
    """Puts the package into FOLDER, without its dependencies, unless it is there."""
    if not (FOLDER / "models").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(FOLDER), PACKAGE]
        subprocess.run(command, check=True, stdout=sys.stderr)


@contextlib.contextmanager
def importable() -> Iterator[None]:
    """Within it the authors' top-level packages `models`, `datasets`, `util` import under this torchvision."""
    import torchvision

    version = torchvision.__version__
    torchvision.__version__ = "0.9"  # they read its first three characters as a number
    sys.path.insert(0, str(FOLDER))
    try:
        yield
    finally:
        sys.path.remove(str(FOLDER))
        torchvision.__version__ = version


def build(variant: str, dropout: float) -> SimpleNamespace:
    """The authors' `model`, `criterion` and `postprocess` with random weights; every loss weighted as in the paper."""
    with importable(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import models.backbone

        models.backbone.is_main_process = lambda: False  # no download of the backbone
        backbone, dilation = VARIANTS[variant]
        settings = {
            "dataset_file": "coco", "device": "cpu", "lr_backbone": 1e-5, "masks": False, "frozen_weights": None,
            "backbone": backbone, "dilation": dilation, "position_embedding": "sine", "hidden_dim": 256,
            "dropout": dropout, "nheads": 8, "dim_feedforward": 2048, "enc_layers": 6,
            "dec_layers": 6, "pre_norm": False, "num_queries": 100, "aux_loss": True, "set_cost_class": 1,
            "set_cost_bbox": 5, "set_cost_giou": 2, "bbox_loss_coef": 5, "giou_loss_coef": 2, "eos_coef": 0.1,
        }  # fmt: skip
        model, criterion, postprocessors = models.build_model(argparse.Namespace(**settings))
    return SimpleNamespace(model=model, criterion=criterion, postprocess=postprocessors["bbox"])


def paper_model(variant: str, theirs: Any = None, **changes: Any) -> Any:
    """This project's model of the preset with `changes` of its configuration, and the weights of the authors' model."""
    from detr.backbone import freeze_stem
    from detr.model import DETR, ModelConfig
    from pipelines.params import from_document, merge_parameters

    config = from_document(merge_parameters(ROOT, f"coco-{variant}", []), "model", ModelConfig)
    model = DETR(replace(config, **changes), 91)
    freeze_stem(model.backbone)
    if theirs is not None:
        state = theirs.state_dict()
        model.load_state_dict({name.replace("backbone.0.body.", "backbone.", 1): state[name] for name in state})
    return model


def nested(images: Any, padding: Any) -> Any:
    """A batch as the authors' model takes it."""
    with importable():
        from util.misc import NestedTensor
    return NestedTensor(images, padding)


def interleaved(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each side, called in turn `rounds` times after one call to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(benchmark: str, rows: list[tuple[str, float, float]], unit: str, figures: dict[str, Any]) -> None:
    """Prints a table of (what, authors', ours) and the closing line of JSON; `ratios.authors` is by row."""
    print(f"{'':44}{'authors':>12}{'ours':>12}{'ratio':>9}")
    for what, theirs, ours in rows:
        print(f"{what:44}{theirs:>10.4g} {unit}{ours:>10.4g} {unit}{theirs / ours:>8.2f}x")
    ratios = {what: round(theirs / ours, 3) for what, theirs, ours in rows}
    print(json.dumps({"benchmark": benchmark, "ratios": {"authors": ratios}, "figures": figures}))


if __name__ == "__main__":
    install()
