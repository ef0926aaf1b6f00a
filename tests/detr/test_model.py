import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import detr
from detr.backbone import NORMS
from detr.batch import Sample, collate, normalize
from detr.checkpoint import build_model
from detr.model import DETR, MLP, ModelConfig, for_inference
from pipelines.params import from_document, merge_parameters
from tests.projects import TINY_MODEL
from tests.running import ROOT

CONFIGS = {
    "tiny": TINY_MODEL,
    "frozen": replace(TINY_MODEL, backbone_norm="frozen"),
    "dilated": replace(TINY_MODEL, stride=16),
    "published_wavelengths": replace(TINY_MODEL, position_temperature=10000.0),
    "learned": replace(TINY_MODEL, position="learned"),
    "no_positions": replace(TINY_MODEL, position="none"),
    "pre_norm": replace(TINY_MODEL, pre_norm=True),
    "no_encoder": replace(TINY_MODEL, num_encoder_layers=0),
    "no_encoder_pre_norm": replace(TINY_MODEL, num_encoder_layers=0, pre_norm=True),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    return build_model(CONFIGS[request.param], num_classes=3).eval()


def batch_of(*sizes_hw):
    generator = torch.Generator().manual_seed(1)
    images = [torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes_hw]
    no_boxes, no_labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    return collate([Sample(image, no_boxes, no_labels, i, (1, 1)) for i, image in enumerate(images)])


@torch.no_grad()
def predict(model, images, padding):
    return model(normalize(images, padding), padding)


def assert_same(results, expected):
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-4, atol=1e-5)


def test_shapes_and_ranges(model):
    batch = batch_of((64, 96), (70, 33))
    logits, boxes = predict(model, batch.images, batch.padding)
    assert logits.shape == (2, 2, 5, 4)
    assert boxes.shape == (2, 2, 5, 4)
    assert ((boxes > 0) & (boxes < 1)).all()


def test_batched_equals_single(model):
    batch = batch_of((64, 96), (70, 33), (96, 96))
    together = predict(model, batch.images, batch.padding)
    for i in range(3):
        alone = predict(model, batch.images[i : i + 1], batch.padding[i : i + 1])
        assert_same(alone, [value[:, i : i + 1] for value in together])


def test_pixels_in_the_padding_change_nothing(model):
    batch = batch_of((64, 96), (70, 33))
    noisy = torch.where(batch.padding[:, None], torch.randint_like(batch.images, 256), batch.images)
    for result, value in zip(
        predict(model, noisy, batch.padding), predict(model, batch.images, batch.padding), strict=True
    ):
        assert torch.equal(result, value)


@pytest.mark.parametrize("counts", [False, True])
def test_features_count_inside_the_image_and_not_in_the_padding(model, counts):
    batch = batch_of((128, 192), (64, 96))
    expected = predict(model, batch.images, batch.padding)
    cells = 32 // model.config.stride
    changed = torch.full((128 // model.config.stride, 192 // model.config.stride), not counts)
    changed[: 2 * cells, : 3 * cells] = counts

    def disturb(module, inputs, features):
        features[1] *= torch.where(changed, -3.0, 1.0)
        return features

    model.input_proj.register_forward_hook(disturb)
    for result, value in zip(predict(model, batch.images, batch.padding), expected, strict=True):
        torch.testing.assert_close(result[:, 0], value[:, 0])
        assert torch.allclose(result[:, 1], value[:, 1], rtol=1e-4, atol=1e-5) is not counts


def test_the_pixels_inside_do_count(model):
    batch = batch_of((64, 96))
    other = 255 - batch.images
    logits, _ = predict(model, batch.images, batch.padding)
    assert not torch.allclose(predict(model, other, batch.padding)[0], logits)


def test_no_padding_is_as_padding_that_is_nowhere(model):
    batch = batch_of((64, 96), (64, 96))
    images = normalize(batch.images, batch.padding)
    with torch.no_grad():
        assert_same(model(images), model(images, batch.padding))


@pytest.mark.parametrize("mode", [torch.float32, torch.bfloat16])
def test_half_precision_ends_in_float32_heads(model, mode):
    batch = batch_of((64, 96))
    expected = predict(model, batch.images, batch.padding)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode is torch.bfloat16):
        found = predict(model, batch.images, batch.padding)
    assert {value.dtype for value in found} == {torch.float32}
    assert (found[1] - expected[1]).abs().max() < 0.05


@pytest.mark.parametrize("norm", ["frozen", "group"])
def test_for_inference_answers_the_same_and_leaves_the_model_alone(norm):
    torch.manual_seed(0)
    model = build_model(replace(TINY_MODEL, backbone="resnet50", backbone_norm=norm, dropout=0.1), 3)
    for name, value in model.backbone.state_dict().items():
        if "running" in name or (norm == "frozen" and value.dim() == 1):
            value.uniform_(0.5, 1.5)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    folded = for_inference(model)
    batch = batch_of((64, 96), (70, 33))
    model.eval()
    for result, value in zip(
        predict(folded, batch.images, batch.padding), predict(model, batch.images, batch.padding), strict=True
    ):
        torch.testing.assert_close(result, value, rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    left = sum(isinstance(module, NORMS[norm]) for module in folded.modules())
    assert left == (53 if norm == "group" else 0)


@pytest.mark.parametrize(
    ("shape", "dtype", "padding", "message"),
    [
        ((3, 64, 64), torch.float32, None, r"images are torch.float32 \(3, 64, 64\), expected .* \[B, 3, H, W\]"),
        ((1, 64, 64, 3), torch.float32, None, r"images are torch.float32 \(1, 64, 64, 3\), expected"),
        ((1, 3, 64, 64), torch.uint8, None, r"images are torch.uint8 .*; see detr.normalize"),
        (
            (1, 3, 64, 64),
            torch.float32,
            torch.zeros(1, 64, 64),
            r"padding is torch.float32 \(1, 64, 64\), expected bool",
        ),
        (
            (2, 3, 64, 64),
            torch.float32,
            torch.zeros(1, 64, 64, dtype=torch.bool),
            r"padding is torch.bool \(1, 64, 64\)",
        ),
    ],
)
def test_inputs_of_another_shape_are_refused(shape, dtype, padding, message):
    with pytest.raises(ValueError, match=message):
        build_model(TINY_MODEL, 3)(torch.zeros(shape, dtype=dtype), padding)


def test_permuted_queries_give_permuted_detections(model):
    batch, order = batch_of((64, 96)), torch.tensor([4, 2, 0, 1, 3])
    expected = [value[:, :, order] for value in predict(model, batch.images, batch.padding)]
    model.query_embed.weight.data = model.query_embed.weight.data[order]
    assert_same(predict(model, batch.images, batch.padding), expected)


def test_gradients_reach_every_parameter(model):
    batch = batch_of((64, 96), (70, 33))
    logits, boxes = model(normalize(batch.images, batch.padding), batch.padding)
    (logits.sin().sum() + boxes.sin().sum()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


def test_the_seed_alone_decides_the_weights():
    first, second = (torch.manual_seed(seed) and build_model(TINY_MODEL, 3).state_dict() for seed in (7, 7))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("preset", "billions", "millions"),
    [
        ("coco-detr-r50", 81.2, 41.5),
        ("coco-detr-dc5-r50", 173.3, 41.5),
        ("coco-detr-r101", 144.7, 60.5),
        ("coco-detr-dc5-r101", 236.7, 60.5),
    ],
)
def test_the_papers_models_have_the_authors_size(preset, billions, millions):
    """Multiply-adds at 800x1066 as torch counts them on the authors' code; the paper's are averages over images."""
    config = from_document(merge_parameters(ROOT, preset, []), "model", ModelConfig)
    with torch.device("meta"):
        model = DETR(config, 91)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 800, 1066), torch.zeros(1, 800, 1066, dtype=torch.bool))
    assert counter.get_total_flops() / 2e9 == pytest.approx(billions, rel=0.005)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "resnet51"}, r"model.backbone is 'resnet51', expected one of \['resnet10', 'resnet18'"),
        ({"backbone_norm": "batch"}, r"model.backbone_norm is 'batch', expected one of \['frozen', 'group'\]"),
        ({"stride": 8}, r"model.stride is 8, expected one of \[16, 32\]"),
        ({"position": "fixed"}, r"model.position is 'fixed', expected one of \['sine', 'learned', 'none'\]"),
        ({"num_decoder_layers": 0}, "model.num_decoder_layers is 0, expected a number of at least 1"),
        ({"num_queries": 0}, "model.num_queries is 0, expected a number of at least 1"),
        ({"num_heads": 0}, "model.num_heads is 0, expected a number of at least 1"),
        ({"num_encoder_layers": -1}, "model.num_encoder_layers is -1, expected a number of at least 0"),
        ({"backbone_width": 0.0}, "model.backbone_width is 0.0, expected a number above 0"),
        ({"position_temperature": math.nan}, "model.position_temperature is nan, expected a finite number above 0"),
        ({"num_heads": 5}, "model.hidden_dim is 32, expected a multiple of 20, as model.num_heads 5 .* want it; 40 is"),
        (
            {"hidden_dim": 65},
            "model.hidden_dim is 65, expected a multiple of 4, as .* model.position sine want it; 68 is",
        ),
        ({"position": "learned", "num_heads": 1, "hidden_dim": 33}, "model.hidden_dim is 33, expected a multiple of 2"),
        ({"dropout": 1.0}, "model.dropout is 1.0, expected a number of at least 0 and below 1"),
        ({"dropout": -0.1}, "model.dropout is -0.1, expected a number of at least 0 and below 1"),
        ({"attention_dropout": 1.0}, "model.attention_dropout is 1.0, expected a number of at least 0 and below 1"),
    ],
)
def test_impossible_architectures_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY_MODEL, **change)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_mlp_equals_its_layers_in_a_row(num_layers):
    mlp = MLP(6, 8, 4, num_layers)
    x = torch.randn(2, 6)
    expected = x
    for index, layer in enumerate(mlp.layers):
        expected = layer(expected.relu() if index else expected)
    torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize("name", detr.__all__)
def test_every_public_name_is_where_it_is_said_to_be(name):
    assert getattr(detr, name).__name__ == name


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'detr' has no attribute 'Trainer'"):
        _ = detr.Trainer
