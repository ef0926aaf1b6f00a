import pytest
import torch

from detr.visualize import COLOURS, draw, side_by_side

GREY = torch.full((3, 40, 60), 100, dtype=torch.uint8)


def test_without_objects_the_image_is_untouched():
    assert torch.equal(draw(GREY, torch.zeros(0, 4), [], []), GREY)


@pytest.mark.parametrize("scale", [1, 3])
def test_a_box_is_drawn_where_it_is_in_the_colour_of_its_label(scale):
    before = GREY.clone()
    result = draw(GREY, torch.tensor([[10.0, 20.0, 40.0, 30.0]]), [2 + len(COLOURS)], [""], scale)
    assert torch.equal(GREY, before)
    assert result.shape == (3, 40 * scale, 60 * scale)
    rows, columns = (result != 100).any(0).nonzero().unbind(1)
    for found, expected in ((columns.min(), 10), (rows.min(), 20), (columns.max(), 40), (rows.max(), 30)):
        assert abs(int(found) - expected * scale) <= 2
    colour = [int(COLOURS[2][k : k + 2], 16) for k in (1, 3, 5)]
    assert result[:, 25 * scale, 10 * scale].tolist() == colour
    assert result[:, 25 * scale, 25 * scale].tolist() == [100, 100, 100]


@pytest.mark.parametrize("box", [(-20.0, -20.0, 90.0, 90.0), (70.0, 50.0, 90.0, 60.0), (5.0, 5.0, 5.0, 5.0)])
def test_boxes_beyond_the_image_are_cut(box):
    assert draw(GREY, torch.tensor([box]), [0], ["cat 0.99"]).shape == GREY.shape


def test_captions_are_written():
    box = torch.tensor([[5.0, 5.0, 50.0, 35.0]])
    assert not torch.equal(draw(GREY, box, [0], ["cat"]), draw(GREY, box, [0], [""]))


def test_two_images_beside_each_other():
    result = side_by_side(GREY, GREY + 50, gap=4)
    assert result.shape == (3, 40, 124)
    assert torch.equal(result[..., :60], GREY)
    assert (result[..., 60:64] == 255).all()
    assert torch.equal(result[..., 64:], GREY + 50)
