"""A model starts from all trained weights but the class head's, and refuses those of another architecture."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from detr.checkpoint import Category, InputSize, build_model, save_model
from detr.coco import CocoDataset, ImageArchive, load_annotations
from detr.distributed import Process
from detr.model import ModelConfig
from detr.official import URLS, initialize_model, load_official
from detr.train import fit
from detr.train_config import TrainConfig
from detr.transforms import TrainTransform
from pipelines.params import from_document, merge_parameters
from tests.detr.published import SMALL, saved, state_of
from tests.projects import TINY, TINY_MODEL
from tests.running import ROOT

CONFIG = from_document(merge_parameters(ROOT, None, [*TINY, "train.evaluate_epochs=0"]), "train", TrainConfig)


def new_model(num_classes, **changes):
    return build_model(replace(TINY_MODEL, **changes), num_classes)


def trained_folder(folder, **changes):
    model = new_model(2, **changes)
    for value in model.state_dict().values():
        value.add_(0.01)
    save_model(model, [Category(3, "cat"), Category(44, "dog")], InputSize(96, 96, 96), "abc", folder)
    return str(folder)


@pytest.mark.parametrize("norm", ["group", "frozen"])
def test_training_starts_from_all_but_the_class_head_and_goes_on(norm, drawn, tmp_path):
    source = trained_folder(tmp_path / "trained", backbone_norm=norm)
    weights = load_file(tmp_path / "trained/model.safetensors")
    model = new_model(8, backbone_norm=norm, dropout=0.1, attention_dropout=0.1)
    head = [p.clone() for p in model.class_embed.parameters()]
    initialize_model(model, source)
    assert all(torch.equal(a, b) for a, b in zip(head, model.class_embed.parameters(), strict=True))
    for key, value in model.state_dict().items():
        assert key.startswith("class_embed.") or torch.equal(value, weights[key])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    names = {name for name, _ in model.named_parameters()}
    stem = {name for name in names if name.startswith(("backbone.conv1", "backbone.bn1", "backbone.layer1"))}
    assert frozen == (stem if norm == "frozen" else set())
    annotations = load_annotations(drawn / "instances_train.json")
    dataset = CocoDataset(annotations, ImageArchive(drawn / "train.zip"), TrainTransform(CONFIG.transform, 0))
    list(fit(model, dataset, CONFIG, Process(0, 1, torch.device("cpu"))))
    after = dict(model.named_parameters())
    assert {key for key in names if key in weights and torch.equal(after[key], weights[key])} == frozen


def test_the_authors_weights_start_a_model_of_other_classes(tmp_path):
    state = state_of(**SMALL)
    path = saved(tmp_path / "a.pth", state)
    config = replace(load_official(path)[0].config, backbone_weights="imagenet", dropout=0.0)
    model = build_model(replace(config, backbone_weights="none"), 3)
    initialize_model(model, str(path))
    own = {k.replace("backbone.", "backbone.0.body.", 1): v for k, v in model.state_dict().items()}
    assert [k for k in own if not k.startswith("class_embed.") and not torch.equal(own[k], state[k])] == []
    assert model.class_embed.weight.shape == (4, 32)
    assert not any(p.requires_grad for p in model.backbone.layer1.parameters())


def test_the_preset_fits_the_published_weights(tmp_path):
    config = from_document(merge_parameters(ROOT, "finetune", []), "model", ModelConfig)
    path = saved(tmp_path / Path(URLS["detr-r50"]).name, state_of())
    model = build_model(config, 3)
    initialize_model(model, str(path))
    assert torch.equal(model.query_embed.weight, load_official(path)[0].query_embed.weight)
    document, plain = merge_parameters(ROOT, "finetune", []), merge_parameters(ROOT, None, [])
    assert document["train"]["initial_weights"] == "detr-r50"
    plain["validate"]["tolerated"] |= {"image_has_objects": 0, "object_single": 0}  # the demo's, of its drawn scenes
    assert (document["download"], document["validate"]) == (plain["download"], plain["validate"])


SAME_SHAPES = "every shape is the same, but what is computed is not"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_queries": 9},
            r"query_embed.weight is \(9, 32\) in the model, \(5, 32\) in the file; set model.num_queries=5 as in the",
        ),
        (
            {"num_decoder_layers": 1},
            r"transformer.decoder.layers.1.linear1.bias is absent in the model, \(64,\) in the file; "
            "set model.num_decoder_layers=2 as in the weights",
        ),
        (
            {"hidden_dim": 64, "num_heads": 8},
            r"bbox_embed.layers.0.bias is \(64,\) in the model, \(32,\) in the file; "
            "set model.hidden_dim=32, model.num_heads=4 as in the weights",
        ),
        ({"num_heads": 8}, f"{SAME_SHAPES}; set model.num_heads=4 as in the weights"),
        ({"stride": 16}, f"{SAME_SHAPES}; set model.stride=32 as in the weights"),
        ({"position_temperature": 1e4}, f"{SAME_SHAPES}; set model.position_temperature=20.0 as in the weights"),
        ({"backbone_norm": "frozen"}, r"set model.backbone_norm=group as in the weights"),
    ],
)
def test_weights_of_another_architecture_name_the_difference_and_what_to_set(change, message, tmp_path):
    source = trained_folder(tmp_path)
    model = new_model(8, **change)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"train.initial_weights {source} does not fit the model: .*{message}"):
        initialize_model(model, source)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
