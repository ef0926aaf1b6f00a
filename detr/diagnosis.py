"""What went wrong in a step of the training, said so that one can act on it."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from detr.batch import Batch
from detr.distributed import Process
from detr.model import DETR


class NotFiniteError(FloatingPointError):
    """A loss, gradient or prediction that is not a number; `evidence` is for a look at it."""

    def __init__(self, message: str, evidence: dict[str, Any]) -> None:
        super().__init__(message)
        self.evidence = evidence


@contextmanager
def explain_memory(batch: Batch, micro_batch: int) -> Iterator[None]:
    """Turns the many ways in which memory runs out into one error that says what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not re.search(
            "out of memory|can't allocate|not enough memory", str(error)
        ):
            raise
        size = "x".join(map(str, batch.images.shape[2:]))
        raise RuntimeError(
            f"out of memory with {len(batch)} images padded to {size} passing the model together; lower "
            f"train.micro_batch, which is {micro_batch} (the batch stays as it is), then train.transform.max_size"
        ) from error


def build_not_finite_error(
    model: DETR,
    batches: list[Batch],
    failure: str,
    measured: dict[str, float],
    where: str,
    process: Process,
    state: dict[str, Any],
) -> NotFiniteError:
    """The error of all processes about a step, whose batches and gradients are still there."""
    said = process.all_gather((failure, [image_id for batch in batches for image_id in batch.image_ids.tolist()]))
    image_ids = sorted(image_id for _, ids in said for image_id in ids)
    reason = next((text for text, _ in said if text), "")
    if not reason:
        reason = (
            f"loss is {measured['loss']}, gradient norm {measured['grad_norm']}; images {join_ids(image_ids)}; "
            "lower train.lr or raise train.warmup_steps"
        )
    norms = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
    evidence = {"image_ids": image_ids, "measured": measured, "gradient_norms": norms, "state": state}
    return NotFiniteError(f"{reason}; {where}", evidence)


@torch.no_grad()
def find_first_non_finite(model: DETR, images: Tensor, padding: Tensor | None) -> str:
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


def join_ids(image_ids: list[int]) -> str:
    return ", ".join(map(str, image_ids))
