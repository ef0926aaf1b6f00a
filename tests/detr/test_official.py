"""Every tensor of the authors' files lands where it should, and a file that is none of theirs is named."""

import argparse
import os
from pathlib import Path

import pytest
import torch
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from detr.checkpoint import Category, InputSize, load_model, save_model
from detr.model import ModelConfig
from detr.official import COCO_CATEGORIES, URLS, build_official, load_official
from tests.detr.published import R50, R101, SMALL, assert_all_landed, saved, state_of


@pytest.mark.parametrize(
    ("blocks", "backbone", "stride", "millions"), [(R50, "resnet50", 32, 41.5), (R101, "resnet101", 16, 60.5)]
)
def test_every_published_tensor_lands_where_it_should(blocks, backbone, stride, millions):
    state = state_of(blocks)
    model = build_official(state, stride, "a")
    assert_all_landed(model, state)
    assert model.config == ModelConfig(
        backbone, 1.0, "frozen", "none", stride, "sine", 10000.0, 256, 8, 2048, 6, 6, 100, 0.1, 0.1, False
    )
    assert sum(v.numel() for v in state.values()) == pytest.approx(millions * 1e6, rel=0.01)
    assert (model.num_classes, model.training) == (80, False)


def test_the_categories_are_cocos():
    names = FasterRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]  # by id, "N/A" where there is none
    expected = [Category(key, name) for key, name in enumerate(names) if name not in ("__background__", "N/A")]
    assert list(COCO_CATEGORIES) == expected
    assert (len(expected), len(names)) == (80, 91)


@pytest.mark.parametrize("name", [Path(url).name for url in URLS.values()])
def test_a_file_gives_what_load_model_gives(name, tmp_path):
    state = state_of(R101 if "r101" in name else R50, **SMALL)
    path = saved(tmp_path / name, state)
    model, categories, input_size = load_official(path)
    assert_all_landed(model, state)
    assert (model.config.backbone, model.config.stride) == (
        f"resnet{name[6:9].strip('-')}",
        16 if "dc5" in name else 32,
    )
    assert (categories, input_size) == (list(COCO_CATEGORIES), InputSize(800, 1333, 1))
    save_model(model, categories, input_size, "", tmp_path / "ours")
    again = load_model(tmp_path / "ours")
    assert again[1:] == (categories, input_size)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again[0].state_dict().items())


def test_a_stride_that_is_given_wins_over_the_name(tmp_path):
    path = saved(tmp_path / "dc5.pth", state_of(**SMALL))
    assert [load_official(str(path), stride)[0].config.stride for stride in (None, 16, 32)] == [16, 16, 32]


@pytest.mark.parametrize("zipped", [False, True])
def test_a_training_checkpoint_of_theirs_is_read_and_all_but_its_model_ignored(zipped, tmp_path):
    state = state_of(**SMALL)
    args = argparse.Namespace(lr=1e-4, masks=False, output_dir="out")
    optimizer = torch.optim.AdamW([torch.zeros(2)]).state_dict()
    document = {"model": state, "optimizer": optimizer, "lr_scheduler": {"last_epoch": 3}, "epoch": 3, "args": args}
    torch.save(document, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=zipped)
    assert_all_landed(load_official(tmp_path / "checkpoint.pth")[0], state)


def test_the_architecture_follows_from_names_and_shapes():
    state = state_of(dim=64, feedforward=24, queries=3, encoder=0, decoder=4)
    state |= {f"transformer.encoder.norm.{part}": torch.ones(64) for part in ("weight", "bias")}
    config = build_official(state, 16, "a").config
    assert (config.hidden_dim, config.dim_feedforward, config.num_queries) == (64, 24, 3)
    assert (config.num_encoder_layers, config.num_decoder_layers, config.pre_norm) == (0, 4, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("query_embed.weight"), r"query_embed.weight is \(100, 256\) in the model, absent in the file"),
        (
            lambda s: s.pop("backbone.0.body.layer3.4.conv2.weight"),
            r"does not fit resnet50: backbone.layer3.4.conv2.weight is \(256, 256, 3, 3\) in the model, absent in",
        ),
        (lambda s: s.pop("class_embed.bias"), r"class_embed.bias is \(81,\) in the model, absent in the file"),
        (lambda s: s.update(extra=torch.zeros(2)), r"extra is absent in the model, \(2,\) in the file"),
        (
            lambda s: s.update({"backbone.0.body.bn1.num_batches_tracked": torch.tensor(0)}),
            r"backbone.bn1.num_batches_tracked is absent in the model, \(\) in the file",
        ),
        (
            lambda s: s.update({"input_proj.weight": torch.zeros(256, 512, 1, 1)}),
            r"input_proj.weight is \(256, 2048, 1, 1\) in the model, \(256, 512, 1, 1\) in the file",
        ),
        (
            lambda s: s.update({"query_embed.weight": torch.zeros(7)}),
            r"query_embed.weight is \(100, 256\) in the model, \(7,\) in the file",
        ),
        (
            lambda s: s.update({"class_embed.weight": torch.zeros(251, 256)}),
            r"class_embed.weight is \(251, 256\), expected 92 rows",
        ),
        (
            lambda s: s.update({f"detr.{key}": s.pop(key) for key in list(s)}),
            "a segmentation model, which is not supported; give one that only detects",
        ),
        (lambda s: s.update({"mask_head.lay1.bias": torch.zeros(8)}), "a segmentation model, which is not supported"),
        (lambda s: s.clear(), r"absent in the file"),
    ],
)
def test_a_key_that_is_missing_left_over_or_of_another_shape_is_named(change, message):
    state = state_of()
    change(state)
    with pytest.raises(ValueError, match=f"^a.pth.*{message}"):
        build_official(state, 32, "a.pth")


class Malicious:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (self.victim,)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("key", ["model", "args"])
def test_code_in_a_checkpoint_is_refused_and_never_run(key, zipped, tmp_path):
    document = {"model": state_of(**SMALL), key: Malicious(str(tmp_path / "run"))}
    torch.save(document, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    message = r"evil\.pth is not a whole file of weights and nothing else \(it asks for posix\.mkdir\)"
    with pytest.raises(ValueError, match=message):
        load_official(tmp_path / "evil.pth")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>\n<html><body>Not Found</body></html>\n", "cut"])
def test_a_file_that_holds_something_else_is_named(content, tmp_path):
    if content == "cut":
        content = saved(tmp_path / "whole.pth", {"a": torch.zeros(99)}).read_bytes()[:-50]
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pth is not a whole file of weights and nothing else \(\w+\)"):
        load_official(tmp_path / "a.pth")


@pytest.mark.parametrize("document", [{"a": torch.zeros(1)}, {"model": {"a": 3}}, [1], {"model": {1: torch.zeros(1)}}])
def test_a_file_without_a_model_says_what_is_expected(document, tmp_path):
    torch.save(document, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r'a\.pth holds no tensors under "model"'):
        load_official(tmp_path / "a.pth")


def test_a_missing_file_names_the_choices():
    with pytest.raises(ValueError, match="/nowhere/a.pth is neither a file, a URL nor one of detr-r50, detr-dc5-r50"):
        load_official("/nowhere/a.pth")
