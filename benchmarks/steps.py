"""A training step of ours and of the authors' code, their parts marked on one clock."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from authors import build, nested
from torch import Tensor, nn

import detr.loss
from detr.batch import Batch, normalize
from detr.loss import count_totals, set_loss
from detr.matcher import match_targets
from detr.model import DETR
from detr.optimizer import build_optimizer, flatten_gradients
from detr.train import compile_model
from detr.train_config import TrainConfig
from detr.transformer import Attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TheirBatch = tuple[torch.Tensor, torch.Tensor, list[dict[str, torch.Tensor]]]  # images, padding, targets


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Seconds between marks, added up in `seconds` by the name of the later one; without it a mark does nothing."""

    def __init__(self) -> None:
        self.start(None)

    def start(self, seconds: dict[str, float] | None) -> None:
        self.seconds, self.last = seconds, time.perf_counter()

    def mark(self, name: str) -> None:
        if self.seconds is not None:
            synchronize()
            now = time.perf_counter()
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
            self.last = now

    def apart(self, match: Callable) -> Callable:
        """`match` with its time apart from the loss around it."""

        def marked(*arguments: Any, **named: Any) -> Any:
            self.mark("loss")
            result = match(*arguments, **named)
            self.mark("matcher")
            return result

        return marked


CLOCK = Clock()


class TorchAttention(nn.MultiheadAttention):
    """PyTorch's attention, called as the project's own is."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attend: Tensor | None = None) -> Tensor:  # type: ignore[override]
        padding = None if attend is None else ~attend.flatten(1)
        mixed: Tensor = super().forward(query, key, value, key_padding_mask=padding, need_weights=False)[0]
        return mixed


def replace_attention(model: DETR) -> None:
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, Attention):
                other = TorchAttention(module.out_proj.in_features, module.num_heads, module.dropout, batch_first=True)
                other.load_state_dict(module.state_dict())
                setattr(parent, name, other)


def our_step(model: DETR, config: TrainConfig, precision: str, compiling: bool) -> Callable[[Batch], None]:
    """The step of detr.train.fit."""
    detr.loss.match_targets = CLOCK.apart(match_targets)
    model.to(DEVICE).to(memory_format=torch.channels_last)
    optimizer, gradient = build_optimizer(model, config), flatten_gradients(model).values
    runner = compile_model(model) if compiling else model
    autocast = partial(torch.autocast, DEVICE.type, torch.bfloat16, enabled=precision == "bfloat16")
    pixels = torch.empty(0, device=DEVICE)

    def step(batch: Batch) -> None:
        batch = batch.to(DEVICE)
        CLOCK.mark("data")
        gradient.zero_()
        CLOCK.mark("optimizer")
        totals = count_totals(batch.targets, model.config.num_queries).to(DEVICE, non_blocking=True)
        with autocast():
            logits, boxes = runner(normalize(batch.images, batch.padding, pixels), batch.padding)
        CLOCK.mark("forward")
        loss, _ = set_loss(logits, boxes, batch.targets, totals, config.matcher, config.loss)
        CLOCK.mark("loss")
        loss.backward()
        CLOCK.mark("backward")
        norm = float(torch.linalg.vector_norm(gradient))  # the host waits here, as in a training
        if config.clip_norm and norm > config.clip_norm:
            gradient.mul_(config.clip_norm / norm)
        optimizer.step()
        CLOCK.mark("optimizer")

    return step


def authors_step(variant: str) -> Callable[[TheirBatch], None]:
    """Their engine's, with the paper's settings."""
    peer = build(variant, dropout=0.1)
    model, criterion = peer.model.to(DEVICE).train(), peer.criterion.to(DEVICE)
    criterion.matcher.forward = CLOCK.apart(criterion.matcher.forward)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in trained if "backbone" not in name]},
        {"params": [p for name, p in trained if "backbone" in name], "lr": 1e-5},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=1e-4)

    def step(batch: TheirBatch) -> None:
        images, padding, goals = batch
        samples = nested(images.to(DEVICE), padding.to(DEVICE))
        goals = [{name: value.to(DEVICE) for name, value in goal.items()} for goal in goals]
        CLOCK.mark("data")
        outputs = model(samples)
        CLOCK.mark("forward")
        losses = criterion(outputs, goals)
        loss = sum(losses[name] * weight for name, weight in criterion.weight_dict.items())
        if not math.isfinite(loss.item()):
            raise ArithmeticError(f"the authors' loss is {loss.item()}, expected a finite number")
        CLOCK.mark("loss")
        optimizer.zero_grad()
        CLOCK.mark("optimizer")
        loss.backward()
        CLOCK.mark("backward")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        CLOCK.mark("optimizer")

    return step


def as_theirs(batch: Batch) -> TheirBatch:
    """The batch as the authors' loader gives it: normalised, and padded to the largest image and no further."""
    height, width = (int((~batch.padding).any(dim).sum(1).max()) for dim in (2, 1))
    images = normalize(batch.images, batch.padding)[..., :height, :width].contiguous()
    pairs = (value.split(list(batch.targets.counts)) for value in (batch.targets.boxes_cxcywh, batch.targets.labels))
    goals = [{"boxes": boxes, "labels": labels} for boxes, labels in zip(*pairs, strict=True)]
    return images, batch.padding[:, :height, :width].contiguous(), goals
