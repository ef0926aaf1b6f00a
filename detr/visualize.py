"""Pictures of detections, of what the model looks at, and of what its queries look for: figures 3, 6, 7 of the paper.

h w image size; H W padded size; S output stride; Q queries. Pictures are uint8 [3, height, width].
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_bounding_boxes

from detr.coco import CocoDataset, decode_image
from detr.model import DETR
from detr.transformer import Attention

COLOURS = ("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#46f0f0", "#f032e6", "#bcf60c")
HEAT = "#ffd000"
FONT_SIZE = 10  # of captions, as Pillow's own
PANEL = 238  # grey of an empty panel


def draw(
    image: Tensor,
    boxes_xyxy: Tensor,
    labels: list[int],
    captions: list[str],
    scale: int = 1,
    font: str | None = None,
) -> Tensor:
    """The image [3, h, w] uint8, enlarged `scale` times, with its boxes [t, 4] in one colour per label.

    `font` is a TrueType file that has the captions' letters; Pillow's own has those of Western Europe.
    """
    if scale > 1:
        image = F.interpolate(image[None], scale_factor=scale, mode="nearest")[0]
    if not len(boxes_xyxy):
        return image
    height, width = image.shape[1:]
    limit = torch.tensor([width - 1, height - 1, width - 1, height - 1])
    boxes = torch.minimum((boxes_xyxy * scale).clamp(min=0), limit)
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    return draw_bounding_boxes(image, boxes, captions, colours, width=2, font=font, font_size=font and FONT_SIZE)


def side_by_side(left: Tensor, right: Tensor, gap: int = 6) -> Tensor:
    """Two images [3, h, w] of one size beside each other on white."""
    return torch.cat([left, torch.full((3, left.shape[1], gap), 255, dtype=torch.uint8), right], dim=2)


def beside_truth(
    dataset: CocoDataset,
    detections: np.ndarray,
    index: int,
    threshold: float,
    names: Sequence[str] = (),
    font: str | None = None,
) -> Tensor:
    """Image `index` twice beside each other: with its true boxes, and with its detections of a score from `threshold`.

    Detections [n, 7] are as in `detr.detect`, of any images. Images smaller than 288 pixels are enlarged. Categories
    are called by `names`, in order, where these are given, in `font`, as in `draw`. ValueError names an image that does
    not decode.
    """
    record = dataset.annotations
    name = str(record.file_names[index])
    image = decode_image(dataset.archive.read(name), name)
    scale = max(1, 288 // max(image.shape[1:]))
    owned = slice(record.starts[index], record.starts[index + 1])
    boxes = torch.from_numpy(record.boxes_xyxy[owned])
    labels = record.labels[owned].tolist()
    names = names or record.category_names
    truth = draw(image, boxes, labels, [names[k] for k in labels], scale, font)
    shown = detections[(detections[:, 0] == record.image_ids[index]) & (detections[:, 5] >= threshold)]
    boxes = torch.from_numpy(shown[:, 1:5]).float()
    boxes[:, 2:] += boxes[:, :2]
    labels = np.searchsorted(record.category_ids, shown[:, 6]).tolist()
    captions = [f"{names[k]} {score:.2f}" for k, score in zip(labels, shown[:, 5], strict=True)]
    return side_by_side(truth, draw(image, boxes, labels, captions, scale, font))


def encoder_attention(
    model: DETR, images: Tensor, point_xy: tuple[float, float], padding: Tensor | None = None
) -> Tensor:
    """Where the last encoder layer looks from a point: weights [H/S, W/S] (sides rounded up) that sum to 1.

    images [1, 3, H, W] normalised and padding [1, H, W] bool are the model's own; the point is in pixels of the
    unpadded image, ValueError outside of it. Row i, column k stands for the S x S pixels from (k S, i S) on.
    Weights are means over heads, as in eval mode, and 0 in the padding. Source: paper, figure 3.
    """
    if not model.config.num_encoder_layers:
        raise ValueError("the model has 0 encoder layers, expected at least 1: only then it has encoder attention")
    weights = _weights(model, model.transformer.encoder.layers[-1].self_attn, images, padding)  # type: ignore[arg-type]
    height, width = images.shape[2:] if padding is None else [int((~padding[0]).any(dim=k).sum()) for k in (1, 0)]
    x, y = point_xy
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"the point (x, y) is {(x, y)}, expected one inside the image: x < {width}, y < {height}")
    stride = model.config.stride
    return weights[int(y // stride) * weights.shape[2] + int(x // stride)].clone()


def decoder_attention(model: DETR, images: Tensor, queries: Sequence[int], padding: Tensor | None = None) -> Tensor:
    """Where each of n queries (numbers in 0..Q-1) looks in the last decoder layer: weights [n, H/S, W/S].

    Images, padding and weights are as in `encoder_attention`. Source: paper, figure 6.
    """
    _check(queries, model.config.num_queries)
    attention: Attention = model.transformer.decoder.layers[-1].multihead_attn  # type: ignore[assignment]
    return _weights(model, attention, images, padding)[list(queries)]


def draw_encoder_attention(
    image: Tensor, weights: Tensor, point_xy: tuple[float, float], stride: int, scale: int = 1
) -> Tensor:
    """The image [3, h, w] uint8 in grey, enlarged `scale` times, weights [H/S, W/S] as heat, the point as a dot.

    The image is the model's input before normalisation and padding, the point is in its pixels. Heat runs from the
    least weight in the image (none) to the largest.
    """
    picture = _heat(image, weights[None], [HEAT], stride, scale)
    height, width = picture.shape[1:]
    x, y = (value * scale - 0.5 for value in point_xy)  # from edges of pixels to their centres
    distance = torch.hypot(torch.arange(height)[:, None] - y, torch.arange(width) - x)
    radius = max(2.0, min(height, width) / 60)
    return picture.masked_fill(distance < radius + 1.5, 0).masked_fill(distance < radius, 255)


def draw_decoder_attention(
    image: Tensor, weights: Tensor, boxes_xyxy: Tensor, labels: list[int], stride: int, scale: int = 1
) -> Tensor:
    """`draw` on a grey image, with each object's weights [n, H/S, W/S] as heat in the colour of its box [n, 4].

    Image and heat are as in `draw_encoder_attention`; without objects the image is untouched. Labels 0..n-1 give each
    object a colour of its own.
    """
    if not len(labels):
        return draw(image, boxes_xyxy, [], [], scale)
    picture = _heat(image, weights, [COLOURS[label % len(COLOURS)] for label in labels], stride, scale)
    return draw(picture, boxes_xyxy * scale, labels, [""] * len(labels))


def draw_slots(
    boxes_cxcywh: Tensor, slots: Sequence[int], columns: int = 5, side: int = 160, radius: int = 2, gap: int = 6
) -> Tensor:
    """Which boxes each of n query slots (numbers in 0..Q-1) predicts: panels of `side` pixels, `columns` in a row.

    boxes_cxcywh [N, Q, 4] are all predictions for N images, in fractions. A box is a dot at its centre: green if
    small, red if large and wide, blue if large and high, between them if between. Where dots overlap, their mean
    shows, so the order of images changes nothing. Source: paper, figure 7.
    """
    _check(slots, boxes_cxcywh.shape[1])
    if not len(slots):
        raise ValueError("slots are empty, expected at least one query slot")
    columns, step = min(columns, len(slots)), side + gap
    picture = torch.full((-(-len(slots) // columns) * step - gap, columns * step - gap, 3), 255, dtype=torch.uint8)
    for number, slot in enumerate(slots):
        top, left = number // columns * step, number % columns * step
        picture[top : top + side, left : left + side] = _panel(boxes_cxcywh[:, slot].cpu().double(), side, radius)
    return picture.permute(2, 0, 1).contiguous()


def _panel(boxes_cxcywh: Tensor, side: int, radius: int) -> Tensor:
    """The dots of boxes [N, 4] on [side, side, 3]; integer sums make it exact in any order."""
    wide, high = boxes_cxcywh[:, 2:].clamp(0, 1).unbind(1)
    colours = torch.stack([wide, (1 - torch.maximum(wide, high)) ** 2, high], dim=1)
    colours = 220 * (colours / colours.amax(1, keepdim=True)) ** 2
    disc = torch.cartesian_prod(*[torch.arange(-radius, radius + 1)] * 2)
    disc = disc[disc.square().sum(dim=1) <= radius**2]  # [K, 2]
    places = (boxes_cxcywh[:, None, :2] * side).floor().long() + disc  # [N, K, 2]
    shown = ((places >= 0) & (places < side)).all(dim=2)
    counted = F.pad(colours, (0, 1), value=1).round().long()[:, None].expand(-1, len(disc), -1)
    total = torch.zeros(side, side, 4, dtype=torch.int64)
    total.index_put_(places[shown].flip(1).unbind(1), counted[shown], accumulate=True)
    return torch.where(total[..., 3:] > 0, total[..., :3] // total[..., 3:].clamp(min=1), PANEL).to(torch.uint8)


def _heat(image: Tensor, weights: Tensor, colours: list[str], stride: int, scale: int) -> Tensor:
    """The enlarged image in grey under n colours, each more opaque where its weights [n, H/S, W/S] are larger."""
    height, width = (-(-size // stride) for size in image.shape[1:])
    if weights.shape[1] < height or weights.shape[2] < width:
        expected = f"at least {(height, width)} for an image {tuple(image.shape)} at stride {stride}"
        raise ValueError(f"weights are of {tuple(weights.shape[1:])} features, expected {expected}")
    picture = (0.6 * TF.rgb_to_grayscale(image.float(), 3)).round().to(torch.uint8)
    picture = draw(picture, torch.zeros(0, 4), [], [], scale)
    weights = weights[:, :height, :width].cpu().float()  # what lies in the padding does not show
    least, most = weights.amin((1, 2), keepdim=True), weights.amax((1, 2), keepdim=True)
    heats = (weights - least) / (most - least).clamp(min=1e-12)
    heats = F.interpolate(heats[None], scale_factor=stride * scale, mode="bicubic")[0].clamp(0, 1)
    for heat, colour in zip(heats[:, : picture.shape[1], : picture.shape[2]], colours, strict=True):
        rgb = torch.tensor([int(colour[k : k + 2], 16) for k in (1, 3, 5)])[:, None, None]
        picture = (picture + 0.8 * heat * (rgb - picture)).round().to(torch.uint8)
    return picture


def _check(queries: Sequence[int], num_queries: int) -> None:
    if wrong := [query for query in queries if not 0 <= query < num_queries]:
        raise ValueError(f"queries {wrong} do not exist, expected numbers in 0..{num_queries - 1}")


@torch.no_grad()
def _weights(model: DETR, attention: Attention, images: Tensor, padding: Tensor | None) -> Tensor:
    """softmax(Q K^T / sqrt(d)) [Nq, H/S, W/S], mean over heads, of what enters `attention` in eval mode.

    scaled_dot_product_attention, which does the model's work, does not return it.
    """
    if len(images) != 1:
        raise ValueError(f"images are {tuple(images.shape)}, expected one image [1, 3, H, W]")
    seen: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
    modes = [(module, module.training) for module in model.modules()]
    try:
        with attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs)):
            model.eval()(images, padding)
    finally:
        for module, training in modes:
            module.training = training
    query, key, _, attend = seen[0]
    packed = zip((query, key), attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=False)
    q, k = (F.linear(x[0], weight, bias).float().chunk(attention.num_heads, dim=1) for x, weight, bias in packed)
    hidden = torch.zeros_like(key[0, :, 0], dtype=torch.bool) if attend is None else ~attend.flatten()
    scores = ((a @ b.T / math.sqrt(a.shape[1])).masked_fill(hidden, -math.inf) for a, b in zip(q, k, strict=True))
    total = sum((score.softmax(dim=1) for score in scores), torch.zeros(()))  # head by head: a DC5 map is large
    return (total / attention.num_heads).unflatten(1, (-1, -(-images.shape[3] // model.config.stride)))
