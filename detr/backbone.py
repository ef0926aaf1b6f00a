"""The residual backbone and its norms. B images, H W padded size, S output stride."""

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.models import get_model
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

DEPTHS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}


class GroupNorm(nn.GroupNorm):
    """Trainable norm over groups of 8 channels: equal for any batch size and any number of processes."""

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels // 8, num_channels)


NORMS = {"frozen": FrozenBatchNorm2d, "batch": nn.BatchNorm2d, "group": GroupNorm}


class ResNet(nn.Module):
    """Feature map [B, num_channels, H/S, W/S] of images [B, 3, H, W], under torchvision's parameter names.

    `width` scales every channel count (1.0 is the published network). Stride 16 keeps the resolution of
    the last stage and dilates its 3x3 convolutions (the paper's DC5). `frozen` norm is for pretrained
    weights; `group` trains from scratch.
    """

    def __init__(self, name: str, width: float, stride: int, norm: str) -> None:
        super().__init__()
        block, depths = DEPTHS[name]
        norm_layer = NORMS[norm]
        planes = [int(width * channels) for channels in (64, 128, 256, 512)]
        self.conv1 = nn.Conv2d(3, planes[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(planes[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inplanes = planes[0]
        stages = []
        for stage, (channels, depth) in enumerate(zip(planes, depths, strict=True), start=1):
            stage_stride = 1 if stage == 1 or (stage == 4 and stride == 16) else 2
            blocks = []
            for index in range(depth):
                block_stride = stage_stride if index == 0 else 1
                outplanes = channels * block.expansion
                shortcut = None
                if block_stride != 1 or inplanes != outplanes:
                    shortcut = nn.Sequential(
                        nn.Conv2d(inplanes, outplanes, 1, stride=block_stride, bias=False), norm_layer(outplanes)
                    )
                blocks.append(block(inplanes, channels, block_stride, shortcut, norm_layer=norm_layer))
                inplanes = outplanes
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        if stride == 16:
            _dilate(self.layer4)
        self.num_channels = inplanes
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        features = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.layer4(self.layer3(self.layer2(self.layer1(features))))


def _dilate(stage: nn.Module) -> None:
    """Dilates a stage whose stride was taken out: all 3x3 convolutions but those of its first block."""
    for block in list(stage.children())[1:]:
        for module in block.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                module.dilation, module.padding = (2, 2), (2, 2)


@torch.no_grad()
def fold_norms(backbone: ResNet) -> None:
    """Moves frozen and batch norms, as they stand in eval mode, into the convolutions before them; in place."""
    for parent in [module for module in backbone.modules() if not isinstance(module, nn.Conv2d)]:
        for (_, conv), (norm_name, norm) in pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, FrozenBatchNorm2d | nn.BatchNorm2d):
                mean, variance, weight, bias = norm.running_mean, norm.running_var, norm.weight, norm.bias
                fused = fuse_conv_bn_weights(conv.weight, conv.bias, mean, variance, norm.eps, weight, bias)  # type: ignore[arg-type]
                conv.weight, conv.bias = fused
                setattr(parent, norm_name, nn.Identity())


def freeze_stem(backbone: ResNet) -> None:
    """Stops training of the stem and the first stage, as the paper does with pretrained weights."""
    for module in (backbone.conv1, backbone.bn1, backbone.layer1):
        module.requires_grad_(False)


def load_pretrained(backbone: ResNet, name: str, source: str) -> None:
    """Fills the backbone with published weights, without their classifier.

    `source` is `imagenet` (torchvision's weights API, downloaded once) or a local `.safetensors` or `.pth`
    file under torchvision's names. Raises ValueError that names the first key that differs. Runs no code from
    the file.
    """
    if source == "imagenet":
        state = get_model(name, weights="IMAGENET1K_V1").state_dict()
    elif not Path(source).is_file():
        raise ValueError(f"model.backbone_weights is {source!r}: no such file; give none, imagenet or a file")
    elif source.endswith(".safetensors"):
        try:
            state = load_file(source)
        except SafetensorError as error:
            raise ValueError(f"{source} is not a whole safetensors file ({error}); fetch it again") from error
    else:
        state = read_torch(source)
    if not is_state(state):
        raise ValueError(f"{source} is not a flat dictionary of tensors; save the backbone's state_dict() alone")
    state = {key: value.float() for key, value in state.items() if not key.startswith("fc.")}
    own = backbone.state_dict()
    state = {key: value for key, value in state.items() if key in own or not key.endswith("num_batches_tracked")}
    if difference := first_difference(own, state):
        raise ValueError(f"{source} does not fit {name}: {difference}")
    backbone.load_state_dict(state)


def read_torch(file: str | Path | BinaryIO, name: str = "", allowed: tuple[type, ...] = ()) -> Any:
    """What torch.save wrote: tensors, plain values and `allowed` classes. Runs no code from the file.

    Raises ValueError that names a file that is damaged, that is something else, or that holds more; `name` is
    that of an open one.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the unpickler fail in any way, with advice to trust them
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {code[1]}" if code else type(error).__name__
        raise ValueError(f"{name or file} is not a whole file of weights and nothing else ({reason})") from error


def is_state(value: Any) -> TypeGuard[dict[str, Tensor]]:
    """Whether `value` is a flat dictionary of named tensors."""
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def first_difference(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """The first key, by name, that has another shape in `given` or is only on one side; empty if there is none."""
    for key in sorted(own.keys() | given.keys()):
        shapes = [tuple(side[key].shape) if key in side else "absent" for side in (own, given)]
        if shapes[0] != shapes[1]:
            return f"{key} is {shapes[0]} in the model, {shapes[1]} in the file"
    return ""
