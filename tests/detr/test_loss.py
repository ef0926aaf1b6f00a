import math
import warnings
from dataclasses import replace
from itertools import permutations

import pytest
import torch

from detr.batch import Targets
from detr.loss import LossConfig, count_totals, set_loss
from detr.matcher import MatcherConfig

MATCHER = MatcherConfig(class_cost=1.0, box_cost=5.0, giou_cost=2.0)
LOSS = LossConfig(class_weight=1.5, box_weight=5.0, giou_weight=2.0, no_object_weight=0.1, auxiliary=True)
NUM_CLASSES = 3


def predictions(num_layers=2, num_images=2, num_queries=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_layers, num_images, num_queries, NUM_CLASSES + 1, generator=generator)
    boxes = 0.1 + 0.4 * torch.rand(num_layers, num_images, num_queries, 4, generator=generator)
    return logits.requires_grad_(), boxes.requires_grad_()


def targets_of(*counts, seed=1):
    generator = torch.Generator().manual_seed(seed)
    boxes = [0.1 + 0.4 * torch.rand(count, 4, generator=generator) for count in counts]
    return Targets.join(boxes, [torch.randint(NUM_CLASSES, (count,), generator=generator) for count in counts])


def loss_of(logits, boxes, targets, config=LOSS):
    return set_loss(logits, boxes, targets, count_totals(targets, logits.shape[2]), MATCHER, config)


def giou(a, b):
    """Of two centre boxes, in numbers."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = ((x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in (a, b))
    overlap = max(0, min(ax1, bx1) - max(ax0, bx0)) * max(0, min(ay1, by1) - max(ay0, by0))
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - overlap
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return overlap / union - (hull - union) / hull


def naive_layer(logits, boxes, goals):
    """(loss_class, loss_box, loss_giou, cardinality_error) of one layer, as equations 1 to 4 of the paper read."""
    entropy = weights = box_loss = giou_loss = cardinality = 0.0
    for image, goal in enumerate(goals):
        probability = [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in logits[image].tolist()]
        predicted = boxes[image].tolist()

        def distance(query, target, predicted=predicted):
            return sum(abs(a - b) for a, b in zip(predicted[query], target, strict=True))

        def cost(queries, goal=goal, probability=probability, predicted=predicted, distance=distance):
            return sum(
                -probability[q][label] + 5 * distance(q, box) - 2 * giou(predicted[q], box)
                for q, (label, box) in zip(queries, goal, strict=True)
            )

        chosen = min(permutations(range(len(predicted)), len(goal)), key=cost)
        classes = [NUM_CLASSES] * len(predicted)
        for query, (label, box) in zip(chosen, goal, strict=True):
            classes[query] = label
            box_loss += distance(query, box)
            giou_loss += 1 - giou(predicted[query], box)
        for query, label in enumerate(classes):
            weight = 0.1 if label == NUM_CLASSES else 1.0
            entropy -= weight * math.log(probability[query][label])
            weights += weight
        found = sum(row.index(max(row)) != NUM_CLASSES for row in probability)
        cardinality += abs(found - len(goal)) / len(goals)
    num_boxes = max(1, sum(map(len, goals)))
    return entropy / weights, box_loss / num_boxes, giou_loss / num_boxes, cardinality


@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (2, 1), (4, 4), (1, 0, 3)])
def test_the_loss_equals_a_naive_one(counts):
    logits, boxes = predictions(num_images=len(counts))
    targets = targets_of(*counts)
    total, parts = loss_of(logits, boxes, targets)
    pairs = list(zip(targets.labels.tolist(), targets.boxes_cxcywh.tolist(), strict=True))
    goals = [
        [pair for pair, i in zip(pairs, targets.owners.tolist(), strict=True) if i == k] for k in range(len(counts))
    ]
    layers = [naive_layer(logits[layer], boxes[layer], goals) for layer in range(2)]
    names = ("loss_class", "loss_box", "loss_giou", "cardinality_error")
    for name, expected in zip(names, zip(*layers, strict=True), strict=True):
        torch.testing.assert_close(parts[name], torch.tensor(expected), rtol=1e-4, atol=1e-5)
    expected = sum(1.5 * a + 5 * b + 2 * c for a, b, c, _ in layers)
    torch.testing.assert_close(total, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (7, 2)])
def test_gradients_are_finite_and_reach_the_boxes_of_matched_queries_only(counts):
    logits, boxes = predictions()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "an image has 7 targets")
        total, _ = loss_of(logits, boxes, targets_of(*counts))
    total.backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().sum(-1).all()
    assert boxes.grad.isfinite().all()
    reached = boxes.grad.abs().sum(-1) > 0
    assert reached.sum(-1).tolist() == [[min(n, 4) for n in counts]] * 2


def test_perfect_predictions_cost_nothing():
    targets = targets_of(4, 4)
    logits = (torch.nn.functional.one_hot(targets.labels.view(2, 4), NUM_CLASSES + 1) * 100.0)[None]
    total, parts = loss_of(logits, targets.boxes_cxcywh.view(1, 2, 4, 4), targets)
    torch.testing.assert_close(total, torch.tensor(0.0), rtol=0, atol=1e-5)
    assert parts["class_error"] == 0
    assert parts["cardinality_error"].tolist() == [0.0]


def test_more_targets_than_queries():
    targets = targets_of(9, 2)
    with pytest.warns(UserWarning, match="5 targets stay unmatched"):
        total, parts = loss_of(*predictions(), targets)
    assert total.isfinite()
    assert all(value.isfinite().all() for value in parts.values())


def test_the_order_of_queries_and_of_targets_changes_nothing():
    logits, boxes = predictions()
    targets = targets_of(3, 1)
    total, parts = loss_of(logits, boxes, targets)
    queries, order = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 0, 3])
    shuffled = replace(targets, boxes_cxcywh=targets.boxes_cxcywh[order], labels=targets.labels[order])
    for result, other in (
        loss_of(logits[:, :, queries], boxes[:, :, queries], targets),
        loss_of(logits, boxes, shuffled),
    ):
        torch.testing.assert_close(result, total)
        for name, value in parts.items():
            torch.testing.assert_close(other[name], value)


def test_without_auxiliary_losses_the_last_layer_counts_alone():
    logits, boxes = predictions(num_layers=3)
    targets = targets_of(3, 1)
    total, parts = loss_of(logits, boxes, targets, replace(LOSS, auxiliary=False))
    expected, expected_parts = loss_of(logits[-1:], boxes[-1:], targets)
    assert total == expected
    assert parts["loss_box"].shape == (1,)
    assert all(torch.equal(parts[name], value) for name, value in expected_parts.items())


def test_class_error_is_the_percentage_of_matched_queries_with_a_wrong_class():
    targets = targets_of(4)
    classes = targets.labels.clone()
    classes[0] = (classes[0] + 1) % NUM_CLASSES
    logits = (torch.nn.functional.one_hot(classes, NUM_CLASSES + 1) * 5.0)[None, None]
    assert loss_of(logits, targets.boxes_cxcywh[None, None], targets)[1]["class_error"] == 25


def test_without_targets_there_is_no_class_error():
    """Neither 0 nor, as by the authors, 100 would be true."""
    assert loss_of(*predictions(), targets_of(0, 0))[1]["class_error"].isnan()


@pytest.mark.filterwarnings("ignore:an image has:UserWarning")
@pytest.mark.parametrize("counts", [(3, 1, 0, 2), (0, 0, 0, 0), (6, 5, 0, 1)])
def test_the_parts_of_a_batch_add_up_to_the_whole(counts):
    """However it is cut into micro-batches; with more targets than queries too."""
    logits, boxes = (value.detach().double().requires_grad_() for value in predictions(num_images=4))
    whole = targets_of(*counts)
    totals = count_totals(whole, logits.shape[2])
    assert totals.tolist() == [4, sum(counts), sum(min(count, 4) for count in counts)]
    expected, expected_parts = set_loss(logits, boxes, whole, totals, MATCHER, LOSS)
    expected_gradients = torch.autograd.grad(expected, (logits, boxes))
    for cuts in ((1, 3), (2, 2), (1, 1, 1, 1)):
        loss, parts, start = 0.0, {}, 0
        for size in cuts:
            chosen = slice(start, start + size)
            first, last = sum(counts[:start]), sum(counts[: start + size])
            some = Targets.join(
                whole.boxes_cxcywh[first:last].split(counts[chosen]), whole.labels[first:last].split(counts[chosen])
            )
            share, found = set_loss(logits[:, chosen], boxes[:, chosen], some, totals, MATCHER, LOSS)
            loss = loss + share
            parts = {name: parts.get(name, 0) + value for name, value in found.items()}
            start += size
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(parts, expected_parts, rtol=1e-12, atol=1e-12, equal_nan=True)
        torch.testing.assert_close(
            torch.autograd.grad(loss, (logits, boxes)), expected_gradients, rtol=1e-9, atol=1e-12
        )


def test_half_precision_outputs_give_a_float32_loss():
    logits, boxes = predictions()
    total, _ = loss_of(logits.bfloat16(), boxes.bfloat16(), targets_of(3, 1))
    expected, _ = loss_of(logits.bfloat16().float(), boxes.bfloat16().float(), targets_of(3, 1))
    assert total.dtype == torch.float32
    assert total == expected
