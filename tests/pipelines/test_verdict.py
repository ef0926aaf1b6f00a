"""Verdicts on what a reproduction made: histories, weights, metrics and detections, and the stages that it takes."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.params import read_yaml
from pipelines.registry import verdict
from pipelines.registry.reproduce import find_chain
from pipelines.registry.tracking import sha256
from tests.running import ROOT

HISTORY = [
    {"step": 50, "loss": 6.1190, "loss_box": 0.5, "lr": 1e-4},
    {"step": 100, "loss": 5.0, "loss_box": 0.4, "lr": 1e-4},
]
SAME = {"identical": True, "close": True, "largest_difference": None}


def rows(path, history):
    path.write_text("".join(json.dumps(row) + "\n" for row in history), encoding="utf-8")
    return path


def weights(path, **changes):
    tensors = {"b": torch.arange(4.0), "a": torch.full((2,), math.nan), "c": torch.tensor([1, 2])} | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return path


@pytest.mark.parametrize(
    ("index", "change", "close", "said"),
    [
        (0, {}, True, ""),
        (0, {"loss": 6.1193}, True, "first at step 50, loss 6.1193 here, 6.119 there"),
        (0, {"loss": 6.1290}, False, "first at step 50, loss 6.129 here, 6.119 there"),
        (0, {"lr": 2e-4}, True, "first at step 50, lr 0.0002 here, 0.0001 there"),
        (0, {"loss_box": math.nan}, False, "first at step 50, loss_box nan here, 0.5 there"),
        (1, {"loss": 9.0, "loss_box": 1.0}, True, "first at step 100, loss 9 here, 5 there"),
        (1, {"AP": 0.5}, True, "first at step 100, AP 0.5 here, None there"),
        (0, {"loss": 6.119000000001}, True, "first at step 50, loss 6.119000000001 here, 6.119 there"),
    ],
)
def test_histories_part_at_a_step_and_a_name(tmp_path, index, change, close, said):
    ours = [row | change if k == index else row for k, row in enumerate(HISTORY)]
    found = verdict.compare_history(rows(tmp_path / "here", ours), rows(tmp_path / "there", HISTORY))
    assert (found["identical"], found["close"]) == (not change, close)
    path = weights(tmp_path / "w")
    other = weights(tmp_path / "v", b=torch.arange(4.0) + 1) if change else path
    parts = verdict.compare_weights(path, other, sha256(other))
    expected = verdict.IDENTICAL if not change else verdict.CLOSE if close else verdict.DIFFERENT
    assert verdict.judge(parts, found, SAME, SAME) == (expected, said)


def test_a_shorter_history_is_another_one(tmp_path):
    found = verdict.compare_history(rows(tmp_path / "here", HISTORY[:1]), rows(tmp_path / "there", HISTORY))
    assert found["first_difference"] == {"step": 100, "name": "loss", "here": None, "there": 5.0}
    assert not found["close"]


@pytest.mark.parametrize(
    ("changes", "number", "gap", "first", "answer"),
    [
        ({"b": torch.arange(4.0) + 1e-4}, 1, pytest.approx(1e-4, rel=1e-2), "b", verdict.CLOSE),
        ({"b": torch.arange(4.0) + 1, "c": torch.tensor([1, 9])}, 2, 7.0, "b", verdict.DIFFERENT),
        ({"a": torch.zeros(2)}, 1, None, "a", verdict.DIFFERENT),
        ({"b": torch.zeros(5)}, 1, None, "b", verdict.DIFFERENT),
        ({"c": None}, 1, None, "c", verdict.DIFFERENT),
    ],
)
def test_weights_part_at_a_tensor(tmp_path, changes, number, gap, first, answer):
    """Where all of the history is the same, only rounding may be left to differ."""
    here, there = weights(tmp_path / "here"), weights(tmp_path / "there", **changes)
    found = verdict.compare_weights(here, there, sha256(there))
    assert (found["different"], found["largest_difference"], found["first_different"]) == (number, gap, first)
    assert verdict.judge(found, SAME, SAME, SAME)[0] == answer


def test_altered_and_lost_weights(tmp_path):
    here, there = weights(tmp_path / "here"), weights(tmp_path / "there", b=torch.zeros(4))
    assert torch.equal(load_file(there)["b"], torch.zeros(4))
    answer, where = verdict.judge(verdict.compare_weights(here, there, sha256(here)), SAME, SAME, SAME)
    assert (answer, where.partition(" weights")[0]) == (verdict.DIFFERENT, "the artifact store has")
    answer, where = verdict.judge(verdict.compare_weights(here, None, "abc"), SAME, SAME, SAME)
    assert answer == verdict.DIFFERENT
    assert where.endswith("abc there; without the registered file there is no finer answer")
    lost = {"identical": None, "close": None, "largest_difference": None}
    assert verdict.judge(verdict.compare_weights(here, None, sha256(here)), lost, lost, lost)[0] == verdict.IDENTICAL
    there.write_bytes(b"torn")
    assert "damaged" in verdict.compare_weights(here, there, sha256(there))["problem"]


def test_metrics_and_detections(tmp_path):
    found = verdict.compare_metrics({"AP": 0.30, "AP50": 0.5, "new": 1.0}, {"AP": 0.304, "AP50": 0.6, "old": 2.0})
    assert (found["identical"], found["close"], found["largest_difference"]["name"]) == (False, True, "AP50")
    assert not verdict.compare_metrics({"AP": 0.30}, {"AP": 0.306})["close"]
    assert verdict.compare_metrics({"AP": 0.30}, {})["identical"] is None
    boxes = [{"image_id": k, "score": 0.5} for k in range(3)]
    (tmp_path / "here").write_text(json.dumps(boxes), encoding="utf-8")
    (tmp_path / "there").write_text(json.dumps([*boxes[:2], {"image_id": 7, "score": 0.5}], indent=1), encoding="utf-8")
    found = verdict.compare_detections(tmp_path / "here", tmp_path / "there")
    assert found == {"identical": False, "images": 4, "different": 2}
    assert verdict.judge({"identical": True, "stored_sha256": None, "registered_sha256": ""}, SAME, SAME, found) == (
        verdict.CLOSE,
        "in the detections of 2 images",
    )


def test_the_stages_of_older_code_are_found_by_their_files():
    stages = read_yaml(ROOT / "dvc.yaml")["stages"]
    needed = find_chain(stages, "artifacts/evaluate/metrics.json", {})
    assert list(needed) == ["download", "validate", "train", "evaluate"]
    assert not needed["download"]
    older = {
        "judge": {
            "deps": ["artifacts/train", "data"],
            "metrics": [{"artifacts/evaluate/metrics.json": {"cache": False}}],
        },
        "fit": {"deps": ["data/coco", "code.py"], "outs": ["artifacts/train"]},
        "get": {"deps": ["code.py"], "outs": ["data/coco/train.zip"]},
        "other": {"deps": ["artifacts/train"], "outs": ["elsewhere"]},
    }
    assert list(find_chain(older, "artifacts/evaluate/metrics.json", {})) == ["get", "fit", "judge"]
