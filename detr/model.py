"""DETR. B images, Q queries, C classes, L decoder layers, D hidden, H W padded size, S output stride."""

import math
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr.backbone import DEPTHS, NORMS, ResNet, fold_norms
from detr.config import Key, check_keys
from detr.position import LearnedPosition, NoPosition, SinePosition
from detr.transformer import LayerShape, Transformer


@dataclass(frozen=True)
class ModelConfig:
    """The architecture: the `model` section of params.yaml."""

    backbone: Annotated[str, Key("the residual network that looks at the image first", choices=tuple(DEPTHS))]
    backbone_width: Annotated[float, Key("channels of the backbone, times the published ones", gt=0)]
    backbone_norm: Annotated[
        str,
        Key(
            "norm layers of the backbone: frozen for pretrained weights, group for random ones",
            choices=tuple(NORMS),
        ),
    ]
    backbone_weights: Annotated[
        str, Key("weights that the backbone starts from: none (random), imagenet (downloaded) or a file")
    ]
    stride: Annotated[
        int, Key("pixels of the image per feature, along each side; 16 is the paper's DC5", choices=(16, 32))
    ]
    position: Annotated[str, Key("the position encoding", choices=("sine", "learned", "none"))]
    position_temperature: Annotated[
        float, Key("temperature of the sine encoding: 10000 in the paper, 20 suits small feature maps", gt=0)
    ]
    hidden_dim: Annotated[int, Key("features per token of the transformer; a multiple of num_heads", ge=1)]
    num_heads: Annotated[int, Key("attention heads", ge=1)]
    dim_feedforward: Annotated[int, Key("features inside the feed-forward network of each transformer layer", ge=1)]
    num_encoder_layers: Annotated[int, Key("layers of the encoder", ge=0)]
    num_decoder_layers: Annotated[int, Key("layers of the decoder", ge=1)]
    num_queries: Annotated[int, Key("object queries: the most objects that can be found in one image", ge=1)]
    dropout: Annotated[float, Key("share of features that training drops at random", ge=0, lt=1)]
    attention_dropout: Annotated[
        float, Key("share of attention weights that training drops; 0 lets faster, fused kernels run", ge=0, lt=1)
    ]
    pre_norm: Annotated[bool, Key("layer norm before attention and feed-forward; false, as in the paper: after them")]

    def __post_init__(self) -> None:
        check_keys(self, "model")
        parts = math.lcm(self.num_heads, {"sine": 4, "learned": 2, "none": 1}[self.position])
        if self.hidden_dim % parts:
            above = -(-self.hidden_dim // parts) * parts
            raise ValueError(
                f"model.hidden_dim is {self.hidden_dim}, expected a multiple of {parts}, as model.num_heads "
                f"{self.num_heads} and model.position {self.position} want it; {above} is one"
            )


class DETR(nn.Module):
    """Class logits [L, B, Q, C+1] and boxes_cxcywh [L, B, Q, 4] (0..1) of normalised images [B, 3, H, W].

    `padding` [B, H, W] is True outside each image; None stands for images of one size. The last logit is "no
    object". The last entry along L is the prediction; the others feed the auxiliary losses. Invariants: an image's
    result does not depend on its batch mates nor on pixels in the padding. The amount of padding counts, as in the
    authors' code: the backbone's convolutions (and group norm) reach into it; `detect_each` therefore batches images of
    one size. Source: paper, section 3.2.
    """

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        dim = config.hidden_dim
        self.backbone = ResNet(config.backbone, config.backbone_width, config.stride, config.backbone_norm)
        self.position: nn.Module
        if config.position == "sine":
            self.position = SinePosition(dim, config.position_temperature)
        else:
            self.position = LearnedPosition(dim) if config.position == "learned" else NoPosition(dim)
        self.input_proj = nn.Conv2d(self.backbone.num_channels, dim, 1)
        shape = LayerShape(
            dim, config.num_heads, config.dim_feedforward, config.dropout, config.attention_dropout, config.pre_norm
        )
        self.transformer = Transformer(config.num_encoder_layers, config.num_decoder_layers, shape)
        self.query_embed = nn.Embedding(config.num_queries, dim)
        self.class_embed = nn.Linear(dim, num_classes + 1)
        self.bbox_embed = MLP(dim, dim, 4, num_layers=3)

    def forward(self, images: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        _check(images, padding)
        features = self.input_proj(self.backbone(images))  # [B, D, H/S, W/S]
        batch, _, height, width = features.shape
        if padding is None:
            feature_padding = features.new_zeros(batch, height, width, dtype=torch.bool)
        else:
            feature_padding = shrink_padding(padding, height, width)
        position = self.position(feature_padding)
        outputs = self.transformer(
            features.flatten(2).transpose(1, 2),
            position.flatten(2).transpose(1, 2),
            None if padding is None else feature_padding.flatten(1),
            self.query_embed.weight,
        )  # [L, B, Q, D]
        device = images.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):  # half precision would round boxes to whole pixels
                return self._heads(outputs.float())
        return self._heads(outputs)

    def _heads(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.class_embed(outputs), self.bbox_embed(outputs).sigmoid()


def _check(images: Tensor, padding: Tensor | None) -> None:
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype} {tuple(images.shape)}, expected normalised floating point [B, 3, H, W]; "
            "see detr.normalize"
        )
    if padding is not None and (padding.dtype != torch.bool or padding.shape != (images.shape[0], *images.shape[2:])):
        raise ValueError(
            f"padding is {padding.dtype} {tuple(padding.shape)}, expected bool [B, H, W] for images "
            f"{tuple(images.shape)}, True outside each image"
        )


def shrink_padding(padding: Tensor, height: int, width: int) -> Tensor:
    """Padding [B, height, width] of features: that of the pixels that nearest-neighbour F.interpolate takes.

    In whole numbers, because onnxruntime rounds F.interpolate's fractions to other pixels at some sizes.
    """
    rows = torch.arange(height, device=padding.device) * padding.shape[1] // height
    columns = torch.arange(width, device=padding.device) * padding.shape[2] // width
    return padding.index_select(1, rows).index_select(2, columns)


class MLP(nn.Module):
    """Linear layers with ReLU between: [..., in_dim] -> [..., out_dim]."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int) -> None:
        super().__init__()
        dims = [in_dim] + [hidden_dim] * (num_layers - 1) + [out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def for_inference(model: DETR) -> DETR:
    """A copy in eval mode that answers the same faster: norms folded into convolutions, channels last, no gradients.

    It is for answers alone: training and saving go on with the original.
    """
    model = deepcopy(model).eval().requires_grad_(False)
    fold_norms(model.backbone)
    return model.to(memory_format=torch.channels_last)
