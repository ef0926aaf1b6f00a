"""What a training keeps and shows while it runs: the history, the resume state, the terminal, MLflow."""

import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.io import write_png

from detr.checkpoint import save_state
from detr.coco import CocoDataset
from detr.metrics import compute_coco_metrics
from detr.train import Report
from detr.train_config import TrainConfig
from detr.visualize import beside_truth
from pipelines.labels import make_drawable, picture_font, say_metric
from pipelines.progress import Progress
from pipelines.registry.mirror import Mirror
from pipelines.stage import explain

NUM_PICTURES = 4  # examples at each evaluation
PICTURE_THRESHOLD = 0.5  # score from which a detection is drawn on them


class Log:
    """What the main process keeps and shows of a training: history, timings, resume state, MLflow, a progress bar.

    Only `history` and `best`, the weights with the highest AP so far, are a pure function of code, parameters and data.
    """

    def __init__(
        self,
        folder: Path,
        state: dict[str, Any] | None,
        mirror: Mirror,
        config: TrainConfig,
        held_out: CocoDataset,
        truth: Path,
    ) -> None:
        self.folder, self.mirror, self.config, self.held_out, self.truth = folder, mirror, config, held_out, truth
        self.history: list[dict[str, float]] = state["history"] if state else []
        self.best: dict[str, Tensor] | None = state["best"] if state else None
        self.timing: dict[str, float] = {}
        self.bar: Progress | None = None
        self.save_at = time.monotonic() + 60 * config.checkpoint_minutes
        self.timings = folder / "timings.jsonl"
        if self.timings.exists():  # a kill may have torn its last line
            os.truncate(self.timings, self.timings.read_bytes().rfind(b"\n") + 1)

    def add(self, report: Report) -> None:
        """Takes in where training stands, and saves its state when it is time or an evaluation is next."""
        if self.bar is None:
            self.bar = Progress(None, "train", report.total_steps, "step")
        self.bar.update(report.step - self.bar.n)
        if report.row is not None:
            self.history.append(report.row)
            self._time(report)
        judged_next = report.epoch_done and not self.is_judged()
        if report.step and (judged_next or time.monotonic() >= self.save_at):
            self.save(report)
        if report.row is not None and not judged_next:
            self._publish(report)

    def _time(self, report: Report) -> None:
        if torch.cuda.is_available():
            memory = torch.cuda.max_memory_allocated()
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.timing = {
            "step": report.step,
            "images_per_second": round(report.images_per_second, 2),
            "data_wait": round(report.data_wait, 4),
            "memory_gb": round(memory / 1e9, 3),
        }
        if self.config.compile:
            self.timing["compiled_graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        with self.timings.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.timing) + "\n")

    def _publish(self, report: Report) -> None:
        row = self.history[-1]
        self.mirror.put(row | self.timing)
        speed = f"{self.timing['images_per_second']:.0f} images/s" if self.timing else ""
        assert self.bar is not None
        self.bar.set_postfix_str(f"loss {row['loss']:.3f}, {speed}", refresh=False)
        if not report.epoch_done:
            return
        parts = " ".join(f"{name} {row[f'loss_{name}']:.3f}" for name in ("class", "box", "giou"))
        said = [f"epoch {report.epoch + 1}/{self.config.epochs}: loss {row['loss']:.3f} {parts}"]
        if "AP" in row:
            said.append(f"AP {say_metric(row['AP'])} AP50 {say_metric(row['AP50'])}")
        if self.timing:
            left = (report.total_steps - report.step) * self.config.batch_size / self.timing["images_per_second"]
            said += [speed, f"{self.timing['data_wait']:.0%} waiting for data", f"{left / 60:.0f} min left"]
        if "compiled_graphs" in self.timing:
            said.append(f"{self.timing['compiled_graphs']} compiled graphs")
        self.bar.say(", ".join(said))

    def is_judged(self) -> bool:
        """Whether the end of the epoch that is the last of the history needs no evaluation any more."""
        row = self.history[-1]
        every = self.config.evaluate_epochs
        return "AP" in row or not every or (int(row["epoch"]) + 1) % every != 0

    def judge(self, report: Report, detections: np.ndarray) -> None:
        """Adds COCO's numbers to the last row of the history, and keeps pictures and the best weights."""
        highest = max((row["AP"] for row in self.history if "AP" in row), default=-math.inf)
        row = self.history[-1]
        row.update(compute_coco_metrics(self.truth, detections))
        if self.config.keep == "best" and row["AP"] > highest:
            self.best = {name: value.detach().cpu().clone() for name, value in report.model.state_dict().items()}
        names = self.held_out.annotations.category_names
        drawn, font = make_drawable(names), picture_font(names)
        for index in range(min(NUM_PICTURES, len(self.held_out))):
            path = self.folder / "pictures" / f"epoch_{report.epoch + 1:03d}_{index}.png"
            path.parent.mkdir(exist_ok=True)
            picture = beside_truth(self.held_out, detections, index, PICTURE_THRESHOLD, drawn, font)
            write_png(picture, str(path))
            self.mirror.put_picture(path)
        self._publish(report)

    def has_stalled(self) -> bool:
        """Whether AP has not risen for `train.patience` evaluations."""
        found = [row["AP"] for row in self.history if "AP" in row]
        return bool(self.config.patience) and len(found) - 1 - found.index(max(found)) >= self.config.patience

    def save(self, report: Report) -> None:
        """Writes the resume state; a disk that does not take it is a warning, and tried again later."""
        wait = 60 * self.config.checkpoint_minutes
        try:
            save_state(report.state() | {"history": self.history, "best": self.best}, self.folder / "state")
        except (OSError, RuntimeError) as error:  # torch.save's own error when a disk is full
            wait = min(wait, 60)
            reason = explain(error)
            print(f"warning: step {report.step} is not saved, it is tried again: {reason}", file=sys.stderr, flush=True)
        self.save_at = time.monotonic() + wait

    def stop(self, report: Report) -> None:
        self.save(report)
        print(
            f"stopped after step {report.step} of {report.total_steps}, as asked; the same command goes on", flush=True
        )
        self.close(mirror_seconds=1.0)  # what MLflow has not got by then, it gets when the training goes on

    def close(self, mirror_seconds: float = 10.0) -> None:
        if self.bar is not None:
            self.bar.close()
        self.mirror.close(mirror_seconds)
