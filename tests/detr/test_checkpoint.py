import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from detr.checkpoint import (
    Category,
    InputSize,
    build_model,
    load_model,
    load_state,
    save_model,
    save_state,
    write_atomically,
)
from tests.projects import TINY_MODEL

CATEGORIES = [Category(3, "cat"), Category(44, "dog")]


def saved(folder, config=TINY_MODEL):
    torch.manual_seed(0)
    model = build_model(config, len(CATEGORIES))
    save_model(model, CATEGORIES, InputSize(480, 640, 32), "abc", folder)
    return model


def test_an_atomic_write_replaces_the_file_and_makes_its_folder(tmp_path):
    path = tmp_path / "new" / "file"
    for content in (b"", b"first", b"second"):
        write_atomically(path, lambda file, content=content: file.write(content))
        assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("before", [None, b"old"])
def test_a_writer_that_fails_leaves_the_old_file_and_no_other(before, tmp_path):
    path = tmp_path / "file"
    if before:
        path.write_bytes(before)

    def write(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, write)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({"file": before} if before else {})


@pytest.mark.parametrize("change", [{}, {"backbone_norm": "frozen", "position": "learned"}, {"stride": 16}])
def test_a_model_comes_back_as_it_was(change, tmp_path):
    model = saved(tmp_path, replace(TINY_MODEL, **change)).eval()
    again, categories, input_size = load_model(tmp_path)
    assert not again.training
    assert (categories, input_size, again.config) == (CATEGORIES, InputSize(480, 640, 32), model.config)
    images, padding = torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    with torch.no_grad():
        for result, expected in zip(again(images, padding), model(images, padding), strict=True):
            assert torch.equal(result, expected)


def test_models_in_channels_last_are_the_same_file(tmp_path):
    model = saved(tmp_path / "a")
    save_model(model.to(memory_format=torch.channels_last), CATEGORIES, InputSize(480, 640, 32), "abc", tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_model_with_pretrained_weights_needs_them_no_more(tmp_path):
    model = saved(tmp_path, replace(TINY_MODEL, backbone_norm="frozen"))
    document = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    document["model"]["backbone_weights"] = "imagenet"
    (tmp_path / "config.json").write_text(json.dumps(document), encoding="utf-8")
    again, _, _ = load_model(tmp_path)
    assert torch.equal(again.query_embed.weight, model.query_embed.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.update({"class_embed.bias": torch.zeros(7)}),
            r"class_embed.bias is \(3,\) in the model, \(7,\) in the file",
        ),
        (
            lambda weights: weights.pop("query_embed.weight"),
            r"query_embed.weight is \(5, 32\) in the model, absent in the file",
        ),
        (
            lambda weights: weights.update(extra=torch.zeros(2)),
            r"extra is absent in the model, \(2,\) in the file",
        ),
    ],
)
def test_weights_that_do_not_fit_name_the_first_difference(change, message, tmp_path):
    saved(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{tmp_path}: model.safetensors does not fit config.json: {message}"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-10], lambda data: b"\xff\xfe" + data])
def test_a_torn_model_is_named(name, damage, tmp_path):
    saved(tmp_path)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(
        ValueError, match=rf"{tmp_path} holds no whole model of this version \(.+\); train or fetch it again"
    ):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document["model"].pop("dropout"), "TypeError: .*'dropout'"),
        (lambda document: document["model"].update(width=2), "TypeError: .*'width'"),
        (lambda document: document["model"].update(stride=8), "ValueError: model.stride is 8, expected one of"),
        (lambda document: document.pop("categories"), "KeyError: 'categories'"),
        (lambda document: document.update(categories=["cat"]), "TypeError: "),
    ],
)
def test_a_model_of_another_version_is_named(change, message, tmp_path):
    saved(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    change(document)
    (tmp_path / "config.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{tmp_path} holds no whole model of this version \({message}"):
        load_model(tmp_path)


def test_weights_of_another_architecture_name_the_first_difference(tmp_path):
    saved(tmp_path)
    saved(tmp_path / "other", replace(TINY_MODEL, num_decoder_layers=1, num_queries=9))
    (tmp_path / "other/model.safetensors").rename(tmp_path / "model.safetensors")
    message = r"query_embed.weight is \(5, 32\) in the model, \(9, 32\) in the file"
    with pytest.raises(ValueError, match=f"{tmp_path}: model.safetensors does not fit config.json: {message}"):
        load_model(tmp_path)


def test_a_pickle_with_code_in_the_place_of_weights_is_never_run(tmp_path):
    saved(tmp_path)
    torch.save({"a": Malicious(str(tmp_path / "run"))}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds no whole model of this version"):
        load_model(tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file_is_named(name, tmp_path):
    saved(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_model(tmp_path)


def state_of(step):
    return {"model": {"w": torch.full((50,), float(step))}, "optimizer": {"state": {}, "groups": [1e-3]}, "step": step}


def test_without_a_state_there_is_none(tmp_path):
    assert load_state(tmp_path / "state") is None


def test_the_newest_state_comes_back(tmp_path):
    for step in (1, 2, 3):
        save_state(state_of(step), tmp_path / "new" / "state")
        state = load_state(tmp_path / "new" / "state")
        assert torch.equal(state.pop("model")["w"], torch.full((50,), float(step)))
        assert state == {"optimizer": {"state": {}, "groups": [1e-3]}, "step": step}
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"state", "state.previous"}


def flip_one_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "no_digest": lambda path: path.write_bytes(path.read_bytes()[:-32]),
    "one_bit": flip_one_bit,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_torn_state_is_passed_over_for_the_one_before(damage, tmp_path):
    path = tmp_path / "state"
    for step in (1, 2):
        save_state(state_of(step), path)
    before = path.read_bytes()
    DAMAGES[damage](path)
    assert path.read_bytes() != before
    with pytest.warns(
        UserWarning, match="state is damaged and was moved to .*state.damaged; looking for the state before"
    ):
        assert load_state(path)["step"] == 1
    assert not path.exists()
    assert load_state(path)["step"] == 1
    DAMAGES[damage](path.with_suffix(".previous"))
    with pytest.warns(UserWarning, match="state.previous is damaged"):
        assert load_state(path) is None


def test_between_the_two_renames_the_state_before_is_there(tmp_path):
    path = tmp_path / "state"
    for step in (1, 2):
        save_state(state_of(step), path)
    path.unlink()
    assert load_state(path)["step"] == 1
    path.with_suffix(".previous").unlink()
    assert load_state(path) is None


def test_a_state_that_cannot_be_written_costs_none_of_the_ones_before(tmp_path):
    path = tmp_path / "state"
    for step in (1, 2):
        save_state(state_of(step), path)
    for _ in range(2):
        with pytest.raises(TypeError, match="cannot pickle"):
            save_state({"step": 3, "generator": (k for k in range(3))}, path)
    assert load_state(path)["step"] == 2
    path.unlink()
    assert load_state(path)["step"] == 1


def test_a_torn_state_never_costs_the_good_one_before(tmp_path):
    path = tmp_path / "state"
    for step in (1, 2):
        save_state(state_of(step), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TypeError, match="cannot pickle"):
        save_state({"generator": (k for k in range(3))}, path)
    with pytest.warns(UserWarning, match="is damaged"):
        assert load_state(path)["step"] == 1
    save_state(state_of(2), path)
    assert path.with_suffix(".previous").read_bytes() != path.with_suffix(".damaged").read_bytes()
    assert [load_state(file)["step"] for file in (path, path.with_suffix(".previous"))] == [2, 1]


class Malicious:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (self.victim,)


def test_code_in_a_state_is_never_run(tmp_path):
    save_state({"step": Malicious(str(tmp_path / "run"))}, tmp_path / "state")
    message = rf"{tmp_path}/state is not a whole file of weights and nothing else \(it asks for posix.mkdir\)"
    with pytest.raises(ValueError, match=message):
        load_state(tmp_path / "state")
    assert not (tmp_path / "run").exists()
