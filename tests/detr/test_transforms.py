import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detr.transforms import (
    EvalTransform,
    TrainTransform,
    TransformConfig,
    View,
    apply_view,
    draw_view,
    fit_size,
    view_whole,
)

PAPER = TransformConfig(
    scales=tuple(range(480, 801, 32)),
    max_size=1333,
    flip=0.5,
    crop=0.5,
    crop_scales=(400, 500, 600),
    crop_range=(384, 600),
)
SMALL = TransformConfig(
    scales=(80, 100, 120), max_size=150, flip=0.5, crop=0.5, crop_scales=(100, 140), crop_range=(60, 90)
)
HALVES = ((0, 0, 120, 80), (0, 80, 120, 80), (60, 0, 60, 160))  # top, left, height, width


def picture(box, size_hw=(120, 160)):
    """A black image with a white rectangle, and the rectangle as its one box."""
    image = torch.zeros(3, *size_hw, dtype=torch.uint8)
    left, top, right, bottom = box
    image[:, top:bottom, left:right] = 255
    return image, torch.tensor([box], dtype=torch.float32), torch.tensor([4])


def extent(image):
    """Left, top, right, bottom of what is bright, or None."""
    rows, columns = (image[0] > 127).nonzero().unbind(1)
    if not len(rows):
        return None
    return torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


def assert_box_is_where_the_pixels_are(image, boxes, view, box):
    scale = max(size / cut for size, cut in zip(view.size_hw, view.crop[2:], strict=True))
    scale *= max(1, *(size / source for size, source in zip(view.resized_hw, (120, 160), strict=True)))
    seen = extent(image)
    if len(boxes) and seen is not None:
        torch.testing.assert_close(boxes[0], seen, rtol=0, atol=0.5 * scale + 1)
    elif len(boxes):
        assert (boxes[0, 2:] - boxes[0, :2]).min() < 0.5 * scale + 1
    else:
        assert seen is None or (seen[2:] - seen[:2]).min() < 0.5 * scale + 1


@pytest.mark.parametrize("box", [(0, 0, 160, 120), (20, 30, 70, 110), (100, 5, 155, 40), (60, 50, 100, 70)])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size_hw", [(120, 160), (60, 80), (200, 170)])
@pytest.mark.parametrize("crop", [(0, 0, 120, 160), *HALVES, (20, 40, 70, 90)])
@pytest.mark.parametrize("enlarged", [1, 2])
def test_boxes_follow_pixels(box, flip, size_hw, crop, enlarged):
    view = View(flip, (120 * enlarged, 160 * enlarged), tuple(side * enlarged for side in crop), size_hw)
    image, boxes, labels = apply_view(*picture(box), view)
    assert image.shape == (3, *size_hw)
    assert len(boxes) == len(labels)
    assert_box_is_where_the_pixels_are(image, boxes, view, box)


@pytest.mark.parametrize("box", [(20, 30, 70, 110), (100, 5, 155, 40)])
def test_boxes_follow_pixels_through_random_views(box):
    shown = 0
    for seed in range(60):
        view = draw_view(random.Random(seed), (120, 160), SMALL)
        image, boxes, labels = apply_view(*picture(box), view)
        assert image.shape == (3, *view.size_hw)
        assert_box_is_where_the_pixels_are(image, boxes, view, box)
        assert labels.tolist() == [4] * len(boxes)
        shown += len(boxes)
    assert 30 < shown <= 60


@settings(deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10**6), st.integers(120, 200), st.integers(120, 200))
def test_boxes_stay_inside_their_image_and_have_area(seed, height, width):
    view = draw_view(random.Random(seed), (height, width), SMALL)
    corners = torch.rand(8, 2, 2, generator=torch.Generator().manual_seed(seed)) * torch.tensor([width, height])
    boxes = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
    image, result, labels = apply_view(torch.zeros(3, height, width, dtype=torch.uint8), boxes, torch.arange(8), view)
    assert len(result) == len(labels)
    assert (result[:, 2:] > result[:, :2]).all()
    assert (result >= -1e-3).all()
    assert (result <= torch.tensor([image.shape[2], image.shape[1]] * 2) + 1e-3).all()
    assert (labels.diff() > 0).all()


@pytest.mark.parametrize("flip", [False, True])
def test_an_image_without_objects(flip):
    image, boxes, labels = picture((0, 0, 160, 120))
    view = View(flip, (120, 160), HALVES[1], (60, 80))
    image, boxes, labels = apply_view(image, boxes[:0], labels[:0], view)
    assert image.shape == (3, 60, 80)
    assert boxes.shape == (0, 4)
    assert labels.shape == (0,)


def test_a_view_of_everything_changes_no_bit_and_flips_undo_themselves():
    image = torch.randint(256, (3, 40, 60), dtype=torch.uint8)
    boxes, labels = torch.tensor([[3.0, 4.0, 30.0, 21.0], [50.0, 0.0, 60.0, 40.0]]), torch.tensor([1, 2])
    view = view_whole((40, 60), 40, 100)
    for views in ([view], [replace(view, flip=True)] * 2):
        result = image, boxes, labels
        for view in views:
            result = apply_view(*result, view)
        assert all(torch.equal(a, b) for a, b in zip(result, (image, boxes, labels), strict=True))


@pytest.mark.parametrize("flip", [False, True])
def test_a_view_shows_its_region_and_flips_it(flip):
    image = torch.randint(256, (3, 40, 60), dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0.0, 9.0, 40.0], [12.0, 3.0, 30.0, 21.0]])
    view = View(flip, (40, 60), (5, 10, 30, 40), (30, 40))
    result, result_boxes, labels = apply_view(image, boxes, torch.tensor([1, 2]), view)
    assert torch.equal(result, (image.flip(-1) if flip else image)[:, 5:35, 10:50])
    assert result_boxes.tolist() == [[20.0, 0.0, 38.0, 16.0] if flip else [2.0, 0.0, 20.0, 16.0]]
    assert labels.tolist() == [2]


def test_inputs_are_left_as_they_are():
    image, boxes, labels = picture((20, 30, 70, 110))
    expected = image.clone(), boxes.clone(), labels.clone()
    apply_view(image, boxes, labels, View(True, (120, 160), HALVES[0], (50, 60)))
    assert all(torch.equal(a, b) for a, b in zip((image, boxes, labels), expected, strict=True))


def test_views_of_the_paper_are_in_its_ranges():
    rng = random.Random(0)
    sizes_hw = [(480, 640), (640, 427), (375, 500), (640, 240), (640, 640)]
    shorts, flips, crops, draws = set(), 0, 0, 3000
    for k in range(draws):
        size_hw = sizes_hw[k % len(sizes_hw)]
        view = draw_view(rng, size_hw, PAPER)
        top, left, crop_h, crop_w = view.crop
        assert 0 <= top <= view.resized_hw[0] - crop_h
        assert 0 <= left <= view.resized_hw[1] - crop_w
        flips += view.flip
        if view.resized_hw != size_hw or (crop_h, crop_w) != size_hw:
            crops += 1
            assert view.resized_hw in {fit_size(size_hw, short, 10**9) for short in PAPER.crop_scales}
            assert 384 <= min(crop_h, crop_w) <= max(crop_h, crop_w) <= 600
        assert view.size_hw in {fit_size((crop_h, crop_w), short, 1333) for short in PAPER.scales}
        shorts.add(min(view.size_hw))
    assert set(PAPER.scales) <= shorts
    assert abs(flips / draws - 0.5) < 0.05
    assert abs(crops / draws - 0.5) < 0.05


@pytest.mark.parametrize(
    ("size_hw", "short", "max_size", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1066)),
        ((640, 480), 800, 1333, (1066, 800)),
        ((500, 500), 800, 1333, (800, 800)),
        ((360, 640), 800, 1333, (750, 1333)),
        ((96, 96), 96, 96, (96, 96)),
        ((1, 20_000), 800, 1333, (1, 1333)),
        ((20_000, 3), 800, 1333, (1333, 1)),
    ],
)
def test_fit_size(size_hw, short, max_size, expected):
    assert fit_size(size_hw, short, max_size) == expected


@settings(deadline=None, derandomize=True, database=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(100, 800), st.integers(0, 600))
def test_fit_size_keeps_the_shape_and_the_limits(height, width, short, extra):
    result, max_size = fit_size((height, width), short, short + extra), short + extra
    stretch = max(height, width) / min(height, width)
    assert fit_size((width, height), short, max_size) == result[::-1]
    if stretch > 2 * max_size:  # a short side of less than half a pixel
        assert sorted(result) == [1, max_size]
        return
    assert 1 <= min(result) <= short
    assert abs(max(result) - min(result) * stretch) < 1
    assert max(result) <= max(max_size + 0.5 * stretch, stretch)
    assert min(result) == short or max(result) > max_size - 0.5 * stretch - 1


def test_an_image_of_one_row_is_still_an_image():
    image = torch.zeros(3, 1, 3000, dtype=torch.uint8)
    result = EvalTransform(800, 1333)(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert result[0].shape == (3, 1, 1333)


def test_randomness_is_keyed_by_seed_epoch_and_index():
    inputs = picture((20, 30, 70, 110))
    config = replace(SMALL, crop=1.0)

    def shown(seed, key):
        image, boxes, _ = TrainTransform(config, seed)(*inputs, key)
        return tuple(image.shape), tuple(boxes.flatten().tolist())

    random.seed(1)
    torch.manual_seed(1)
    expected = shown(0, (3, 7))
    random.seed(2)
    torch.manual_seed(2)
    state = random.getstate()
    assert shown(0, (3, 7)) == expected
    assert random.getstate() == state
    views = {shown(seed, (epoch, index)) for seed in (0, 1) for epoch in range(3) for index in range(5)}
    assert len(views) > 20
    assert shown(0, (1, 12)) != shown(0, (11, 2))


def test_evaluation_shows_the_whole_image():
    image, boxes, labels = picture((20, 30, 70, 110))
    result, result_boxes, result_labels = EvalTransform(60, 1000)(image, boxes, labels)
    assert result.shape == (3, 60, 80)
    assert torch.equal(result_boxes, boxes / 2)
    assert torch.equal(result_labels, labels)
    again = EvalTransform(60, 1000)(image, boxes, labels, (5, 6))
    assert torch.equal(again[0], result)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flip": 1.5}, r"flip is 1.5, expected a number of at least 0 and at most 1"),
        ({"crop": -0.5}, r"crop is -0.5, expected a number of at least 0 and at most 1"),
        ({"scales": ()}, r"scales \(\) must not be empty nor exceed max_size 150"),
        ({"scales": (80, 151)}, r"scales \(80, 151\) must not be empty nor exceed max_size 150"),
        ({"scales": (0,)}, r"scales\[0\] is 0, expected a number of at least 1"),
        ({"crop_scales": ()}, "expected at least one scale and an ascending range, or a crop of 0"),
        ({"crop_range": (90, 60)}, "expected at least one scale and an ascending range, or a crop of 0"),
        ({"crop_range": (0, 60)}, "expected at least one scale and an ascending range, or a crop of 0"),
        ({"crop_range": (101, 120)}, r"a crop of at least 101 does not fit crop_scales \(100, 140\); lower crop_range"),
    ],
)
def test_impossible_augmentations_are_refused(change, message):
    with pytest.raises(ValueError, match=f"train.transform.*{message}"):
        replace(SMALL, **change)


def test_sizes_of_views_are_known_before_their_images_are_read():
    transform = TrainTransform(SMALL, seed=3)
    sizes_hw = np.array([(120, 160), (90, 60), (200, 100)] * 5)
    sizes = transform.view_sizes(sizes_hw, 2)
    assert sizes.shape == (15, 2)
    for index, (height, width) in enumerate(sizes_hw.tolist()):
        image, _, _ = transform(
            picture((0, 0, 9, 9), (height, width))[0], torch.zeros(0, 4), torch.zeros(0), (2, index)
        )
        assert image.shape[1:] == tuple(sizes[index])
        assert transform.view((height, width), (2, index)).size_hw == tuple(sizes[index])
    assert (sizes != transform.view_sizes(sizes_hw, 3)).any()


def test_without_crops_their_ranges_may_be_empty():
    assert replace(SMALL, crop=0.0, crop_scales=(), crop_range=(0, 0)).crop == 0
