"""A training step beside the authors' code: python benchmarks/train_step.py [--quick] [--variant detr-dc5-r50]

Forward, matching, loss, backward, clipping and AdamW on one batch of 800x1066, dropout as in the paper. On a CPU both
in float32; on a GPU the authors' in float32, ours in bfloat16 autocast. Peak memory is that of a process of its own
for each side, beyond what it holds before the model is built.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from authors import build, install, interleaved, nested, paper_model, report

from detr.batch import Targets
from detr.loss import LossConfig, set_loss
from detr.matcher import MatcherConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MATCHER, LOSS = MatcherConfig(1.0, 5.0, 2.0), LossConfig(1.0, 5.0, 2.0, 0.1, auxiliary=True)
CLIP_NORM, LR, LR_BACKBONE, WEIGHT_DECAY = 0.1, 1e-4, 1e-5, 1e-4
BOXES_PER_IMAGE = 7  # COCO's mean


class Clock:
    """Seconds spent between marks, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.last = 0.0

    def mark(self, name: str | None) -> None:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if name is not None:
            self.seconds[name].append(now - self.last)
        self.last = now


def optimizer_of(model: torch.nn.Module, fused: bool) -> torch.optim.Optimizer:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in trained if "backbone" not in name]},
        {"params": [p for name, p in trained if "backbone" in name], "lr": LR_BACKBONE},
    ]
    return torch.optim.AdamW(groups, lr=LR, weight_decay=WEIGHT_DECAY, fused=fused)


def batch_of(size: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor, Targets]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, height, width, generator=generator)
    padding = torch.zeros(size, height, width, dtype=torch.bool)
    padding[1:, :, int(0.9 * width) :] = True
    images.masked_fill_(padding[:, None], 0.0)
    boxes = [0.3 + 0.4 * torch.rand(BOXES_PER_IMAGE, 4, generator=generator) for _ in range(size)]
    labels = [torch.randint(91, (BOXES_PER_IMAGE,), generator=generator) for _ in range(size)]
    targets = Targets.join([box.to(DEVICE) for box in boxes], [label.to(DEVICE) for label in labels])
    return images.to(DEVICE), padding.to(DEVICE), targets


def step_of(side: str, variant: str, batch: Any, dropout: float, attention_dropout: float, clock: Clock) -> Callable:
    """One training step of `side` ("authors" or "ours") as a function, with its model and optimizer inside."""
    images, padding, targets = batch
    torch.manual_seed(0)
    if side == "authors":
        peer = build(variant, dropout)
        model, criterion = peer.model.to(DEVICE).train(), peer.criterion.to(DEVICE)
        counts = list(targets.counts)
        pairs = zip(targets.boxes_cxcywh.split(counts), targets.labels.split(counts), strict=True)
        goals = [{"boxes": boxes, "labels": labels} for boxes, labels in pairs]

        def forward() -> Any:
            return model(nested(images, padding))

        def loss_of(outputs: Any) -> torch.Tensor:
            losses = criterion(outputs, goals)
            total: torch.Tensor = sum(losses[name] * weight for name, weight in criterion.weight_dict.items())
            return total

    else:
        model = paper_model(variant, dropout=dropout, attention_dropout=attention_dropout)
        model = model.to(DEVICE).train().to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
        num_boxes = torch.tensor(float(sum(targets.counts)), device=DEVICE)

        def forward() -> Any:
            with torch.autocast("cuda", torch.bfloat16) if DEVICE.type == "cuda" else nullcontext():
                return model(images, padding)

        def loss_of(outputs: Any) -> torch.Tensor:
            logits, boxes = outputs
            return set_loss(logits, boxes, targets, num_boxes, MATCHER, LOSS)[0]

    optimizer = optimizer_of(model, fused=side == "ours")

    def step() -> None:
        clock.mark(None)
        outputs = forward()
        clock.mark("forward")
        loss = loss_of(outputs)
        clock.mark("matcher and loss")
        optimizer.zero_grad()
        loss.backward()
        clock.mark("backward")
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        clock.mark("optimizer")

    return step


def peak_megabytes(side: str, attention_dropout: float, arguments: argparse.Namespace) -> float:
    """Of two steps in a process of its own."""
    command = [sys.executable, __file__, "--memory", side, "--attention-dropout", str(attention_dropout)]
    command += [
        "--variant",
        arguments.variant,
        "--batch",
        str(arguments.batch),
        *(["--quick"] if arguments.quick else []),
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def resident_megabytes(key: str) -> float:
    """VmRSS (now) or VmHWM (the highest so far) of this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def measure_memory(side: str, arguments: argparse.Namespace, batch: Any) -> float:
    before = resident_megabytes("VmRSS")
    step = step_of(side, arguments.variant, batch, 0.1, arguments.attention_dropout, Clock())
    step()
    step()
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resident_megabytes("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: small images, one round")
    parser.add_argument("--variant", default="detr-r50")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", choices=("authors", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--attention-dropout", type=float, default=0.1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    install()
    height, width = (128, 160) if arguments.quick else (800, 1066)
    batch = batch_of(arguments.batch, height, width)
    if arguments.memory:
        print(measure_memory(arguments.memory, arguments, batch))
        return
    settings = {"authors": ("authors", 0.1), "ours": ("ours", 0.1), "ours, no attention dropout": ("ours", 0.0)}
    clocks = {name: Clock() for name in settings}
    sides = {
        name: step_of(side, arguments.variant, batch, 0.1, attention_dropout, clocks[name])
        for name, (side, attention_dropout) in settings.items()
    }
    seconds = interleaved(sides, 1 if arguments.quick else arguments.rounds)
    rows = [("step", 1000 * seconds["authors"], 1000 * seconds["ours"])]
    rows.append(
        ("step without attention dropout", 1000 * seconds["authors"], 1000 * seconds["ours, no attention dropout"])
    )
    for part in clocks["ours"].seconds:
        theirs, ours = (1000 * statistics.median(clocks[side].seconds[part][1:]) for side in ("authors", "ours"))
        rows.append((part, theirs, ours))
    memory = {"authors": peak_megabytes("authors", 0.1, arguments)}
    memory |= {f"attention dropout {rate}": peak_megabytes("ours", rate, arguments) for rate in (0.1, 0.0)}
    rows += [(f"peak MB, {name}", memory["authors"], value) for name, value in memory.items() if name != "authors"]
    figures = {
        "variant": arguments.variant,
        "batch": arguments.batch,
        "size_hw": [height, width],
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "images per second": {name: round(arguments.batch / value, 3) for name, value in seconds.items()},
        "peak megabytes": memory,
    }
    report("train_step", rows, "", figures)


if __name__ == "__main__":
    main()
