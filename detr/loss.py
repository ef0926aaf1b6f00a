"""The set loss. B images, Q queries, C classes, T targets of all images, L decoder layers."""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from detr.batch import Targets
from detr.boxes import cxcywh_to_xyxy, generalized_iou, to_float32
from detr.config import Key, check_keys
from detr.matcher import MatcherConfig, match_targets


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms: `train.loss` of params.yaml."""

    class_weight: Annotated[float, Key("weight of the cross-entropy of classes", ge=0)]
    box_weight: Annotated[float, Key("weight of the L1 distance of boxes", ge=0)]
    giou_weight: Annotated[float, Key("weight of the generalised IoU of boxes", ge=0)]
    no_object_weight: Annotated[float, Key('weight of the class "no object" within the cross-entropy', ge=0)]
    auxiliary: Annotated[bool, Key("a loss after every decoder layer, not after the last one only")]

    def __post_init__(self) -> None:
        check_keys(self, "train.loss")
        if not any((self.class_weight, self.box_weight, self.giou_weight)):
            raise ValueError("train.loss has weights of 0 alone, by which nothing is learnt")


def count_totals(targets: Targets, num_queries: int) -> Tensor:
    """What the losses of a batch are divided by [3]: its images, its targets, and those of them that find a query.

    float64, on the CPU, from the counts alone. The totals of a global batch are the sum over its parts.
    """
    matched = sum(min(count, num_queries) for count in targets.counts)
    return torch.tensor([len(targets.counts), sum(targets.counts), matched], dtype=torch.float64)


def set_loss(
    logits: Tensor,
    boxes_cxcywh: Tensor,
    targets: Targets,
    totals: Tensor,
    matcher: MatcherConfig,
    config: LossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to minimise and its unweighted parts per decoder layer.

    logits [L, B, Q, C+1]; boxes_cxcywh [L, B, Q, 4]; `totals` [3] are the `count_totals` of the global batch that these
    images are a part of. Invariant: losses and parts of the parts of a batch add up to those of the whole.
    Parts: `loss_class`, `loss_box`, `loss_giou`, `cardinality_error`, each [L], and `class_error` [], the
    percentage of matched queries of the last layer with a wrong class: NaN for a global batch without targets, of which
    the authors' code says 100.
    Source: paper, equations 2 to 4, appendix A.2.
    """
    if not config.auxiliary:
        logits, boxes_cxcywh = logits[-1:], boxes_cxcywh[-1:]
    logits, boxes_cxcywh = to_float32(logits), to_float32(boxes_cxcywh)
    matched = match_targets(logits, boxes_cxcywh, targets, matcher)  # [L, T]
    totals = totals.to(logits.dtype)
    loss_class = class_loss(logits, targets, matched, totals, config.no_object_weight)
    loss_box, loss_giou = box_losses(boxes_cxcywh, targets, matched, totals)
    total = (config.class_weight * loss_class + config.box_weight * loss_box + config.giou_weight * loss_giou).sum()
    cardinality_error, class_error = count_errors(logits, targets, matched, totals)
    parts = {
        "loss_class": loss_class.detach(),
        "loss_box": loss_box.detach(),
        "loss_giou": loss_giou.detach(),
        "cardinality_error": cardinality_error,
        "class_error": class_error,
    }
    return total, parts


def class_loss(logits: Tensor, targets: Targets, matched: Tensor, totals: Tensor, no_object_weight: float) -> Tensor:
    """The weighted cross-entropy [L] of all queries; unmatched ones should say "no object"."""
    num_layers, num_images, num_queries, slots = logits.shape
    no_object = slots - 1
    all_images, _, all_matched = totals
    layer = torch.arange(num_layers, device=logits.device)[:, None]
    classes = torch.full((num_layers, num_images, num_queries + 1), no_object, device=logits.device)
    classes[layer, targets.owners, matched] = targets.labels  # of unmatched targets in the spare column, -1
    classes = classes[..., :-1]  # [L, B, Q]
    weight = logits.new_ones(slots)
    weight[no_object] = no_object_weight
    entropy = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), weight, reduction="none").view_as(classes)
    weights = all_matched + no_object_weight * (all_images * num_queries - all_matched)
    return entropy.sum(dim=(1, 2)) / weights


def box_losses(boxes_cxcywh: Tensor, targets: Targets, matched: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """The L1 distance and 1 - generalized IoU of matched queries, each [L]."""
    layer = torch.arange(len(matched), device=matched.device)[:, None]
    predicted = boxes_cxcywh[layer, targets.owners, matched]  # [L, T, 4]
    target = targets.boxes_cxcywh.to(predicted.dtype)
    distance = (predicted - target).abs().sum(dim=-1)  # [L, T]
    overlap = generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(target))
    found, num_targets = matched >= 0, totals[1].clamp(min=1)
    loss_box = torch.where(found, distance, 0.0).sum(dim=1) / num_targets
    loss_giou = torch.where(found, 1 - overlap, 0.0).sum(dim=1) / num_targets
    return loss_box, loss_giou


@torch.no_grad()
def count_errors(logits: Tensor, targets: Targets, matched: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """The cardinality error [L] and the class error [] of `set_loss`."""
    guess = logits.argmax(dim=-1)  # [L, B, Q]
    images = torch.arange(logits.shape[1], device=logits.device)[:, None]
    counts = (targets.owners == images).sum(dim=1)  # [B]
    cardinality_error = ((guess != logits.shape[3] - 1).sum(dim=2) - counts).abs().sum(dim=1) / totals[0]
    wrong = (guess[-1, targets.owners, matched[-1]] != targets.labels) & (matched[-1] >= 0)
    return cardinality_error, 100 * wrong.sum() / totals[2]
