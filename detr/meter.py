"""What the steps of a training measure, until a row of it is reported."""

import math
import time
from collections.abc import Iterator
from itertools import islice

from detr.batch import Batch
from detr.model import DETR
from detr.train_config import TrainConfig

PER_LAYER = ("loss_class", "loss_box", "loss_giou", "cardinality_error")


def name_measures(model: DETR, config: TrainConfig) -> list[str]:
    """Names what a step measures, in order: parts of the last decoder layer plainly, those of the others by layer."""
    layers = model.config.num_decoder_layers if config.loss.auxiliary else 1
    suffixes = [*(f"_layer{layer}" for layer in range(layers - 1)), ""]
    parts = [part + suffix for part in PER_LAYER for suffix in suffixes]
    return ["pixels", "padded_pixels", "loss", *parts, "class_error", "grad_norm"]


class Meter:
    """Sums over the steps since the last row, of what `names` says, and the time that they took.

    Sums are a function of parameters, code and data; times are not. `sums` and `count` are those of a resumed training.
    """

    def __init__(self, names: list[str], sums: dict[str, float], count: int) -> None:
        self.names, self.sums, self.count = names, sums, count
        self.reset_times()

    def reset_times(self) -> None:
        self.busy_seconds = self.waited_seconds = 0.0
        self.timed_steps = 0

    def reset(self) -> None:
        """Begins a new row."""
        self.sums, self.count = {}, 0
        self.reset_times()

    def add(self, measured: dict[str, float]) -> None:
        """Counts a step. One without targets has no class error, and does not count in its mean."""
        judged = not math.isnan(measured["class_error"])
        step = measured | {"judged": float(judged)} | ({} if judged else {"class_error": 0.0})
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in step.items()}
        self.count += 1

    def average(self) -> dict[str, float]:
        """Returns the mean of each measure over the steps that counted, NaN if none did."""
        sums = self.sums or dict.fromkeys((*self.names, "judged"), math.nan)
        hidden = ("pixels", "padded_pixels", "judged")
        means = {name: value / max(self.count, 1) for name, value in sums.items() if name not in hidden}
        means["class_error"] = sums["class_error"] / sums["judged"] if sums["judged"] else math.nan
        return means | {"padding_ratio": sums["padded_pixels"] / sums["pixels"]}

    def start_clock(self) -> None:
        self.started = time.perf_counter()

    def stop_clock(self) -> None:
        """Adds the time since `start_clock` as that of one step."""
        self.busy_seconds += time.perf_counter() - self.started
        self.timed_steps += 1

    def take(self, source: Iterator[Batch], count: int) -> list[Batch]:
        """The next `count` batches, fewer at the end; the time is counted as spent waiting for the loader."""
        asked = time.perf_counter()
        batches = list(islice(source, count))
        self.waited_seconds += time.perf_counter() - asked
        return batches
