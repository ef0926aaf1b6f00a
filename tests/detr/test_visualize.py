from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detr.batch import Sample, collate, normalize
from detr.checkpoint import build_model
from detr.coco import CocoDataset, load_annotations
from detr.images import open_images
from detr.metrics import from_results
from detr.visualize import (
    COLOURS,
    HEAT,
    PANEL,
    beside_truth,
    decoder_attention,
    draw,
    draw_decoder_attention,
    draw_encoder_attention,
    draw_slots,
    encoder_attention,
    side_by_side,
)
from tests.projects import TINY_MODEL

GREY = torch.full((3, 40, 60), 100, dtype=torch.uint8)
LAYERS = replace(TINY_MODEL, num_encoder_layers=2)
CONFIGS = {
    "stride_32": LAYERS,
    "stride_16": replace(LAYERS, stride=16),
    "pre_norm": replace(LAYERS, pre_norm=True),
    "learned": replace(LAYERS, position="learned", num_heads=2),
}


def sharp_model(config):
    """Random weights, with biases and with attention that is far from uniform."""
    torch.manual_seed(0)
    model = build_model(config, num_classes=3).eval()
    for name, parameter in model.named_parameters():
        if "in_proj" in name:
            parameter.data = torch.randn_like(parameter) * 0.5
    return model


@pytest.fixture(params=CONFIGS)
def model(request):
    return sharp_model(CONFIGS[request.param])


def scene(height, width, size_multiple=1):
    """The normalised image [1, 3, H, W] and its padding."""
    image = torch.randint(256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    sample = Sample(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 0, (height, width))
    batch = collate([sample], size_multiple)
    return normalize(batch.images, batch.padding), batch.padding


def torch_weights(model, attention, images, padding):
    """What torch's own module gives for what enters `attention`: weights [Nq, Nk], mean over heads."""
    theirs = nn.MultiheadAttention(model.config.hidden_dim, model.config.num_heads, batch_first=True)
    theirs.load_state_dict(attention.state_dict())
    seen = []
    with attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs)), torch.no_grad():
        model(images, padding)
        query, key, value, attend = seen[0]
        return theirs(query, key, value, None if attend is None else ~attend[:, 0, 0], need_weights=True)[1][0]


def rgb(colour):
    return torch.tensor([int(colour[k : k + 2], 16) for k in (1, 3, 5)])


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


def test_detections_from_the_threshold_on_stand_beside_the_truth(drawn):
    annotations = load_annotations(drawn / "instances_val.json")
    dataset = CocoDataset(annotations, open_images(drawn / "val.zip"), lambda *sample: sample[:3])
    index = int(np.diff(annotations.starts).argmax())
    image = draw(dataset[0, index].image, torch.zeros(0, 4), [], [], scale=3)
    empty = beside_truth(dataset, from_results([]), index, 0.5)
    width = image.shape[2]
    assert max(image.shape) == 288
    assert (empty.dtype, empty.shape) == (torch.uint8, (3, image.shape[1], 2 * width + 6))
    assert torch.equal(empty[..., -width:], image)
    assert not torch.equal(empty[..., :width], image)
    found = {"image_id": int(annotations.image_ids[index]), "category_id": int(annotations.category_ids[-1])}
    found |= {"bbox": [20.0, 30.0, 40.0, 50.0], "score": 0.5}
    picture = beside_truth(dataset, from_results([found]), index, 0.5)
    label = len(annotations.category_ids) - 1
    caption = [f"{annotations.category_names[label]} 0.50"]
    expected = draw(dataset[0, index].image, torch.tensor([[20.0, 30.0, 60.0, 80.0]]), [label], caption, scale=3)
    assert torch.equal(picture, side_by_side(empty[..., :width], expected))
    for other in (found | {"score": 0.49}, found | {"image_id": int(annotations.image_ids[index - 1])}):
        assert torch.equal(beside_truth(dataset, from_results([other]), index, 0.5), empty)


@pytest.mark.parametrize(("size_hw", "multiple"), [((70, 130), 1), ((64, 96), 1), ((70, 90), 128)])
def test_attention_equals_torch(model, size_hw, multiple):
    images, padding = scene(*size_hw, multiple)
    for given in (padding, None):
        stride = model.config.stride
        shape = tuple(-(-size // stride) for size in images.shape[2:])
        expected = torch_weights(model, model.transformer.encoder.layers[-1].self_attn, images, given)
        for x, y in ((0, 0), (size_hw[1] - 1, size_hw[0] - 1), (37.5, 50.2)):
            weights = encoder_attention(model, images, (x, y), given)
            row = int(y // stride) * shape[1] + int(x // stride)
            assert weights.shape == shape
            torch.testing.assert_close(weights.flatten(), expected[row], rtol=1e-5, atol=1e-6)
        expected = torch_weights(model, model.transformer.decoder.layers[-1].multihead_attn, images, given)
        weights = decoder_attention(model, images, [3, 0, 3], given)
        assert weights.shape == (3, *shape)
        torch.testing.assert_close(weights.flatten(1), expected[[3, 0, 3]], rtol=1e-5, atol=1e-6)
        assert weights.amax() > 2 / weights[0].numel()  # what is compared is not uniform


def test_weights_sum_to_one_and_are_zero_in_the_padding(model):
    images, padding = scene(70, 90, size_multiple=160)
    hidden = F.interpolate(padding[:, None].float(), size=[160 // model.config.stride] * 2)[0, 0].bool()
    assert 0 < hidden.sum() < hidden.numel()
    encoder = encoder_attention(model, images, (89.9, 69.9), padding)
    for weights in (encoder, *decoder_attention(model, images, range(5), padding)):
        torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
        assert (weights[hidden] == 0).all()
        assert (weights[~hidden] > 0).all()


def test_the_cell_of_any_point_in_the_image_is_never_padding(model):
    images, padding = scene(66, 33, size_multiple=70)
    stride = model.config.stride
    height, width = (-(-size // stride) for size in images.shape[2:])
    hidden = F.interpolate(padding[:, None].float(), size=(height, width))[0, 0].bool()
    assert not hidden[: -(-66 // stride), : -(-33 // stride)].any()


def test_permuted_queries_have_permuted_maps(model):
    images, padding = scene(64, 96)
    order = [4, 2, 0, 1, 3]
    maps = decoder_attention(model, images, range(5), padding)
    assert torch.equal(decoder_attention(model, images, order, padding), maps[order])
    model.query_embed.weight.data = model.query_embed.weight.data[order]
    torch.testing.assert_close(decoder_attention(model, images, range(5), padding), maps[order], rtol=1e-4, atol=1e-5)
    assert decoder_attention(model, images, [], padding).shape == (0, *maps.shape[1:])


def state(model):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [m.training for m in model.modules()], hooks, [p.requires_grad for p in model.parameters()], gradients


def test_a_model_in_training_is_looked_at_in_eval_mode_and_left_as_it_was():
    model = sharp_model(replace(LAYERS, dropout=0.5, attention_dropout=0.5))
    images, padding = scene(64, 96)
    looks = (encoder_attention, (40, 40)), (decoder_attention, [1, 2])
    expected = [look(model, images, what, padding) for look, what in looks]
    model.train()
    model.backbone.eval()
    sum(output.sum() for output in model(images, padding)).backward()
    before, random_state = state(model), torch.get_rng_state()
    for (look, what), weights in zip(looks, expected, strict=True):
        assert torch.equal(look(model, images, what, padding), weights)
        assert not weights.requires_grad
    after = state(model)
    assert after[:3] == before[:3]
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(before[3], after[3], strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("part", ["input_proj", "class_embed"])
def test_nothing_is_left_on_a_model_that_raises(part):
    model = sharp_model(LAYERS).train()
    images, padding = scene(64, 96)

    def fail(*_):
        raise RuntimeError("out of memory")

    with getattr(model, part).register_forward_hook(fail):
        before = state(model)
        for look, what in ((encoder_attention, (40, 40)), (decoder_attention, [1])):
            with pytest.raises(RuntimeError, match="out of memory"):
                look(model, images, what, padding)
            assert state(model)[:3] == before[:3]
    with pytest.raises(ValueError, match="images are torch.float32"):
        encoder_attention(model, images[:, :1], (40, 40))
    assert not any(state(model)[1])


@pytest.mark.parametrize("point", [(-1, 5), (90, 5), (5, -0.1), (5, 70), (float("nan"), 5)])
def test_a_point_outside_of_the_image_is_refused(point):
    images, padding = scene(70, 90, size_multiple=128)
    with pytest.raises(ValueError, match=r"the point \(x, y\) is .*, expected one inside the image: x < 90, y < 70"):
        encoder_attention(sharp_model(LAYERS), images, point, padding)


def test_what_does_not_exist_is_refused():
    model = sharp_model(LAYERS)
    images, padding = scene(64, 96)
    with pytest.raises(ValueError, match=r"queries \[5, -1\] do not exist, expected numbers in 0..4"):
        decoder_attention(model, images, [0, 5, -1], padding)
    with pytest.raises(ValueError, match=r"images are \(2, 3, 64, 96\), expected one image \[1, 3, H, W\]"):
        encoder_attention(model, images.expand(2, -1, -1, -1), (5, 5))
    with pytest.raises(ValueError, match=r"images are \(3, 64, 96\), expected one image \[1, 3, H, W\]"):
        encoder_attention(model, images[0], (5, 5))
    with pytest.raises(ValueError, match="the model has 0 encoder layers"):
        encoder_attention(sharp_model(replace(LAYERS, num_encoder_layers=0)), images, (5, 5), padding)
    with pytest.raises(
        ValueError,
        match=r"weights are of \(2, 2\) features, expected at least \(3, 4\) for an image \(3, 40, 60\) at stride 16",
    ):
        draw_encoder_attention(GREY, torch.ones(2, 2), (5, 5), stride=16)
    with pytest.raises(ValueError, match=r"queries \[4\] do not exist, expected numbers in 0..3"):
        draw_slots(torch.zeros(1, 4, 4), [4])
    with pytest.raises(ValueError, match="slots are empty, expected at least one query slot"):
        draw_slots(torch.zeros(1, 4, 4), [])


@pytest.mark.parametrize("scale", [1, 3])
def test_heat_is_strongest_where_attention_is(scale):
    weights = torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.1, 0.1, 0.4, 0.1], [0.0, 0.0, 0.0, 9.0]])  # the last row: padding
    before = GREY.clone()
    pictures = {
        HEAT: draw_encoder_attention(GREY[:, :32], weights, (4, 4), stride=16, scale=scale),
        COLOURS[3]: draw_decoder_attention(
            GREY[:, :32], weights[None], torch.tensor([[1.0, 1, 8, 8]]), [3], stride=16, scale=scale
        ),
    }
    assert torch.equal(GREY, before)
    for colour, picture in pictures.items():
        assert picture.shape == (3, 32 * scale, 60 * scale)
        change = (picture.float() - 60).abs().sum(0)  # the faded grey is 60
        change[: 12 * scale, : 12 * scale] = 0  # the point and the box
        y, x = divmod(int(change.argmax()), 60 * scale)
        assert (y // (16 * scale), x // (16 * scale)) == (1, 2)
        assert (picture[:, y, x] - (12 + 0.8 * rgb(colour))).abs().max() <= 1.5
        assert change[24 * scale, 8 * scale] < 30
        assert change[:, 1:].sub(change[:, :-1]).abs().max() < 70  # smooth


def test_the_point_is_a_dot():
    picture = draw_encoder_attention(GREY, torch.ones(3, 4), (20.0, 30.0), stride=16, scale=4)
    rows, columns = (picture == 255).all(0).nonzero().unbind(1)
    assert (rows.float().mean() + 0.5, columns.float().mean() + 0.5) == (120, 80)
    assert 8 < len(rows) < 80
    rest = (picture != 255).any(0) & (picture != 0).any(0)
    assert rest.sum() > 160 * 240 - 200
    assert (picture[:, rest] == 60).all()  # even attention is no heat


def test_each_object_has_its_own_colour():
    image = torch.full((3, 64, 64), 100, dtype=torch.uint8)
    weights = torch.eye(4).view(4, 2, 2)[[0, 3]]
    boxes = torch.tensor([[5.0, 5.0, 25.0, 25.0], [35.0, 10.0, 55.0, 35.0]])
    picture = draw_decoder_attention(image, weights, boxes, [1, 2 + len(COLOURS)], stride=32)
    for colour, (x, y), corner in ((COLOURS[1], (0, 0), (5, 5)), (COLOURS[2], (63, 63), (35, 10))):
        assert picture[:, corner[1], corner[0]].tolist() == rgb(colour).tolist()
        assert (picture[:, y, x] - (12 + 0.8 * rgb(colour))).abs().max() <= 1.5
    larger = draw_decoder_attention(image, weights[:1], boxes[:1], [1], stride=32, scale=2)
    assert larger[:, 50, 50].tolist() == rgb(COLOURS[1]).tolist()
    swapped = draw_decoder_attention(image, weights[[0]], boxes[[0]], [0], stride=32)
    assert not torch.equal(swapped, draw_decoder_attention(image, weights[[0]], boxes[[0]], [1], stride=32))
    assert torch.equal(draw_decoder_attention(GREY, weights[:0], boxes[:0], [], stride=32), GREY)
    assert draw_decoder_attention(GREY, weights[:0], boxes[:0], [], stride=32, scale=2).shape == (3, 80, 120)


@pytest.mark.parametrize(
    ("size", "channel"),
    [((0.05, 0.05), 1), ((0.0, 0.0), 1), ((0.2, 0.1), 1), ((0.9, 0.3), 0), ((0.6, 0.2), 0), ((0.3, 0.9), 2)],
)
def test_a_slots_box_is_a_dot_at_its_centre_coloured_by_its_shape(size, channel):
    boxes = torch.full((1, 3, 4), 0.9)
    boxes[0, 1] = torch.tensor([0.25, 0.6, *size])
    picture = draw_slots(boxes, [1], side=100, radius=2)
    assert picture.shape == (3, 100, 100)
    assert picture[channel, 60, 25] == 220
    assert picture[:, 60, 25].float().sort().values[1] < 110
    rows, columns = (picture != PANEL).any(0).nonzero().unbind(1)
    assert len(rows) == 13
    assert (rows.float().mean(), columns.float().mean()) == (60, 25)


def test_panels_stand_in_rows_on_white():
    boxes = torch.rand(30, 7, 4, generator=torch.Generator().manual_seed(2))
    picture = draw_slots(boxes, [6, 0, 3], columns=2, side=50, gap=4)
    assert (picture.dtype, picture.shape) == (torch.uint8, (3, 104, 104))
    for slot, (top, left) in ((6, (0, 0)), (0, (0, 54)), (3, (54, 0))):
        assert torch.equal(picture[:, top : top + 50, left : left + 50], draw_slots(boxes, [slot], side=50))
    assert (picture[:, 50:54] == 255).all()
    assert (picture[..., 50:54] == 255).all()
    assert (picture[:, 54:, 54:] == 255).all()
    assert draw_slots(boxes, [1, 2], columns=5, side=50, gap=0).shape == (3, 50, 100)
    assert (draw_slots(boxes[:0], [0], side=50) == PANEL).all()


def test_dots_at_the_border_are_cut_and_the_order_of_images_changes_nothing():
    boxes = torch.rand(200, 2, 4, generator=torch.Generator().manual_seed(3))
    boxes[:4, 0, :2] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    order = torch.randperm(200, generator=torch.Generator().manual_seed(4))
    assert torch.equal(draw_slots(boxes, [0, 1], side=40), draw_slots(boxes[order], [0, 1], side=40))


def test_pictures_are_the_same_bytes_every_time():
    def pictures():
        model = sharp_model(CONFIGS["stride_16"])
        images, padding = scene(40, 60, size_multiple=64)
        weights = encoder_attention(model, images, (20, 20), padding)
        maps = decoder_attention(model, images, [0, 1], padding)
        boxes = torch.tensor([[5.0, 5.0, 25.0, 25.0], [35.0, 10.0, 55.0, 35.0]])
        yield draw_encoder_attention(GREY, weights, (20, 20), 16, 2)
        yield draw_decoder_attention(GREY, maps, boxes, [0, 1], 16, 2)
        yield draw_slots(model(images, padding)[1][-1].detach(), [0, 1, 2])

    for first, second in zip(pictures(), pictures(), strict=True):
        assert first.numpy().tobytes() == second.numpy().tobytes()
