import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_area, generalized_box_iou

from detr.boxes import area, cxcywh_to_xyxy, generalized_iou, xyxy_to_cxcywh

fraction = st.floats(0, 1, width=32, allow_subnormal=False)
steady = settings(deadline=None, derandomize=True, database=None)


def random_boxes(count, seed=0):
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed)) * 100
    return torch.cat([corners.amin(1), corners.amax(1) + 1], dim=1)


@pytest.mark.parametrize("shape", [(0, 4), (4,), (7, 4), (2, 3, 5, 4)])
def test_round_trip(shape):
    boxes_cxcywh = torch.rand(shape)
    torch.testing.assert_close(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes_cxcywh)), boxes_cxcywh)


def test_corners_of_a_known_box():
    assert cxcywh_to_xyxy(torch.tensor([50.0, 40.0, 20.0, 10.0])).tolist() == [40.0, 35.0, 60.0, 45.0]


@pytest.mark.parametrize(("count", "others"), [(0, 0), (0, 3), (3, 0), (1, 1), (9, 14)])
def test_generalized_iou_equals_torchvision(count, others):
    a, b = random_boxes(count, 1), random_boxes(others, 2)
    torch.testing.assert_close(generalized_iou(a[:, None], b[None]), generalized_box_iou(a, b))


def test_area_equals_torchvision_and_is_zero_for_inverted_boxes():
    boxes = random_boxes(20)
    torch.testing.assert_close(area(boxes), box_area(boxes))
    assert area(boxes[:, [2, 1, 0, 3]]).tolist() == [0.0] * 20
    assert area(boxes[:, [2, 3, 0, 1]]).tolist() == [0.0] * 20


@steady
@given(st.lists(st.tuples(fraction, fraction, fraction, fraction), min_size=2, max_size=2))
def test_generalized_iou_is_symmetric_bounded_and_one_only_with_itself(pair):
    a, b = cxcywh_to_xyxy(torch.tensor(pair))
    value = generalized_iou(a, b)
    assert value == generalized_iou(b, a)
    assert -1 - 1e-5 <= value <= 1 + 1e-5
    if area(a) > 1e-6:
        torch.testing.assert_close(generalized_iou(a, a), torch.tensor(1.0))


@pytest.mark.parametrize("box", [(0.5, 0.5, 0.0, 0.0), (0.5, 0.5, 0.2, 0.0), (0.5, 0.5, 0.0, 0.2)])
def test_boxes_without_area_give_finite_values_and_gradients(box):
    boxes = torch.tensor(box, requires_grad=True)
    value = generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(torch.tensor(box)))
    assert value == 0
    other = generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(torch.tensor((0.3, 0.3, 0.2, 0.2))))
    other.backward()
    assert boxes.grad.isfinite().all()


def test_disjoint_boxes_still_pull_together():
    box = torch.tensor([0.2, 0.2, 0.1, 0.1], requires_grad=True)
    generalized_iou(cxcywh_to_xyxy(box), cxcywh_to_xyxy(torch.tensor([0.8, 0.8, 0.1, 0.1]))).backward()
    assert (box.grad[:2] > 0).all()
