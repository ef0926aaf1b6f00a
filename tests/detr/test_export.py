"""Exported models answer as the model does: two small ones here, others in tests/slow/test_export.py."""

import copy
import sys
from dataclasses import replace
from types import SimpleNamespace

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from detr.batch import Sample, collate, normalize
from detr.checkpoint import build_model
from detr.export import export_onnx, export_program
from detr.model import shrink_padding
from tests.projects import TINY_MODEL
from tests.running import ROOT

CASES = {
    "frozen": replace(TINY_MODEL, backbone_norm="frozen", dropout=0.5, attention_dropout=0.5),
    "learned_group": replace(TINY_MODEL, position="learned", num_encoder_layers=0, num_decoder_layers=1),
    "group": replace(TINY_MODEL, dropout=0.5, attention_dropout=0.5),
    "frozen_dilated": replace(TINY_MODEL, backbone_norm="frozen", stride=16, position_temperature=10000.0),
    "learned_pre_norm": replace(TINY_MODEL, position="learned", pre_norm=True, num_encoder_layers=2),
    "paper": replace(
        TINY_MODEL, backbone="resnet50", backbone_width=1.0, backbone_norm="frozen", position_temperature=10000.0,
        hidden_dim=256, num_heads=8, dim_feedforward=2048, num_encoder_layers=6, num_decoder_layers=6, num_queries=100,
    ),
}  # fmt: skip
SIZES_HW = [[(33, 77)], [(52, 60), (26, 30)], [(70, 101), (45, 131), (96, 64)]]  # of batches
METADATA = {"categories": '["disc", "Dreieck größer"]', "input_size": '{"short": 64}'}


def export_case(name, folder):
    """The model of a case, its program and its ONNX file, both also as functions."""
    torch.manual_seed(0)
    model, path = build_model(CASES[name], num_classes=3), folder / "model.onnx"
    program = export_program(model.train())
    export_onnx(program, path, METADATA)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images, padding):
        values = session.run(["logits", "boxes_cxcywh"], {"images": images.numpy(), "padding": padding.numpy()})
        return [torch.from_numpy(value) for value in values]

    return SimpleNamespace(
        model=model.eval(), program=program, call=program.module(), run=run, session=session, path=path
    )


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return export_case("frozen", tmp_path_factory.mktemp("frozen"))


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """One with learned positions and group norms, and hardly more."""
    return export_case("learned_group", tmp_path_factory.mktemp("learned_group"))


def batch_of(*sizes_hw):
    """Normalised noise of these sizes and its padding."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes_hw]
    no_boxes, no_labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    batch = collate([Sample(image, no_boxes, no_labels, i, (1, 1)) for i, image in enumerate(images)])
    return normalize(batch.images, batch.padding), batch.padding


@torch.no_grad()
def eager(model, images, padding):
    return [value[-1] for value in model(images, padding)]


def assert_same(results, expected):
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("stride", [16, 32])
def test_features_have_the_padding_of_the_pixels_that_interpolate_takes(stride):
    generator = torch.Generator().manual_seed(1)
    for height in range(1, 1400, 3):
        padding = torch.rand(1, height, 1400 - height, generator=generator) > 0.5
        size = [-(-side // stride) for side in padding.shape[1:]]
        expected = F.interpolate(padding[None].float(), size=size).bool()[0]
        assert torch.equal(shrink_padding(padding, *size), expected)


@pytest.mark.parametrize("sizes_hw", SIZES_HW)
def test_both_forms_equal_the_model(case, sizes_hw):
    inputs = batch_of(*sizes_hw)
    expected = eager(case.model, *inputs)
    assert_same(case.call(*inputs), expected)
    assert_same(case.run(*inputs), expected)


def test_group_norms_are_exact_over_wide_padding(learned):
    images, padding = batch_of((800, 1200), (600, 700))
    expected = eager(copy.deepcopy(learned.model).double(), images.double(), padding)
    for form in (learned.call, learned.run):
        for result, value in zip(form(images, padding), expected, strict=True):
            torch.testing.assert_close(result.double(), value, rtol=0, atol=1e-5)


def test_learned_positions_are_in_both_forms_and_end_in_them(learned):
    inside, outside = batch_of((64, 1600)), batch_of((64, 1601))
    for form in (learned.call, learned.run):
        assert_same(form(*inside), eager(learned.model, *inside))
    with pytest.raises(AssertionError, match=r"Guard failed: images.size\(\)\[3\] <= 1600"):
        learned.call(*outside)
    with pytest.raises(Fail, match="mismatched dimensions of 51 and 50"):
        learned.run(*outside)


def test_a_program_survives_a_file(case, tmp_path):
    torch.export.save(case.program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for sizes_hw in ([(33, 77)], [(70, 101), (45, 131)]):
        assert_same(loaded(*batch_of(*sizes_hw)), eager(case.model, *batch_of(*sizes_hw)))


def test_the_padding_counts_in_both_forms(case):
    images, padding = batch_of((70, 101), (45, 131))
    logits, _ = eager(case.model, images, torch.zeros_like(padding))
    for form in (case.call, case.run):
        assert not torch.allclose(form(images, padding)[0], logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("sizes_hw", [[(1, 1)], [(16, 32)], [(20, 200), (5, 7)]])
def test_onnx_takes_images_of_less_than_a_stride(case, sizes_hw):
    inputs = batch_of(*sizes_hw)
    assert_same(case.run(*inputs), eager(case.model, *inputs))


def test_the_program_needs_no_gradients_and_refuses_what_it_cannot_take(case):
    call, stride = case.call, case.model.config.stride
    assert not any(value.requires_grad for value in call(*batch_of((64, 96))))
    for shape, size_hw, message in (
        ((1, 3, stride, 96), (stride, 96), rf"images.size\(\)\[2\] >= {stride + 1}"),
        ((1, 3, 64, 96), (64, 97), r"padding.size\(\)\[2\] == images.size\(\)\[3\]"),
        ((1, 4, 64, 96), (64, 96), r"images.size\(\)\[1\] == 3"),
    ):
        with pytest.raises(AssertionError, match=f"Guard failed: {message}"):
            call(torch.zeros(shape), torch.zeros(1, *size_hw, dtype=torch.bool))


def test_the_file_says_what_it_is(case):
    onnx.checker.check_model(case.path, full_check=True)
    queries = case.model.config.num_queries
    values = [*case.session.get_inputs(), *case.session.get_outputs()]
    assert [(value.name, value.shape, value.type) for value in values] == [
        ("images", ["batch", 3, "height", "width"], "tensor(float)"),
        ("padding", ["batch", "height", "width"], "tensor(bool)"),
        ("logits", ["batch", queries, 4], "tensor(float)"),
        ("boxes_cxcywh", ["batch", queries, 4], "tensor(float)"),
    ]
    assert case.session.get_modelmeta().custom_metadata_map == METADATA
    assert {path.name for path in case.path.parent.iterdir()} == {"model.onnx"}
    assert str(ROOT).encode() not in case.path.read_bytes()


def test_export_is_quiet_repeatable_and_leaves_the_model_alone(case, tmp_path, capfd):
    model = another_model(case)
    capfd.readouterr()
    program = export_program(model)
    export_onnx(program, tmp_path / "new/model.onnx", METADATA)
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "new/model.onnx").read_bytes() == case.path.read_bytes()
    assert_left_alone(model, case)
    assert_apart(program, model, case)


def another_model(case):
    """The model of the case, in another state of training and of memory."""
    model = build_model(case.model.config, num_classes=3).to(memory_format=torch.channels_last)
    model.load_state_dict(case.model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model


def assert_left_alone(model, case):
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and (parameter.grad == 1).all() for parameter in model.parameters())
    assert model.backbone.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    for name, value in model.state_dict().items():
        assert torch.equal(value, case.model.state_dict()[name])


def assert_apart(program, model, case):
    """What becomes of the model later is not the program's."""
    for value in model.state_dict().values():
        value.zero_()
    inputs = batch_of((70, 101), (45, 131))
    assert_same(program.module()(*inputs), eager(case.model, *inputs))


@pytest.mark.parametrize("name", ["onnx", "onnxscript"])
def test_missing_packages_are_named(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=f"no module {name}, which write ONNX; pip install onnx onnxscript"):
        export_onnx(build_model(TINY_MODEL, 3), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
