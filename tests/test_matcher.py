from itertools import permutations

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import generalized_box_iou

from detr.boxes import cxcywh_to_xyxy
from detr.matcher import MatcherConfig, match

COSTS = MatcherConfig(class_cost=1.0, box_cost=5.0, giou_cost=2.0)


def predictions(num_layers=2, num_images=3, num_queries=5, num_classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_layers, num_images, num_queries, num_classes + 1, generator=generator)
    return logits, 0.1 + 0.4 * torch.rand(num_layers, num_images, num_queries, 4, generator=generator)


def targets(*counts, num_classes=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    valid = torch.arange(max(counts, default=0))[None] < torch.tensor(counts)[:, None]
    boxes = 0.1 + 0.4 * torch.rand(*valid.shape, 4, generator=generator)
    return torch.randint(num_classes, valid.shape, generator=generator), boxes, valid


def cost_matrix(logits, boxes, labels, target_boxes):
    """The matching cost of one layer and image, entry by entry."""
    cost = torch.zeros(len(logits), len(labels))
    for query in range(len(logits)):
        for target in range(len(labels)):
            probability = logits[query].exp()[labels[target]] / logits[query].exp().sum()
            distance = sum(abs(a - b) for a, b in zip(boxes[query], target_boxes[target], strict=True))
            overlap = generalized_box_iou(
                cxcywh_to_xyxy(boxes[query : query + 1]), cxcywh_to_xyxy(target_boxes[target : target + 1])
            )
            cost[query, target] = -probability + 5 * distance - 2 * overlap
    return cost


@pytest.mark.parametrize("counts", [(0, 0, 0), (0, 2, 5), (3, 1, 0), (1, 5, 2)])
def test_matching_equals_scipy_on_a_naive_cost(counts):
    logits, boxes = predictions()
    labels, target_boxes, valid = targets(*counts)
    matched = match(logits, boxes, labels, target_boxes, valid, COSTS)
    assert matched.shape == (2, 3, max(counts))
    for layer in range(2):
        for image, count in enumerate(counts):
            cost = cost_matrix(logits[layer, image], boxes[layer, image], labels[image, :count], target_boxes[image])
            queries, assigned = linear_sum_assignment(cost)
            expected = torch.full((max(counts),), -1)
            expected[assigned] = torch.from_numpy(queries)
            assert torch.equal(matched[layer, image], expected)


def test_no_permutation_is_cheaper():
    logits, boxes = predictions(1, 1, 5)
    labels, target_boxes, valid = targets(3)
    matched = match(logits, boxes, labels, target_boxes, valid, COSTS)[0, 0].tolist()
    cost = cost_matrix(logits[0, 0], boxes[0, 0], labels[0], target_boxes[0])
    cheapest = min(permutations(range(5), 3), key=lambda queries: sum(cost[q, t] for t, q in enumerate(queries)))
    assert matched == list(cheapest)


def test_perfect_predictions_are_matched_to_their_targets():
    labels, boxes, valid = targets(5)
    order = torch.tensor([3, 0, 4, 2, 1])
    logits = torch.nn.functional.one_hot(labels[:, order], 5).float()[None] * 10
    assert match(logits, boxes[None, :, order], labels, boxes, valid, COSTS)[0, 0].tolist() == order.argsort().tolist()


@pytest.mark.parametrize("counts", [(0, 0, 0), (0, 7, 3), (9, 1, 6)])
def test_every_query_is_used_once_and_every_target_that_can_be_is_matched(counts):
    matched = match(*predictions(), *targets(*counts), COSTS)
    for layer in range(2):
        for image, count in enumerate(counts):
            queries = [q for q in matched[layer, image].tolist() if q >= 0]
            assert len(queries) == len(set(queries)) == min(count, 5)
            assert (matched[layer, image, count:] == -1).all()


def test_with_more_targets_than_queries_the_cheapest_are_kept():
    logits, boxes = predictions(1, 1, 2)
    labels, target_boxes, valid = targets(4)
    matched = match(logits, boxes, labels, target_boxes, valid, COSTS)[0, 0]
    cost = cost_matrix(logits[0, 0], boxes[0, 0], labels[0], target_boxes[0])
    best = min(permutations(range(4), 2), key=lambda chosen: sum(cost[q, t] for q, t in enumerate(chosen)))
    assert matched[list(best)].tolist() == [0, 1]
    assert (matched >= 0).sum() == 2


def test_an_image_is_matched_as_if_alone():
    logits, boxes = predictions()
    labels, target_boxes, valid = targets(2, 0, 4)
    together = match(logits, boxes, labels, target_boxes, valid, COSTS)
    for image, count in enumerate((2, 0, 4)):
        part = slice(image, image + 1)
        alone = match(
            logits[:, part],
            boxes[:, part],
            labels[part, :count],
            target_boxes[part, :count],
            valid[part, :count],
            COSTS,
        )
        assert torch.equal(alone[:, 0], together[:, image, :count])


def test_permuted_queries_and_targets_give_the_permuted_matching():
    logits, boxes = predictions()
    labels, target_boxes, valid = targets(2, 0, 4)
    matched = match(logits, boxes, labels, target_boxes, valid, COSTS)
    queries = torch.tensor([3, 0, 4, 2, 1])
    permuted = match(logits[:, :, queries], boxes[:, :, queries], labels, target_boxes, valid, COSTS)
    assert torch.equal(torch.where(permuted >= 0, queries[permuted], -1), matched)
    order = torch.tensor([2, 0, 3, 1])
    permuted = match(logits, boxes, labels[:, order], target_boxes[:, order], valid[:, order], COSTS)
    assert torch.equal(permuted, matched[:, :, order])


def test_what_stands_in_unused_targets_changes_nothing():
    logits, boxes = predictions()
    labels, target_boxes, valid = targets(2, 0, 4)
    other_labels, other_boxes, _ = targets(4, 4, 4, seed=9)
    noisy = torch.where(valid, labels, other_labels), torch.where(valid[..., None], target_boxes, other_boxes)
    assert torch.equal(
        match(logits, boxes, *noisy, valid, COSTS), match(logits, boxes, labels, target_boxes, valid, COSTS)
    )


def test_half_precision_predictions_are_matched_in_float32():
    logits, boxes = predictions()
    logits, boxes, goal = logits.bfloat16(), boxes.bfloat16(), targets(2, 0, 4)
    assert torch.equal(match(logits, boxes, *goal, COSTS), match(logits.float(), boxes.float(), *goal, COSTS))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_predictions_that_are_not_finite_are_an_error(value, which):
    outputs = predictions()
    outputs[which][1, 2, 3] = value
    with pytest.raises(ValueError, match=r"predictions are not finite: .* lower train\.lr"):
        match(*outputs, *targets(2, 0, 4), COSTS)
