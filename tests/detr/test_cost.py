"""What a model costs, against counts by hand and the paper's table 1."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from detr.checkpoint import build_model
from detr.cost import count_gflops, count_multiply_adds, count_parameters, measure_images_per_second, measure_seconds
from detr.model import ModelConfig, for_inference
from detr.official import COCO_CATEGORIES
from detr.transformer import Attention
from pipelines.params import from_document, merge_parameters
from tests.projects import TINY_MODEL
from tests.running import ROOT

CPU = torch.device("cpu")


def paper(name):
    config = from_document(merge_parameters(ROOT, f"coco-{name}", []), "model", ModelConfig)
    return build_model(replace(config, backbone_weights="none"), len(COCO_CATEGORIES))


@pytest.mark.parametrize(
    ("name", "millions", "expected"),
    [("detr-r50", 41, 86), ("detr-dc5-r50", 41, 187), ("detr-r101", 60, 152), ("detr-dc5-r101", 60, 253)],
)
def test_the_paper_counts_the_same(name, millions, expected):
    model = paper(name)
    assert round(count_parameters(model) / 1e6) == millions
    assert count_gflops(model, [(800, 1131)]) == pytest.approx(expected, rel=0.01)  # as many pixels as COCO's mean


def test_parameters_are_those_that_learn():
    tiny = build_model(TINY_MODEL, 3)
    assert count_parameters(tiny) == sum(p.numel() for p in tiny.parameters())
    frozen = build_model(replace(TINY_MODEL, backbone_norm="frozen"), 3)
    stem = sum(p.numel() for part in (frozen.backbone.conv1, frozen.backbone.layer1) for p in part.parameters())
    assert count_parameters(frozen) == sum(p.numel() for p in frozen.parameters()) - stem
    assert count_parameters(frozen.requires_grad_(False)) == count_parameters(frozen)
    assert count_parameters(nn.Linear(3, 5)) == 20


def test_convolutions_are_counted_by_hand():
    layer = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    assert count_gflops(layer, [(10, 14)]) * 1e9 == pytest.approx(5 * 7 * 8 * 3 * 3 * 3)
    grouped = nn.Conv2d(3, 6, (1, 3), groups=3)
    assert count_gflops(grouped, [(4, 5)]) * 1e9 == pytest.approx(4 * 3 * 6 * 3)


def test_linear_layers_and_attention_are_counted_by_hand():
    layer = nn.Linear(6, 5)
    assert count_multiply_adds(lambda: layer(torch.zeros(2, 7, 6))) == 2 * 7 * 6 * 5
    attention = Attention(16, 4, dropout=0.0).eval().requires_grad_(False)
    query, key = torch.zeros(1, 5, 16), torch.zeros(1, 9, 16)
    projections = (5 + 9 + 9 + 5) * 16 * 16
    assert count_multiply_adds(lambda: attention(query, key, key)) == projections + 2 * 5 * 9 * 16


@pytest.mark.parametrize("norm", ["group", "frozen"])
@pytest.mark.parametrize("stride", [16, 32])
def test_meta_counts_what_a_real_device_computes(stride, norm):
    model = build_model(replace(TINY_MODEL, stride=stride, backbone_norm=norm), 3).eval().requires_grad_(False)
    counted = count_multiply_adds(lambda: model(torch.rand(1, 3, 70, 90)))
    assert count_gflops(model, [(70, 90)]) == counted / 1e9


def test_weights_mode_and_dropout_count_nothing():
    config = replace(TINY_MODEL, dropout=0.3, attention_dropout=0.2)
    torch.manual_seed(0)
    first = build_model(config, 3)
    second = build_model(config, 3)
    nn.init.zeros_(second.class_embed.weight)
    assert count_gflops(first.train(), [(64, 96)]) == count_gflops(second.eval(), [(64, 96)])
    assert count_gflops(build_model(TINY_MODEL, 3), [(64, 96)]) == count_gflops(first, [(64, 96)])


def test_images_count_by_their_number():
    model = build_model(TINY_MODEL, 3)
    small, large = count_gflops(model, [(64, 64)]), count_gflops(model, [(96, 128)])
    assert count_gflops(model, [(96, 128), (64, 64), (96, 128)]) == pytest.approx((small + 2 * large) / 3)
    with pytest.raises(ValueError, match="gflops got no sizes, expected \\(height, width\\) of at least one"):
        count_gflops(model, [])


def test_the_model_stays_as_it_was():
    model = build_model(replace(TINY_MODEL, backbone_norm="frozen", dropout=0.1), 3)
    before = deepcopy(model.state_dict())
    count_gflops(model, [(64, 64)])
    assert measure_images_per_second(model, (64, 64), CPU, num_images=2) > 0
    count_parameters(model)
    assert model.training
    assert all(p.requires_grad and p.device == CPU and p.grad is None for p in model.parameters())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_time_is_that_of_one_call_without_gradients():
    calls = []
    model = for_inference(build_model(TINY_MODEL, 3))

    def run():
        calls.append(torch.is_grad_enabled())
        model(torch.zeros(1, 3, 64, 64))

    assert measure_seconds(run, CPU) > 0
    assert calls == [False]
