"""A training starts from the weights that it is given, which its fingerprint covers."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import pipelines.train
from detr.backbone import ResNet
from detr.checkpoint import Category, InputSize, build_model, load_model, save_model
from detr.coco import CocoDataset, ImageArchive, load_annotations
from detr.distributed import Process
from detr.train import fit
from detr.train_config import TrainConfig
from detr.transforms import TrainTransform
from pipelines.params import from_document, merge_parameters, to_yaml
from pipelines.train import StopRequest
from tests.projects import TINY, TINY_MODEL
from tests.running import ROOT

CONFIG = from_document(merge_parameters(ROOT, None, [*TINY, "train.evaluate_epochs=0"]), "train", TrainConfig)
ALONE = Process(0, 1, torch.device("cpu"))


class Silent:
    """In MLflow's place, which is not what is tested here."""

    def __init__(self, *_):
        pass

    def put(self, *_):
        pass

    put_picture = close = put


@pytest.fixture
def trained(drawn, tmp_path, monkeypatch):
    """Trains as the stage does, and returns the folder of the result."""
    monkeypatch.setattr(pipelines.train, "Mirror", Silent)
    (tmp_path / "passed.json").write_text(json.dumps({"data": "digest"}), encoding="utf-8")

    def run(name, model=TINY_MODEL, **changes):
        config = replace(CONFIG, epochs=1, checkpoint_minutes=1.0, **changes)
        folders = (drawn, tmp_path / "passed.json", tmp_path / name, tmp_path / "scratch")
        pipelines.train.train(model, config, *folders, StopRequest(), ALONE)
        return tmp_path / name

    return run


def test_the_stage_starts_from_a_folder_that_it_wrote(trained):
    first = trained("first", lr=0.0, lr_backbone=0.0)
    never = replace(TINY_MODEL, backbone_weights="/nowhere/never-read.pth")
    second = trained("second", never, lr=0.0, lr_backbone=0.0, seed=7, initial_weights=str(first))
    third = trained("third", seed=7, initial_weights=str(first))
    before, kept, changed = (load_file(folder / "model.safetensors") for folder in (first, second, third))
    differ = {key for key in before if not torch.equal(before[key], kept[key])}
    assert differ == {"class_embed.weight", "class_embed.bias"}
    assert len({key for key in before if torch.equal(before[key], changed[key])}) == 0
    assert load_model(second)[0].config == TINY_MODEL


def test_without_initial_weights_nothing_changes(trained, drawn):
    weights = load_file(trained("out") / "model.safetensors")
    torch.manual_seed(CONFIG.seed)
    annotations = load_annotations(drawn / "instances_train.json")
    model = build_model(TINY_MODEL, len(annotations.category_ids))
    transform = TrainTransform(CONFIG.transform, CONFIG.seed)
    dataset = CocoDataset(annotations, ImageArchive(drawn / "train.zip"), transform)
    list(fit(model, dataset, replace(CONFIG, epochs=1), Process(0, 1, torch.device("cpu"))))
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_a_training_never_starts_from_the_folder_that_it_replaces(trained, tmp_path):
    with pytest.raises(ValueError, match=r"train.initial_weights is .*out, which this training replaces; copy it"):
        trained("out", initial_weights=str(tmp_path / "here" / ".." / "out"))


def test_the_fingerprint_covers_the_content_of_local_weights(tmp_path):
    folder, file = tmp_path / "trained", tmp_path / "backbone.safetensors"
    save_model(build_model(TINY_MODEL, 1), [Category(3, "cat")], InputSize(96, 96, 96), "abc", folder)
    backbone = ResNet("resnet10", 0.25, 32, "group").state_dict()
    save_file(backbone, file)
    model, config = replace(TINY_MODEL, backbone_weights=str(file)), replace(CONFIG, initial_weights=str(folder))

    def mark():
        return pipelines.train.compute_fingerprint(model, config, "data")

    marks = [mark(), mark()]
    save_file({key: value + 1 for key, value in backbone.items()}, file)
    marks.append(mark())
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes() + b" ")
    marks.append(mark())
    assert marks[0] == marks[1]
    assert len(set(marks)) == 3


def test_weights_are_fetched_before_any_process_starts(tmp_path, monkeypatch):
    document = merge_parameters(ROOT, None, ["train.initial_weights=http://127.0.0.1:9/detr-12345678.pth"])
    (tmp_path / "params.yaml").write_text(to_yaml(document), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(pipelines.train, "launch", lambda: pytest.fail("launched"))
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9/detr-12345678.pth was not fetched \("):
        pipelines.train.main()
