"""The training loop. B images of a micro-batch, L decoder layers.

A step is one global batch of `train.batch_size` images, in micro-batches of `train.micro_batch`: images that are padded
and pass through the model together. They are dealt out to the processes, and their gradients, already divided by the
totals of the global batch, are added. So the number of processes changes who computes what, and nothing else.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from detr.batch import Batch, normalize
from detr.coco import CocoDataset
from detr.diagnosis import build_not_finite_error, explain_memory, find_first_non_finite, join_ids
from detr.distributed import Process
from detr.loader import Loader
from detr.loss import count_totals, set_loss
from detr.model import DETR
from detr.sampler import TrainSampler
from detr.train_config import TrainConfig

PER_LAYER = ("loss_class", "loss_box", "loss_giou", "cardinality_error")


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


def learning_rate_factor(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """What multiplies the learning rates at `step`: linear warmup, then cosine to 0 or one drop to a tenth."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "step":
        return 1.0 if step < config.lr_drop_epoch * steps_per_epoch else 0.1
    done = (step - config.warmup_steps) / max(1, config.epochs * steps_per_epoch - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def build_optimizer(model: DETR, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with a learning rate of its own for the backbone."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if not name.startswith("backbone.")], "base_lr": config.lr},
        {"params": [p for name, p in trained if name.startswith("backbone.")], "base_lr": config.lr_backbone},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def flatten_gradients(model: nn.Module) -> Tensor:
    """One tensor that all gradients of the model lie in, each in the memory layout of its parameter.

    So a step clears, adds up over processes, measures and clips them in one operation each, in the same order after a
    resume as before it.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    starts = [0]
    for parameter in trained:
        starts.append(starts[-1] + -(-parameter.numel() // 32) * 32)  # vector loads want aligned addresses
    flat = torch.zeros(starts.pop(), device=trained[0].device)
    for parameter, start in zip(trained, starts, strict=True):
        parameter.grad = flat.as_strided(parameter.shape, parameter.stride(), start)
    return flat


def compile_model(model: DETR) -> Callable[..., tuple[Tensor, Tensor]]:
    """The model compiled, once for batches of all padded sizes."""
    torch.fx.experimental._config.use_duck_shape = False  # sizes that are equal at first need not stay so
    return torch.compile(model, dynamic=True)


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
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    given = process.broadcast(state or {"model": model.state_dict(), "step": 0, "sums": {}, "since": 0, "skipped": 0})
    step, sums, since, skipped = given["step"], given["sums"], given["since"], given["skipped"]
    sampler = build_sampler(dataset, config, process, step)
    model.load_state_dict(given["model"])
    if not config.lr_backbone:
        model.backbone.requires_grad_(False)
    model.to(process.device).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, config)
    average = build_average(model, config.ema_decay)
    if "optimizer" in given:
        optimizer.load_state_dict(given["optimizer"])
        if average:
            average.load_state_dict(given["average"])
    del given, state
    gradient = flatten_gradients(model)
    runner = compile_model(model) if config.compile else model
    pixels = torch.empty(0, device=process.device)
    steps_per_epoch = sampler.steps_per_epoch
    total_steps = config.epochs * steps_per_epoch
    busy = waited = 0.0
    timed = 0

    def snapshot() -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": average.state_dict() if average else None,
            "step": step,
            "sums": sums,
            "since": since,
            "skipped": skipped,
            "num_processes": process.num_processes,
        }

    def report(row: dict[str, float] | None, stopping: bool) -> Report:
        return Report(
            epoch=max(0, step - 1) // steps_per_epoch,
            step=step,
            total_steps=total_steps,
            epoch_done=step > 0 and step % steps_per_epoch == 0,
            stopping=stopping,
            row=row,
            images_per_second=timed * config.batch_size / max(busy, 1e-9),
            data_wait=waited / max(busy, 1e-9),
            model=average.module if average else model,  # type: ignore[arg-type]
            state=snapshot,
        )

    yield report(None, False)
    loader = Loader(dataset, sampler, config.size_multiple, process.device)
    source = iter(loader)
    batches: list[Batch] = []
    with loader.explain_deaths():
        while step < total_steps:
            started = time.perf_counter()
            if not batches:
                batches = list(islice(source, sampler.share))
                waited += time.perf_counter() - started
            model.train()
            factor = learning_rate_factor(step, steps_per_epoch, config)
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            gradient.zero_()
            numbers, failure = accumulate_gradients(model, runner, batches, step, config, process, pixels)
            process.all_reduce(gradient)
            numbers = process.all_reduce(torch.cat([numbers, numbers.new_tensor([stop(), bool(failure)])]))
            norm = torch.linalg.vector_norm(gradient)

            asked = time.perf_counter()
            last = step + 1 == total_steps
            upcoming = [] if last else list(islice(source, sampler.share))  # while the device computes
            waited += time.perf_counter() - asked

            *values, stopping, failures, grad_norm = torch.cat([numbers, norm[None]]).tolist()
            measured = dict(zip(name_measures(model, config), values, strict=True)) | {"grad_norm": grad_norm}
            if failures or not math.isfinite(grad_norm) or not math.isfinite(measured["loss"]):
                if skipped >= config.max_skipped:
                    where = f"at step {step + 1} of epoch {step // steps_per_epoch}"
                    raise build_not_finite_error(model, batches, failure, measured, where, process, snapshot())
                skipped += 1
            else:
                if config.clip_norm and grad_norm > config.clip_norm:
                    gradient.mul_(config.clip_norm / grad_norm)
                optimizer.step()
                if average:
                    average.update_parameters(model)
                sums = _add_step(sums, measured)
                since += 1
            step += 1
            timed += 1
            batches = upcoming
            busy += time.perf_counter() - started
            if step % config.log_steps and step % steps_per_epoch:
                yield report(None, bool(stopping))
            else:
                rates = {"lr": config.lr * factor, "lr_backbone": config.lr_backbone * factor}
                row = {
                    "epoch": (step - 1) // steps_per_epoch,
                    "step": step,
                    **rates,
                    **_average_sums(sums or dict.fromkeys((*measured, "judged"), math.nan), max(since, 1)),
                    "skipped": skipped,
                }
                sums, since = {}, 0
                yield report(row, bool(stopping))
                busy, waited, timed = 0.0, 0.0, 0
            if stopping:
                return


def build_sampler(dataset: CocoDataset, config: TrainConfig, process: Process, step: int) -> TrainSampler:
    view_sizes = None
    if config.group_window:
        view_sizes = partial(dataset.transform.view_sizes, dataset.annotations.sizes_hw)  # type: ignore[attr-defined]
    return TrainSampler(
        len(dataset), config.batch_size, config.micro_batch, config.epochs, config.seed, process.rank,
        process.num_processes, step, config.group_window, view_sizes,
    )  # fmt: skip


def build_average(model: DETR, decay: float) -> AveragedModel | None:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True) if decay else None


def name_measures(model: DETR, config: TrainConfig) -> list[str]:
    """Of what a step measures, in order; parts of the last decoder layer are named plainly, others by layer."""
    layers = model.config.num_decoder_layers if config.loss.auxiliary else 1
    suffixes = [*(f"_layer{layer}" for layer in range(layers - 1)), ""]
    return ["pixels", "padded_pixels", "loss", *(part + s for part in PER_LAYER for s in suffixes), "class_error"]


def accumulate_gradients(
    model: DETR,
    runner: Callable[..., tuple[Tensor, Tensor]],
    batches: list[Batch],
    step: int,
    config: TrainConfig,
    process: Process,
    pixels: Tensor,
) -> tuple[Tensor, str]:
    """This process's share of what `name_measures` says, and what is wrong with predictions, if anything.

    Adds the gradients of its micro-batches to those of the parameters.
    """
    precision = torch.autocast(process.device.type, torch.bfloat16) if config.precision == "bfloat16" else nullcontext()
    queries = model.config.num_queries
    counts = torch.stack([count_totals(batch.targets, queries) for batch in batches]).sum(0)
    totals = process.all_reduce(counts.to(process.device, non_blocking=True))
    numbers = torch.zeros(len(name_measures(model, config)), dtype=torch.float64, device=process.device)
    for turn, batch in enumerate(batches):
        key = (config.seed * 1_000_003 + step) * 4096 + turn * process.num_processes + process.rank
        torch.manual_seed(key)
        with explain_memory(batch, config.micro_batch), precision:
            images = normalize(batch.images, batch.padding, pixels)
            logits, boxes = runner(images, batch.padding)
        try:
            loss, parts = set_loss(logits, boxes, batch.targets, totals, config.matcher, config.loss)
        except ValueError as error:
            where = f"at step {step + 1}, images {join_ids(batch.image_ids.tolist())}"
            bad = ~(logits.isfinite().all(-1) & boxes.isfinite().all(-1)).all(2).all(0)  # [B]
            if not bad.any():
                raise ValueError(f"{error}; {where}") from error
            torch.manual_seed(key)
            with precision:
                layer = find_first_non_finite(model, images, batch.padding)
            return numbers, f"{error}; images {join_ids(batch.image_ids[bad].tolist())}, first in {layer}"
        with explain_memory(batch, config.micro_batch):
            loss.backward()
        inside = batch.padding.logical_not().sum()
        found = [inside, inside.new_tensor(batch.padding.numel()), loss.detach(), *(parts[name] for name in PER_LAYER)]
        numbers += torch.cat([value.double().reshape(-1) for value in (*found, parts["class_error"])])
    return numbers, ""


def _add_step(sums: dict[str, float], measured: dict[str, float]) -> dict[str, float]:
    """The sums with one more step; a batch without targets has no class error, and is not counted in its mean."""
    judged = not math.isnan(measured["class_error"])
    step = measured | {"judged": float(judged)} | ({} if judged else {"class_error": 0.0})
    return {name: sums.get(name, 0.0) + value for name, value in step.items()}


def _average_sums(sums: dict[str, float], count: int) -> dict[str, float]:
    """Of an interval of `count` steps."""
    means = {name: value / count for name, value in sums.items() if name not in ("pixels", "padded_pixels", "judged")}
    means["class_error"] = sums["class_error"] / sums["judged"] if sums["judged"] else math.nan
    return means | {"padding_ratio": sums["padded_pixels"] / sums["pixels"]}
