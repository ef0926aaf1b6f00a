"""Figures of an evaluation, as PNG files of the same bytes for the same numbers."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from detr.config import Key, check_keys
from pipelines.labels import draw_plainly, make_drawable

MAX_CURVES = 20


@dataclass(frozen=True)
class EvaluateParams:
    """The `evaluate` section of params.yaml."""

    num_pictures: Annotated[int, Key("pictures of the worst and as many of the best images", ge=0)]
    picture_threshold: Annotated[
        float,
        Key("lowest score that is drawn, and that counts in choosing worst and best and in the confusions", ge=0, le=1),
    ]
    confidence: Annotated[float, Key("level of the interval of AP", gt=0, lt=1)]
    num_resamples: Annotated[int, Key("random halves of the images that the interval is computed from", ge=1)]
    seed: Annotated[int, Key("random seed of those halves", ge=0)]

    def __post_init__(self) -> None:
        check_keys(self, "evaluate")


def save_figure(
    path: Path, size: tuple[float, float], paint: Callable[[Any, Any], None], names: Iterable[str] = ()
) -> None:
    """Writes what `paint(figure, axes)` draws, `size` in inches, with the letters of `names`."""
    os.environ["MPLBACKEND"] = "Agg"  # a notebook may have left one that is not here
    from matplotlib.figure import Figure

    with draw_plainly(names):
        figure = Figure(size, dpi=120)
        paint(figure, figure.subplots())
        figure.tight_layout()
        figure.savefig(path, metadata={"Software": None})


def draw_precision_recall(precision: np.ndarray, names: list[str], path: Path) -> None:
    """Precision over recall at IoU 0.50 for at most 20 categories, and the mean of all; `precision` is COCO's array."""

    def paint(figure: Any, axes: Any) -> None:
        shown = make_drawable(names)
        recall, curves = np.linspace(0, 1, precision.shape[1]), precision[0, :, :, 0, 2]  # [101, C]
        present = curves[0] > -1
        for k in np.flatnonzero(present)[:MAX_CURVES]:
            axes.plot(recall, curves[:, k], linewidth=1, label=f" {shown[k]}" if shown[k][0] == "_" else shown[k])
        if present.any():
            axes.plot(recall, curves[:, present].mean(axis=1), linewidth=2.5, color="black", label="mean")
            axes.legend(fontsize=7, ncols=2)
        axes.set(xlabel="recall", ylabel="precision", title="IoU 0.50", xlim=(0, 1), ylim=(0, 1.02))

    save_figure(path, (6, 4.5), paint, names)


def draw_limits(found: dict[str, tuple[float, int]], path: Path) -> None:
    """What each kind of error costs, as `detr.metrics.measure_errors` gives it."""

    def paint(figure: Any, axes: Any) -> None:
        bars = axes.barh(list(found), [100 * gain for gain, _ in found.values()], color="#4363d8")
        axes.bar_label(bars, [f"{100 * gain:.1f} ({count})" for gain, count in found.values()], padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set(xlabel="AP50 points to gain (number of errors)", title="What limits the AP")

    save_figure(path, (6.5, 3.2), paint)


def draw_confusion(counts: np.ndarray, names: list[str], path: Path) -> None:
    """Shares of each row of `detr.metrics.count_confusions`, with numbers where they can be read."""

    def paint(figure: Any, axes: Any) -> None:
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        ticks, size = range(len(counts)), max(3, 9 - len(counts) / 10)
        axes.set_xticks(ticks, [*make_drawable(names), "background"], rotation=90, fontsize=size)
        axes.set_yticks(ticks, [*make_drawable(names), "background"], fontsize=size)
        if len(counts) <= 25:
            for row, column in np.ndindex(*counts.shape):
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=size)
        axes.set(xlabel="detected", ylabel="true", title="IoU 0.50")

    side = min(12.0, 3.5 + 0.25 * len(counts))
    save_figure(path, (side, side), paint, names)
