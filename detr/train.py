"""The training loop; detr/step.py has what a step is."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from detr.coco import CocoDataset
from detr.distributed import Process
from detr.loader import Loader
from detr.meter import Meter, name_measures
from detr.model import DETR
from detr.optimizer import build_optimizer, flatten_gradients, learning_rate_factor
from detr.sampler import TrainSampler
from detr.step import Training, compute_gradients, take_step
from detr.train_config import TrainConfig


@dataclass(frozen=True)
class Report:
    """Where training stands: at its start and after every step.

    `row` is there every `log_steps` steps and at the end of every epoch: means since the row before, a pure function of
    parameters, code and data. `images_per_second` and `data_wait`, the share of time spent waiting for the loader, are
    not. `stopping` says that this is the last report because a process was asked to stop. `model` is what to evaluate
    and to keep. `state()` gives all that an exact resume needs; it is the same on every process.
    """

    epoch: int
    step: int
    total_steps: int
    epoch_done: bool
    stopping: bool
    row: dict[str, float] | None
    images_per_second: float
    data_wait: float
    model: DETR
    state: Callable[[], dict[str, Any]]


def fit(
    model: DETR,
    dataset: CocoDataset,
    config: TrainConfig,
    process: Process,
    state: dict[str, Any] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Report]:
    """Trains `model` in place and yields a report at the start and after every step.

    With the `state` of an earlier report, given to the main process at least, it goes on from there, to the same bits
    as if it had never stopped: samples are keyed by (seed, epoch, index) and dropout by (seed, step, micro-batch), so
    no generator has a memory. Once `stop()` is true on any process, all of them end after the same step.
    Raises NotFiniteError, naming step, images and the layer where it began, when predictions, loss or gradients are
    not finite more than `max_skipped` times; ValueError, naming step and images, when targets do not fit the model;
    RuntimeError with what to lower when memory runs out.
    """
    training = start_training(model, dataset, config, process, state)
    del state  # as large as the model and the optimizer
    sampler, meter = build_sampler(dataset, config, process, training.step), training.meter
    yield build_report(training)
    loader = Loader(dataset, sampler, config.size_multiple, process.device)
    source = iter(loader)
    with loader.explain_deaths():
        meter.start_clock()
        batches = meter.take(source, sampler.share)
        while batches:
            numbers, failure = compute_gradients(training, batches, stop())
            upcoming = meter.take(source, sampler.share)  # while a GPU computes
            stopping = take_step(training, batches, numbers, failure)
            batches = upcoming
            meter.stop_clock()
            report = build_report(training, stopping)
            if report.row:
                meter.reset()
            yield report
            if stopping:
                return
            meter.start_clock()


def start_training(
    model: DETR, dataset: CocoDataset, config: TrainConfig, process: Process, state: dict[str, Any] | None
) -> Training:
    """The training as it stands at its start, or in the main process's `state`: on the device, in every process."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    new = {"model": model.state_dict(), "optimizer": None, "step": 0, "sums": {}, "since": 0, "skipped": 0}
    given = process.broadcast(state or new)
    model.load_state_dict(given["model"])
    if not config.lr_backbone:
        model.backbone.requires_grad_(False)
    model.to(process.device).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, config)
    average = None
    if config.ema_decay:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)
    if given["optimizer"]:
        optimizer.load_state_dict(given["optimizer"])
        if average:
            average.load_state_dict(given["average"])
    return Training(
        model=model,
        runner=compile_model(model) if config.compile else model,
        optimizer=optimizer,
        gradient=flatten_gradients(model),
        average=average,
        config=config,
        process=process,
        meter=Meter(name_measures(model, config), given["sums"], given["since"]),
        pixels=torch.empty(0, device=process.device),
        steps_per_epoch=len(dataset) // config.batch_size,
        step=given["step"],
        skipped=given["skipped"],
    )


def build_sampler(dataset: CocoDataset, config: TrainConfig, process: Process, first_step: int) -> TrainSampler:
    view_sizes = None
    if config.group_window:
        view_sizes = partial(dataset.transform.view_sizes, dataset.annotations.sizes_hw)  # type: ignore[attr-defined]
    return TrainSampler(
        len(dataset), config.batch_size, config.micro_batch, config.epochs, config.seed, process.rank,
        process.num_processes, first_step, config.group_window, view_sizes,
    )  # fmt: skip


def compile_model(model: DETR) -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns the model compiled, once for batches of all padded sizes."""
    torch.fx.experimental._config.use_duck_shape = False  # sizes that are equal at first need not stay so
    return torch.compile(model, dynamic=True)


def build_report(training: Training, stopping: bool = False) -> Report:
    """The report of the steps taken, with a row where one is due; without one at the start."""
    config, meter, step = training.config, training.meter, training.step
    per_epoch = training.steps_per_epoch
    is_due = meter.timed_steps and (step % config.log_steps == 0 or step % per_epoch == 0)
    return Report(
        epoch=max(0, step - 1) // per_epoch,
        step=step,
        total_steps=config.epochs * per_epoch,
        epoch_done=step > 0 and step % per_epoch == 0,
        stopping=stopping,
        row=build_row(training) if is_due else None,
        images_per_second=meter.timed_steps * config.batch_size / max(meter.busy_seconds, 1e-9),
        data_wait=meter.waited_seconds / max(meter.busy_seconds, 1e-9),
        model=training.average.module if training.average else training.model,  # type: ignore[arg-type]
        state=training.state,
    )


def build_row(training: Training) -> dict[str, float]:
    """What is logged of the steps since the last row, in the order of its columns."""
    last = training.step - 1
    factor = learning_rate_factor(last, training.steps_per_epoch, training.config)
    return {
        "epoch": last // training.steps_per_epoch,
        "step": training.step,
        "lr": training.config.lr * factor,
        "lr_backbone": training.config.lr_backbone * factor,
        **training.meter.average(),
        "skipped": training.skipped,
    }
