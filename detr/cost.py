"""What a model costs: parameters, multiply-adds, images per second."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from statistics import median

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from detr.model import DETR, for_inference

_FROZEN = ("backbone.conv1.", "backbone.bn1.", "backbone.layer1.")  # by `detr.backbone.freeze_stem`


def count_parameters(model: nn.Module) -> int:
    """Parameters as the paper counts them: those that learn.

    Frozen norms have none, and a DETR that has such norms keeps stem and first stage as pretrained (0.2M), whether
    its weights are loaded yet or not. Of any other module all count. Not for copies of `for_inference`.
    """
    fixed = _FROZEN if isinstance(model, DETR) and model.config.backbone_norm == "frozen" else ()
    return sum(p.numel() for name, p in model.named_parameters() if not (fixed and name.startswith(fixed)))


def count_multiply_adds(run: Callable[[], object]) -> int:
    """Multiply-adds of convolutions and matrix products, those of attention too, in what `run` computes with PyTorch.

    Each counts once, as in detectron2's counter and the paper; PyTorch's own counts two floating-point operations.
    Sums, norms and activations do not count. Fused attention is left to its plain form, which every device counts.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops()) // 2


def count_gflops(model: nn.Module, sizes_hw: Sequence[tuple[int, int]]) -> float:
    """10^9 `count_multiply_adds` of one image, the mean over the input sizes in pixels; without computing anything.

    A function of the architecture and the sizes alone. Raises ValueError without a size.
    """
    if not sizes_hw:
        raise ValueError("gflops got no sizes, expected (height, width) of at least one input image")
    model = deepcopy(model).to("meta").eval().requires_grad_(False)

    def of(size_hw: tuple[int, int]) -> int:
        image = torch.empty(1, 3, *size_hw, device="meta")
        return count_multiply_adds(lambda: model(image))

    total = sum(number * of(size_hw) for size_hw, number in Counter(sizes_hw).items())
    return total / len(sizes_hw) / 1e9


def measure_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time that `run` takes on `device`, what it queues on a GPU included; without gradients."""

    def settle() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    with torch.inference_mode():
        settle()
        start = time.perf_counter()
        run()
        settle()
    return time.perf_counter() - start


def measure_images_per_second(
    model: DETR, size_hw: tuple[int, int], device: torch.device, num_images: int = 20
) -> float:
    """Images of one input size that the model answers per second, one at a time: by the median of `num_images`.

    Of the copy that `for_inference` makes, after two images of warm-up, from a normalised image on the device to
    the model's output there.
    """
    ready = for_inference(model).to(device)
    image = torch.zeros(1, 3, *size_hw, device=device)
    times = [measure_seconds(lambda: ready(image), device) for _ in range(2 + num_images)]
    return 1 / median(times[2:])
