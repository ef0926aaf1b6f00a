"""The training loop. B images of the global batch, L decoder layers."""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from detr.batch import Batch, collate, normalize
from detr.coco import CocoDataset
from detr.distributed import Process
from detr.loss import LossConfig, set_loss
from detr.matcher import MatcherConfig
from detr.model import DETR
from detr.sampler import EpochSampler
from detr.transforms import TransformConfig


@dataclass(frozen=True)
class TrainConfig:
    """The training: the `train` section of params.yaml."""

    seed: int
    initial_weights: str  # none, or what detr.official.initialize takes; wins over model.backbone_weights
    epochs: int
    batch_size: int  # global, over all processes
    lr: float
    lr_backbone: float
    weight_decay: float
    schedule: str  # cosine, or step: a tenth from lr_drop_epoch on
    lr_drop_epoch: int
    warmup_steps: int
    clip_norm: float
    precision: str  # float32 or bfloat16
    size_multiple: int  # padded sizes are rounded up to it
    log_steps: int
    evaluate_epochs: int  # between evaluations on the validation images, 0 for none
    checkpoint_minutes: float
    matcher: MatcherConfig
    loss: LossConfig
    transform: TransformConfig

    def __post_init__(self) -> None:
        for key, choices in (("schedule", ("cosine", "step")), ("precision", ("float32", "bfloat16"))):
            if getattr(self, key) not in choices:
                raise ValueError(f"train.{key} is {getattr(self, key)!r}, expected one of {list(choices)}")
        for key in ("epochs", "batch_size", "log_steps", "size_multiple"):
            if getattr(self, key) < 1:
                raise ValueError(f"train.{key} is {getattr(self, key)}, expected at least 1")
        for key in ("lr", "lr_backbone", "weight_decay", "clip_norm"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"train.{key} is {getattr(self, key)}, expected a number that is not negative")


@dataclass(frozen=True)
class Report:
    """Where training stands: after every `log_steps` steps and at the end of every epoch.

    `row` is a pure function of parameters, code and data; `images_per_second` is not. `state()` gives all
    that an exact resume needs.
    """

    epoch: int
    step: int
    total_steps: int
    epoch_done: bool
    row: dict[str, float]
    images_per_second: float
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


def fit(
    model: DETR,
    dataset: CocoDataset,
    config: TrainConfig,
    process: Process,
    state: dict[str, Any] | None = None,
) -> Iterator[Report]:
    """Trains `model` in place and yields a report every `log_steps` steps and at the end of every epoch.

    With the `state` of an earlier report it goes on from there, to the same bits as if it had never stopped:
    samples are keyed by (seed, epoch, index) and dropout by (seed, step, rank), so no generator has a memory.
    Raises FloatingPointError, naming step, images and the layer where it began, when predictions are not finite, and
    ValueError, naming step and images, when targets do not fit the model.
    """
    model.to(process.device).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, config)
    step = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    runner: nn.Module = model
    if process.num_processes > 1:
        trained_buffers = model.config.backbone_norm == "batch"
        runner = DistributedDataParallel(model, forward_sync_buffers=trained_buffers, gradient_as_bucket_view=True)
    sampler = EpochSampler(len(dataset), config.batch_size, config.seed, process.rank, process.num_processes)
    loader = _loader(dataset, sampler, config, process)
    precision = torch.autocast(process.device.type, torch.bfloat16) if config.precision == "bfloat16" else nullcontext()
    steps_per_epoch = sampler.steps_per_epoch
    total_steps = config.epochs * steps_per_epoch

    def snapshot() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}

    pixels = torch.empty(0, device=process.device)
    sums: dict[str, Tensor] = {}
    since, started = 0, time.perf_counter()
    for epoch in range(step // steps_per_epoch, config.epochs):
        sampler.start(epoch, step - epoch * steps_per_epoch)
        model.train()
        for batch in loader:
            batch = batch.to(process.device)
            torch.manual_seed((config.seed * 1_000_003 + step) * 4096 + process.rank)
            factor = learning_rate_factor(step, steps_per_epoch, config)
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            num_boxes = process.mean(torch.tensor(float(sum(batch.targets.counts)), device=process.device)).clamp(min=1)
            with precision:
                images = normalize(batch.images, batch.padding, pixels)
                logits, boxes = runner(images, batch.padding)
            try:
                loss, parts = set_loss(logits, boxes, batch.targets, num_boxes, config.matcher, config.loss)
            except ValueError as error:
                where = f"at step {step + 1} of epoch {epoch}"
                bad = ~(logits.isfinite().all(-1) & boxes.isfinite().all(-1)).all(2).all(0)  # [B]
                if not bad.any():
                    raise ValueError(f"{error}; {where}, images {_ids(batch.image_ids)}") from error
                torch.manual_seed((config.seed * 1_000_003 + step) * 4096 + process.rank)
                with precision:
                    layer = first_non_finite(model, images, batch.padding)
                raise FloatingPointError(
                    f"{error}; {where}, images {_ids(batch.image_ids[bad])}, first in {layer}"
                ) from error
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            step += 1
            since += 1
            for name, value in {"loss": loss.detach(), "grad_norm": norm, **parts}.items():
                sums[name] = sums[name] + value if name in sums else value.clone()
            epoch_done = step % steps_per_epoch == 0
            if step % config.log_steps == 0 or epoch_done:
                row = _row(sums, since, process)
                if not math.isfinite(row["loss"]) or not math.isfinite(row["grad_norm"]):
                    raise FloatingPointError(
                        f"loss is {row['loss']}, gradient norm {row['grad_norm']} at step {step} of epoch {epoch}; "
                        f"last batch: images {_ids(batch.image_ids)}; lower train.lr or raise train.warmup_steps"
                    )
                rate = since * config.batch_size / (time.perf_counter() - started)
                head = {"epoch": epoch, "step": step, "lr": config.lr * factor}
                yield Report(epoch, step, total_steps, epoch_done, head | row, rate, snapshot)
                sums, since, started = {}, 0, time.perf_counter()
                model.train()


def _loader(dataset: CocoDataset, sampler: EpochSampler, config: TrainConfig, process: Process) -> DataLoader[Batch]:
    on_gpu = process.device.type == "cuda"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    workers = int(os.environ.get("DETR_WORKERS", (os.cpu_count() or 1) // local if on_gpu else 0))
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=sampler,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=partial(collate, size_multiple=config.size_multiple),
        pin_memory=on_gpu,
        persistent_workers=False,
    )


def _row(sums: dict[str, Tensor], count: int, process: Process) -> dict[str, float]:
    """Means over the interval and over all processes; parts per decoder layer are named by layer, last one plain."""
    row: dict[str, float] = {}
    for name, total in sums.items():
        mean = (process.mean(total.float()) / count).tolist()
        if isinstance(mean, float):
            row[name] = mean
        else:
            row[name] = mean[-1]
            row |= {f"{name}_layer{layer}": value for layer, value in enumerate(mean[:-1])}
    return row


@torch.no_grad()
def first_non_finite(model: DETR, images: Tensor, padding: Tensor | None) -> str:
    """The first module, in the order of computation, whose output has NaN or infinity; "input" if the images have."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            values = [output] if isinstance(output, Tensor) else output
            if not found and not all(value.isfinite().all() for value in values):
                found.append(name)

        return look

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        model(images, padding)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found and images.isfinite().all() else "input"


def _ids(image_ids: Tensor) -> str:
    return ", ".join(map(str, image_ids.tolist()))
