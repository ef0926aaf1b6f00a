"""Hungarian matching. B images, Q queries, C classes, T targets, L decoder layers."""

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr.boxes import cxcywh_to_xyxy, generalized_iou


@dataclass(frozen=True)
class MatcherConfig:
    """Weights of the matching cost: `train.matcher` of params.yaml."""

    class_cost: float
    box_cost: float
    giou_cost: float


@torch.no_grad()
def match(
    logits: Tensor, boxes_cxcywh: Tensor, labels: Tensor, target_boxes: Tensor, valid: Tensor, config: MatcherConfig
) -> Tensor:
    """The query [L, B, T] matched to each target, -1 where there is none.

    logits [L, B, Q, C+1]; boxes_cxcywh [L, B, Q, 4]; labels [B, T]; target_boxes [B, T, 4] cxcywh;
    valid [B, T]. Every query is used at most once per layer and image; with more targets than queries the
    Q cheapest assignments are kept. All layers' costs are computed in float32 in one go and cross to the
    CPU in one transfer. Source: paper, equation 1 and appendix A.2. Raises ValueError on non-finite costs.
    """
    num_targets = labels.shape[1]
    probability = logits.float().softmax(dim=-1)  # [L, B, Q, C+1]
    index = labels[None, :, None, :].expand(*probability.shape[:3], num_targets)
    class_cost = -probability.gather(-1, index)  # [L, B, Q, T]
    boxes, targets = boxes_cxcywh.float()[..., :, None, :], target_boxes[None, :, None]
    box_cost = (boxes - targets).abs().sum(dim=-1)
    giou_cost = -generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets))
    cost = config.class_cost * class_cost + config.box_cost * box_cost + config.giou_cost * giou_cost
    costs = cost.cpu()
    if not costs.isfinite().all():
        raise ValueError("predictions are not finite: the matching cost has NaN or infinity; lower train.lr")
    columns = [row.nonzero().flatten() for row in valid.cpu()]
    matched = torch.full((*costs.shape[:2], num_targets), -1)
    for layer in range(costs.shape[0]):
        for image, column in enumerate(columns):
            queries, assigned = linear_sum_assignment(costs[layer, image][:, column].numpy())
            matched[layer, image, column[assigned]] = torch.from_numpy(queries)
    return matched.to(logits.device)
