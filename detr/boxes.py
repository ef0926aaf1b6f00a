"""Box formats, areas and generalized IoU.

`boxes_cxcywh` are centre x, centre y, width, height as fractions of the image (0..1).
`boxes_xyxy` are left, top, right, bottom, in pixels or fractions.
"""

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Corner boxes of centre boxes: [..., 4] -> [..., 4], same units."""
    centre, size = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """Centre boxes of corner boxes: [..., 4] -> [..., 4], same units."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def area(boxes_xyxy: Tensor) -> Tensor:
    """Areas [...] of boxes [..., 4]; an inverted box has area 0."""
    left, top, right, bottom = boxes_xyxy.unbind(-1)
    return (right - left).clamp(min=0) * (bottom - top).clamp(min=0)


def generalized_iou(boxes_xyxy: Tensor, others_xyxy: Tensor) -> Tensor:
    """Generalized IoU [...] in [-1, 1] of two broadcastable box tensors [..., 4].

    Pairwise over two lists is `generalized_iou(a[:, None], b[None])`. Two boxes without area in the
    same place give 0, not NaN, so a degenerate annotation cannot poison a loss.
    Source: Rezatofighi et al., CVPR 2019, Algorithm 1.
    """
    left, top, right, bottom = boxes_xyxy.unbind(-1)
    other_left, other_top, other_right, other_bottom = others_xyxy.unbind(-1)
    width = torch.minimum(right, other_right) - torch.maximum(left, other_left)
    height = torch.minimum(bottom, other_bottom) - torch.maximum(top, other_top)
    overlap = width.clamp(min=0) * height.clamp(min=0)
    union = area(boxes_xyxy) + area(others_xyxy) - overlap
    hull_width = torch.maximum(right, other_right) - torch.minimum(left, other_left)
    hull_height = torch.maximum(bottom, other_bottom) - torch.minimum(top, other_top)
    hull = hull_width * hull_height
    tiny = torch.finfo(union.dtype).tiny
    return overlap / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def to_float32(values: Tensor) -> Tensor:
    """The values in float32 at least: box arithmetic in half precision would be off by pixels."""
    return values if values.dtype == torch.float64 else values.float()
