"""The residual backbone and its norms. B images, H W padded size, S output stride."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

DEPTHS = {  # whether blocks are bottlenecks, and their number in each stage
    "resnet10": (False, (1, 1, 1, 1)),
    "resnet18": (False, (2, 2, 2, 2)),
    "resnet34": (False, (3, 4, 6, 3)),
    "resnet50": (True, (3, 4, 6, 3)),
    "resnet101": (True, (3, 4, 23, 3)),
}


class GroupNorm(nn.GroupNorm):
    """Trainable norm over groups of 8 channels: equal for any batch size and any number of processes."""

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels // 8, num_channels)


NORMS = {"frozen": FrozenBatchNorm2d, "group": GroupNorm}


class Conv(nn.Conv2d):
    """A convolution that may do the work of the frozen norm behind it.

    Such a norm is a constant scale and shift of each channel. They go into the weights, which spares two passes over
    the feature map, one more in the backward pass, and a copy.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, dilation: int = 1
    ) -> None:
        padding = dilation * (kernel_size // 2)
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=False)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, norm: FrozenBatchNorm2d | None = None) -> Tensor:
        if norm is None:
            return super().forward(x)
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        return F.conv2d(x, self.weight * scale.view(-1, 1, 1, 1), shift, self.stride, self.padding, self.dilation)


def apply_norm(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """The norm of the convolution of `x`."""
    result: Tensor = conv(x, norm) if isinstance(norm, FrozenBatchNorm2d) else norm(conv(x))
    return result


class Block(nn.Module):
    """Two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1, beside a shortcut, projected where shapes differ."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        dilation: int,
        norm: Callable[[int], nn.Module],
        bottleneck: bool,
    ) -> None:
        super().__init__()
        out_channels = 4 * channels if bottleneck else channels
        if bottleneck:
            self.conv1 = Conv(in_channels, channels, 1)
            self.conv2 = Conv(channels, channels, 3, stride, dilation)
            self.conv3 = Conv(channels, out_channels, 1)
        else:
            self.conv1 = Conv(in_channels, channels, 3, stride, dilation)
            self.conv2 = Conv(channels, channels, 3, 1, dilation)
        self.bn1, self.bn2 = norm(channels), norm(channels)
        if bottleneck:
            self.bn3 = norm(out_channels)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.ModuleList([Conv(in_channels, out_channels, 1, stride), norm(out_channels)])
        self.bottleneck = bottleneck

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else apply_norm(self.downsample[0], self.downsample[1], x)
        x = F.relu(apply_norm(self.conv1, self.bn1, x), inplace=True)
        x = apply_norm(self.conv2, self.bn2, x)
        if self.bottleneck:
            x = apply_norm(self.conv3, self.bn3, F.relu(x, inplace=True))
        return F.relu(x.add_(shortcut), inplace=True)


class ResNet(nn.Module):
    """Feature map [B, num_channels, H/S, W/S] of images [B, 3, H, W], under torchvision's parameter names.

    `width` scales every channel count (1.0 is the published network). Stride 16 keeps the resolution of
    the last stage and dilates its 3x3 convolutions but those of its first block (the paper's DC5). `frozen` norm is
    for pretrained weights; `group` trains from scratch.
    """

    def __init__(self, name: str, width: float, stride: int, norm: str) -> None:
        super().__init__()
        bottleneck, depths = DEPTHS[name]
        norm_layer = NORMS[norm]
        planes = [int(width * channels) for channels in (64, 128, 256, 512)]
        self.conv1 = Conv(3, planes[0], 7, stride=2)
        self.bn1 = norm_layer(planes[0])
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        in_channels = planes[0]
        stages = []
        for stage, (channels, depth) in enumerate(zip(planes, depths, strict=True), start=1):
            dilated = stage == 4 and stride == 16
            blocks = []
            for index in range(depth):
                block_stride = 2 if index == 0 and stage > 1 and not dilated else 1
                dilation = 2 if index > 0 and dilated else 1
                blocks.append(Block(in_channels, channels, block_stride, dilation, norm_layer, bottleneck))
                in_channels = 4 * channels if bottleneck else channels
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.num_channels = in_channels

    def forward(self, images: Tensor) -> Tensor:
        features = self.maxpool(F.relu(apply_norm(self.conv1, self.bn1, images), inplace=True))
        return self.layer4(self.layer3(self.layer2(self.layer1(features))))


@torch.no_grad()
def fold_norms(backbone: ResNet) -> None:
    """Moves frozen norms into the weights before them; in place."""
    for parent in backbone.modules():
        names = [name for name, module in parent.named_children() if isinstance(module, Conv)]
        for name in names:
            conv, place = parent.get_submodule(name), "1" if name == "0" else name.replace("conv", "bn")
            norm = parent.get_submodule(place)
            if isinstance(norm, FrozenBatchNorm2d):
                statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
                conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, None, *statistics)  # type: ignore[arg-type]
                setattr(parent, place, nn.Identity())


def freeze_stem(backbone: ResNet) -> None:
    """Stops training of the stem and the first stage, as the paper does with pretrained weights."""
    for module in (backbone.conv1, backbone.bn1, backbone.layer1):
        module.requires_grad_(False)
