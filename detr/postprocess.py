"""Model outputs as detections. B images, Q queries, C classes, L decoder layers."""

import torch
from torch import Tensor

from detr.boxes import cxcywh_to_xyxy, to_float32


def postprocess(logits: Tensor, boxes_cxcywh: Tensor, sizes_hw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [B, Q] (0..1), labels [B, Q] in 0..C-1 and boxes_xyxy [B, Q, 4] in pixels of the original images.

    logits [L, B, Q, C+1] and boxes_cxcywh [L, B, Q, 4], of which the last layer counts; sizes_hw [B, 2] are the
    original sizes. Each query gives its likeliest class; "no object" is never an answer, only a low score.
    """
    scores, labels = to_float32(logits[-1]).softmax(dim=-1)[..., :-1].max(dim=-1)
    height, width = sizes_hw.unbind(dim=1)
    scale = torch.stack([width, height, width, height], dim=1)
    return scores, labels, cxcywh_to_xyxy(to_float32(boxes_cxcywh[-1])) * scale[:, None]
