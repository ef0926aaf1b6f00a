"""One step of a training. B images of a micro-batch, L decoder layers.

A step is one global batch of `train.batch_size` images, in micro-batches of `train.micro_batch`: images that are padded
and pass through the model together. They are dealt out to the processes, and their gradients, already divided by the
totals of the global batch, are added. So the number of processes changes who computes what, and nothing else.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from detr.batch import Batch, normalize
from detr.diagnosis import build_not_finite_error, explain_memory, find_first_non_finite, join_ids
from detr.distributed import Process
from detr.loss import count_totals, set_loss
from detr.meter import PER_LAYER, Meter
from detr.model import DETR
from detr.optimizer import FlatGradient, learning_rate_factor, set_learning_rates
from detr.train_config import TrainConfig


@dataclass
class Training:
    """A training under way: what its steps need, and what they change."""

    model: DETR
    runner: Callable[..., tuple[Tensor, Tensor]]  # the model, compiled or as it is
    optimizer: torch.optim.AdamW
    gradient: FlatGradient
    average: AveragedModel | None
    config: TrainConfig
    process: Process
    meter: Meter
    pixels: Tensor  # memory for normalised images
    steps_per_epoch: int
    step: int  # the number of steps taken
    skipped: int  # how many of them were left out

    def state(self) -> dict[str, Any]:
        """All that an exact resume needs."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "step": self.step,
            "sums": self.meter.sums,
            "since": self.meter.count,
            "skipped": self.skipped,
            "num_processes": self.process.num_processes,
        }


def compute_gradients(training: Training, batches: list[Batch], asked: bool) -> tuple[Tensor, str]:
    """Leaves the gradient of the global batch in `training.gradient`, of which `batches` are this process's share.

    Returns what `take_step` needs: numbers that the device may still be computing, and what is wrong with the
    predictions of this process, if anything. `asked` says that this process was asked to stop.
    """
    process = training.process
    training.model.train()
    training.gradient.values.zero_()
    counts = torch.stack([count_totals(batch.targets, training.model.config.num_queries) for batch in batches]).sum(0)
    totals = process.all_reduce(counts.to(process.device, non_blocking=True))
    numbers = torch.zeros(len(training.meter.names) - 1, dtype=torch.float64, device=process.device)
    failure = ""
    for turn, batch in enumerate(batches):
        place = turn * process.num_processes + process.rank
        key = (training.config.seed * 1_000_003 + training.step) * 4096 + place
        try:
            numbers += pass_micro_batch(training, batch, totals, key)
        except FloatingPointError as error:
            failure = str(error)
            break
    process.all_reduce(training.gradient.values)
    numbers = process.all_reduce(torch.cat([numbers, numbers.new_tensor([asked, bool(failure)])]))
    return torch.cat([numbers, torch.linalg.vector_norm(training.gradient.values)[None]]), failure


def pass_micro_batch(training: Training, batch: Batch, totals: Tensor, key: int) -> Tensor:
    """Adds the gradient of a micro-batch, and returns what the meter's names say of it, but for the gradient's norm.

    `totals` [3] are those of the global batch, `key` seeds dropout. Raises FloatingPointError that names images and
    layer when predictions are not finite; ValueError that names step and images when targets do not fit the model.
    """
    config = training.config
    torch.manual_seed(key)
    with explain_memory(batch, config.micro_batch), choose_precision(training):
        images = normalize(batch.images, batch.padding, training.pixels)
        logits, boxes = training.runner(images, batch.padding)
    try:
        loss, parts = set_loss(logits, boxes, batch.targets, totals, config.matcher, config.loss)
    except ValueError as error:
        bad = ~(logits.isfinite().all(-1) & boxes.isfinite().all(-1)).all(2).all(0)  # [B]
        if not bad.any():
            where = f"at step {training.step + 1}, images {join_ids(batch.image_ids.tolist())}"
            raise ValueError(f"{error}; {where}") from error
        torch.manual_seed(key)
        with choose_precision(training):
            layer = find_first_non_finite(training.model, images, batch.padding)
        where = f"images {join_ids(batch.image_ids[bad].tolist())}, first in {layer}"
        raise FloatingPointError(f"{error}; {where}") from error
    with explain_memory(batch, config.micro_batch):
        loss.backward()
    inside = batch.padding.logical_not().sum()
    found = [inside, inside.new_tensor(batch.padding.numel()), loss.detach(), *(parts[name] for name in PER_LAYER)]
    return torch.cat([value.double().reshape(-1) for value in (*found, parts["class_error"])])


def choose_precision(training: Training) -> AbstractContextManager:
    if training.config.precision == "float32":
        return nullcontext()
    return torch.autocast(training.process.device.type, torch.bfloat16)


def take_step(training: Training, batches: list[Batch], numbers: Tensor, failure: str) -> bool:
    """Changes the weights by what `compute_gradients` has left and returned; says whether a process was asked to stop.

    A step whose loss or gradient is not finite is left out, or is a NotFiniteError once `max_skipped` have been.
    """
    *values, stopping, failures, grad_norm = numbers.tolist()
    measured = dict(zip(training.meter.names, [*values, grad_norm], strict=True))
    if failures or not math.isfinite(grad_norm) or not math.isfinite(measured["loss"]):
        if training.skipped >= training.config.max_skipped:
            where = f"at step {training.step + 1} of epoch {training.step // training.steps_per_epoch}"
            state = training.state()
            raise build_not_finite_error(training.model, batches, failure, measured, where, training.process, state)
        training.skipped += 1
    else:
        update_weights(training, grad_norm)
        training.meter.add(measured)
    training.step += 1
    return bool(stopping)


def update_weights(training: Training, grad_norm: float) -> None:
    """Clips the gradient and takes a step of the optimizer. Raises RuntimeError where a part of it is lost."""
    config = training.config
    training.gradient.expect_attached()
    if config.clip_norm and grad_norm > config.clip_norm:
        training.gradient.values.mul_(config.clip_norm / grad_norm)
    set_learning_rates(training.optimizer, learning_rate_factor(training.step, training.steps_per_epoch, config))
    training.optimizer.step()
    if training.average:
        training.average.update_parameters(training.model)
