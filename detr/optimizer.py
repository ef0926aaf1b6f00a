"""AdamW as the paper uses it: two learning rates, their schedule, and the one tensor that all gradients lie in."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from detr.model import DETR
from detr.train_config import TrainConfig


def learning_rate_factor(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """What multiplies the learning rates at `step`: linear warmup, then cosine to 0 or one drop to a tenth."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "step":
        return 1.0 if step < config.lr_drop_epoch * steps_per_epoch else 0.1
    done = (step - config.warmup_steps) / max(1, config.epochs * steps_per_epoch - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def build_optimizer(model: DETR, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with a learning rate of its own for the backbone. Source: paper, section 4, "Technical details"."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if not name.startswith("backbone.")], "base_lr": config.lr},
        {"params": [p for name, p in trained if name.startswith("backbone.")], "base_lr": config.lr_backbone},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets the rate of each group to `factor` times the one that it was built with."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


@dataclass(frozen=True)
class FlatGradient:
    """All gradients of a model: `values`, one tensor, and `views`, the name, parameter and part of it of each.

    So a step clears, adds up over processes, measures and clips them in one operation each, in the same order after a
    resume as before it.
    """

    values: Tensor
    views: list[tuple[str, nn.Parameter, Tensor]]

    def expect_attached(self) -> None:
        """Raises RuntimeError that names the first parameter whose `grad` is no longer its part of `values`."""
        for name, parameter, view in self.views:
            if parameter.grad is not view:
                raise RuntimeError(
                    f"the gradient of {name} does not lie in the flat gradient of the training, so the step would "
                    "leave it out; do not call zero_grad() on the model or its optimizer, nor set a parameter's grad"
                )


def flatten_gradients(model: nn.Module) -> FlatGradient:
    """Gives every trained parameter a gradient of 0 in one tensor, each in the memory layout of its parameter."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    starts = [0]
    for _, parameter in trained:
        starts.append(starts[-1] + -(-parameter.numel() // 32) * 32)  # vector loads want aligned addresses
    values = torch.zeros(starts.pop(), device=trained[0][1].device)
    views = []
    for (name, parameter), start in zip(trained, starts, strict=True):
        view = values.as_strided(parameter.shape, parameter.stride(), start)
        parameter.grad = view
        views.append((name, parameter, view))
    return FlatGradient(values, views)
