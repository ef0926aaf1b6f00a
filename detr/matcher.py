"""Hungarian matching. B images, Q queries, C classes, T targets of all images, L decoder layers."""

import warnings
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Annotated, NoReturn

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr.batch import Targets
from detr.boxes import cxcywh_to_xyxy, generalized_iou, to_float32
from detr.config import Key, check_keys


@dataclass(frozen=True)
class MatcherConfig:
    """Weights of the matching cost: `train.matcher` of params.yaml."""

    class_cost: Annotated[float, Key("weight of the class probability in the cost of a match", ge=0)]
    box_cost: Annotated[float, Key("weight of the L1 distance of boxes", ge=0)]
    giou_cost: Annotated[float, Key("weight of the generalised IoU of boxes", ge=0)]

    def __post_init__(self) -> None:
        check_keys(self, "train.matcher")
        if not any(asdict(self).values()):
            raise ValueError("train.matcher has costs of 0 alone, by which no query is nearer than another")


@torch.no_grad()
def match_targets(logits: Tensor, boxes_cxcywh: Tensor, targets: Targets, config: MatcherConfig) -> Tensor:
    """The query [L, T] matched to each target, -1 where there is none.

    logits [L, B, Q, C+1]; boxes_cxcywh [L, B, Q, 4]. Every query is used at most once per layer and image; with more
    targets than queries the Q cheapest are matched, and a warning counts the others. Costs are in float32 at
    least, are computed for a target and the queries of its own image only, and cross to the CPU in one transfer.
    Source: paper, equation 1 and appendix A.2. Raises ValueError on targets that are out of range and on
    predictions that are not finite.
    """
    surplus = max(targets.counts, default=0) - logits.shape[2]
    if surplus > 0:
        warnings.warn(
            f"an image has {surplus + logits.shape[2]} targets, the model {logits.shape[2]} queries: {surplus} targets "
            "stay unmatched; raise model.num_queries",
            stacklevel=2,
        )
    chunk = 1 if logits.device.type == "cpu" else len(logits)  # a layer at a time stays in a CPU's cache
    chunks = zip(to_float32(logits).split(chunk), to_float32(boxes_cxcywh).split(chunk), strict=True)
    parts = torch.cat([_compute_costs(*layers, targets, config) for layers in chunks])  # [L, T * Q + 1]
    found = parts.cpu().double().numpy()  # the one wait for the device; double is scipy's own type
    if not found[:, -1].all():
        raise ValueError("predictions are not finite; lower train.lr")
    costs = found[:, :-1].reshape(len(found), -1, logits.shape[2])  # [L, T, Q]
    matched = torch.full(costs.shape[:2], -1)  # [L, T]
    starts = [0, *accumulate(targets.counts)]
    for layer, row in zip(costs, matched.numpy(), strict=True):
        for start, end in pairwise(starts):
            try:
                assigned, queries = linear_sum_assignment(layer[start:end])
            except ValueError:  # there is NaN in the costs
                _explain_nan(logits, targets)
            if len(queries) == end - start:
                row[start:end] = queries
            else:
                row[start + assigned] = queries
    return matched.to(logits.device)


def _compute_costs(logits: Tensor, boxes_cxcywh: Tensor, targets: Targets, config: MatcherConfig) -> Tensor:
    """The matching cost of each target and query, and whether all predictions are finite, 1 or 0: [L, T * Q + 1].

    The cost is NaN for targets that cannot be. Both are one tensor, so that they cross to the CPU together. Coordinates
    are laid out as planes [L, T, Q]: everything here is bound by memory.
    """
    labels = targets.labels.clamp(0, logits.shape[3] - 2)
    probabilities = logits.softmax(dim=-1)
    probability = probabilities[:, targets.owners, :, labels].transpose(0, 1)  # [L, T, Q]

    def beside(boxes: Tensor) -> Tensor:
        """Of queries [L, B, Q, 4], those beside each target [L, T, Q, 4]."""
        return boxes.permute(3, 0, 1, 2).contiguous().index_select(2, targets.owners).movedim(0, -1)

    target = targets.boxes_cxcywh.to(boxes_cxcywh.dtype)
    giou = generalized_iou(beside(cxcywh_to_xyxy(boxes_cxcywh)), cxcywh_to_xyxy(target)[:, None])
    distance = beside(boxes_cxcywh).sub_(target[:, None]).abs_().sum(dim=-1)
    cost = distance.mul_(config.box_cost).sub_(probability, alpha=config.class_cost).sub_(giou, alpha=config.giou_cost)
    wrong = (targets.labels != labels) | ((target - 0.5).abs() > 0.51).any(dim=-1)
    finite = (probabilities[..., -1].sum() + boxes_cxcywh.sum()).isfinite()
    cost.masked_fill_(wrong[:, None], torch.nan)
    return torch.cat([cost.flatten(1), finite.to(cost.dtype).expand(len(cost), 1)], dim=1)


def _explain_nan(logits: Tensor, targets: Targets) -> NoReturn:
    """Raises ValueError that says why a cost is not a number."""
    num_classes = logits.shape[3] - 1
    columns = (targets.labels, targets.boxes_cxcywh, targets.owners)
    for label, box, owner in zip(*(column.tolist() for column in columns), strict=True):
        if not 0 <= label < num_classes:
            raise ValueError(
                f"image {owner} of the batch has label {label}, the model's are 0..{num_classes - 1}; "
                "build the model with the number of classes of the data"
            )
        if not all(-0.01 <= value <= 1.01 for value in box):
            raise ValueError(
                f"image {owner} of the batch has target box {[round(v, 4) for v in box]}, expected centre x, centre y, "
                "width, height as fractions of the image; see detr.boxes.xyxy_to_cxcywh"
            )
    raise ValueError("the matching cost is not a number: a class logit is not finite; lower train.lr")
