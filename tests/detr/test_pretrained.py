"""A backbone takes published weights from a file, or says why not."""

import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from detr.backbone import ResNet
from detr.checkpoint import build_model, load_pretrained
from tests.detr.test_backbone import images, published
from tests.projects import TINY_MODEL

TINY = replace(TINY_MODEL, backbone_norm="frozen")


def test_batch_norm_weights_fill_a_frozen_backbone(tmp_path):
    state, features = published("resnet18")
    torch.save(state, tmp_path / "resnet18.pth")
    backbone = ResNet("resnet18", 1.0, 32, "frozen")
    load_pretrained(backbone, "resnet18", str(tmp_path / "resnet18.pth"))
    with torch.no_grad():
        torch.testing.assert_close(backbone(images()), features(images()), rtol=1e-4, atol=1e-4)


def test_a_pretrained_model_trains_all_but_its_stem_and_first_stage(tmp_path):
    source = ResNet("resnet10", 0.25, 32, "frozen")
    save_file(source.state_dict(), tmp_path / "a.safetensors")
    model = build_model(replace(TINY, backbone_weights=str(tmp_path / "a.safetensors")), 3)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {
        f"backbone.{name}" for name, _ in source.named_parameters() if name.startswith(("conv1", "layer1"))
    }
    for key, value in source.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[key], value)
    assert all(p.requires_grad for p in build_model(TINY, 3).parameters())


class Malicious:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (self.victim,)


def test_code_in_a_file_of_weights_is_refused_and_never_run(tmp_path):
    torch.save({"conv1.weight": Malicious(str(tmp_path / "run"))}, tmp_path / "evil.pth")
    message = r"evil\.pth is not a whole file of weights and nothing else \(it asks for posix\.mkdir\)"
    with pytest.raises(ValueError, match=message):
        load_pretrained(ResNet("resnet10", 0.25, 32, "frozen"), "resnet10", str(tmp_path / "evil.pth"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"\x80", b"not a file of weights"])
@pytest.mark.parametrize("name", ["torn.pth", "torn.safetensors"])
def test_a_torn_file_is_named(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is not a whole"):
        load_pretrained(ResNet("resnet10", 0.25, 32, "frozen"), "resnet10", str(tmp_path / name))


def test_a_file_cut_short_is_named(tmp_path):
    torch.save(ResNet("resnet10", 0.25, 32, "frozen").state_dict(), tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"cut\.pth is not a whole file of weights"):
        load_pretrained(ResNet("resnet10", 0.25, 32, "frozen"), "resnet10", str(tmp_path / "cut.pth"))


@pytest.mark.parametrize("content", [{"model": {"conv1.weight": torch.zeros(1)}, "epoch": 3}, [torch.zeros(1)]])
def test_a_training_checkpoint_is_not_a_file_of_weights(content, tmp_path):
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=r"checkpoint\.pth is not a flat dictionary of tensors"):
        load_pretrained(ResNet("resnet10", 0.25, 32, "frozen"), "resnet10", str(tmp_path / "checkpoint.pth"))


def test_weights_that_cannot_be_fetched_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")  # where nothing listens
    with pytest.raises(
        ValueError, match="weights of resnet18 were not fetched .*; fetch them yourself, and give the file"
    ):
        load_pretrained(ResNet("resnet18", 1.0, 32, "frozen"), "resnet18", "imagenet")


def test_a_missing_file_is_named():
    with pytest.raises(
        ValueError, match=r"model.backbone_weights is '/nowhere/a.pth': no such file; give none, imagenet"
    ):
        load_pretrained(ResNet("resnet10", 0.25, 32, "frozen"), "resnet10", "/nowhere/a.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("conv1.weight"), r"conv1.weight is \(16, 3, 7, 7\) in the model, absent in the file"),
        (
            lambda state: state.update({"conv1.weight": torch.zeros(64, 3, 7, 7)}),
            r"conv1.weight is \(16, 3, 7, 7\) in the model, \(64, 3, 7, 7\) in the file",
        ),
        (lambda state: state.update(extra=torch.zeros(2)), r"extra is absent in the model, \(2,\) in the file"),
    ],
)
def test_weights_that_do_not_fit_name_the_first_difference(change, message, tmp_path):
    backbone = ResNet("resnet10", 0.25, 32, "frozen")
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    state = dict(before)
    change(state)
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"does not fit resnet10: {message}"):
        load_pretrained(backbone, "resnet10", str(tmp_path / "a.safetensors"))
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
