from itertools import permutations

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.overrides import TorchFunctionMode
from torchvision.ops import generalized_box_iou

from detr.batch import Targets
from detr.boxes import cxcywh_to_xyxy
from detr.matcher import MatcherConfig, match_targets

COSTS = MatcherConfig(class_cost=1.0, box_cost=5.0, giou_cost=2.0)


def predictions(num_layers=2, num_images=3, num_queries=5, num_classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_layers, num_images, num_queries, num_classes + 1, generator=generator)
    return logits, 0.1 + 0.4 * torch.rand(num_layers, num_images, num_queries, 4, generator=generator)


def targets(*counts, num_classes=4, seed=1):
    """Per image: boxes [t, 4] and labels [t]."""
    generator = torch.Generator().manual_seed(seed)
    boxes = [0.1 + 0.4 * torch.rand(count, 4, generator=generator) for count in counts]
    return boxes, [torch.randint(num_classes, (count,), generator=generator) for count in counts]


def matching(outputs, boxes, labels):
    """The matched queries of each layer and image, as lists."""
    goal = Targets.join(boxes, labels)
    return [[part.tolist() for part in row.split(goal.counts)] for row in match_targets(*outputs, goal, COSTS)]


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
    target_boxes, labels = targets(*counts)
    matched = matching((logits, boxes), target_boxes, labels)
    for layer in range(2):
        for image, count in enumerate(counts):
            cost = cost_matrix(logits[layer, image], boxes[layer, image], labels[image], target_boxes[image])
            queries, assigned = linear_sum_assignment(cost)
            expected = [-1] * count
            for query, target in zip(queries, assigned, strict=True):
                expected[target] = query
            assert matched[layer][image] == expected


def test_no_permutation_is_cheaper():
    logits, boxes = predictions(1, 1, 5)
    target_boxes, labels = targets(3)
    cost = cost_matrix(logits[0, 0], boxes[0, 0], labels[0], target_boxes[0])
    cheapest = min(permutations(range(5), 3), key=lambda queries: sum(cost[q, t] for t, q in enumerate(queries)))
    assert matching((logits, boxes), target_boxes, labels) == [[list(cheapest)]]


def test_perfect_predictions_are_matched_to_their_targets():
    boxes, labels = targets(5)
    order = torch.tensor([3, 0, 4, 2, 1])
    logits = torch.nn.functional.one_hot(labels[0][order], 5).float()[None, None] * 10
    assert matching((logits, boxes[0][order][None, None]), boxes, labels) == [[order.argsort().tolist()]]


@pytest.mark.parametrize("counts", [(0, 0, 0), (0, 5, 3), (4, 1, 5)])
def test_every_query_is_used_once_and_every_target_is_matched(counts):
    for layer in matching(predictions(), *targets(*counts)):
        for queries, count in zip(layer, counts, strict=True):
            assert len(set(queries) - {-1}) == count


def test_with_more_targets_than_queries_the_cheapest_are_kept_and_the_others_counted():
    logits, boxes = predictions(1, 1, 2)
    target_boxes, labels = targets(4)
    with pytest.warns(
        UserWarning, match="has 4 targets, the model 2 queries: 2 targets stay unmatched; raise model.num_queries"
    ):
        ((matched,),) = matching((logits, boxes), target_boxes, labels)
    cost = cost_matrix(logits[0, 0], boxes[0, 0], labels[0], target_boxes[0])
    best = min(permutations(range(4), 2), key=lambda chosen: sum(cost[q, t] for q, t in enumerate(chosen)))
    assert [matched[target] for target in best] == [0, 1]
    assert sorted(matched) == [-1, -1, 0, 1]


def test_an_image_is_matched_as_if_alone():
    logits, boxes = predictions()
    target_boxes, labels = targets(2, 0, 4)
    together = matching((logits, boxes), target_boxes, labels)
    for image in range(3):
        part = slice(image, image + 1)
        alone = matching((logits[:, part], boxes[:, part]), target_boxes[part], labels[part])
        assert [layer[0] for layer in alone] == [layer[image] for layer in together]


def test_permuted_queries_and_targets_give_the_permuted_matching():
    logits, boxes = predictions()
    target_boxes, labels = targets(2, 0, 4)
    matched = matching((logits, boxes), target_boxes, labels)
    queries = torch.tensor([3, 0, 4, 2, 1])
    permuted = matching((logits[:, :, queries], boxes[:, :, queries]), target_boxes, labels)
    assert [[queries[image].tolist() for image in layer] for layer in permuted] == matched
    order = [1, 0], [], [2, 0, 3, 1]
    shuffled = ([values[list(o)] for values, o in zip(side, order, strict=True)] for side in (target_boxes, labels))
    expected = [[[image[k] for k in o] for image, o in zip(layer, order, strict=True)] for layer in matched]
    assert matching((logits, boxes), *shuffled) == expected


def test_half_precision_predictions_are_matched_in_float32():
    logits, boxes = predictions()
    logits, boxes, goal = logits.bfloat16(), boxes.bfloat16(), targets(2, 0, 4)
    assert matching((logits, boxes), *goal) == matching((logits.float(), boxes.float()), *goal)


@pytest.mark.parametrize("label", [-1, 4, 9])
def test_labels_out_of_range_are_an_error(label):
    boxes, labels = targets(2, 0, 3)
    labels[2][1] = label
    message = (
        rf"image 2 of the batch has label {label}, the model's are 0\.\.3; build the model with the number of classes"
    )
    with pytest.raises(ValueError, match=message):
        matching(predictions(), boxes, labels)


@pytest.mark.parametrize("box", [(30.0, 20.0, 50.0, 60.0), (0.4, 0.5, -0.1, 0.2), (0.4, 0.5, float("nan"), 0.2)])
def test_targets_in_another_format_are_an_error(box):
    boxes, labels = targets(2, 0, 3)
    boxes[0][1] = torch.tensor(box)
    message = r"image 0 of the batch has target box \[.*\], expected centre x, centre y, width, height as fractions"
    with pytest.raises(ValueError, match=message):
        matching(predictions(), boxes, labels)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_predictions_that_are_not_finite_are_an_error(value, which):
    outputs = predictions()
    outputs[which][1, 2, 3] = value
    with pytest.raises(ValueError, match=r"not (finite|a number)(: .*)?; lower train\.lr"):
        matching(outputs, *targets(2, 0, 4))


def test_nan_is_an_error_for_images_without_targets_too():
    logits, boxes = predictions()
    logits[0, 1] = torch.nan
    with pytest.raises(ValueError, match="predictions are not finite"):
        matching((logits, boxes), *targets(2, 0, 4))


class Waits(TorchFunctionMode):
    """Notes what the host waits for the device with, and the type of what crosses to the CPU."""

    NAMES = ("cpu", "item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in self.NAMES:
            self.seen.append((name, args[0].dtype))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("counts", [(2, 0, 4), (0, 0, 0)])
def test_matching_waits_for_the_device_once_for_float32(counts):
    (logits, boxes), goal = predictions(), Targets.join(*targets(*counts))
    with Waits() as waits:
        match_targets(logits, boxes, goal, COSTS)
    crossing, *later = waits.seen
    assert crossing == ("cpu", torch.float32)
    assert {name for name, _ in later} == {"numpy"}  # of what is on the CPU
