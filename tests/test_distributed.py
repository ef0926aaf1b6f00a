import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from detr.distributed import Process, process_group

# Weight 1 for "no object": the class loss is normalised per process by the weights of its own targets, so with
# another weight it equals that of one process only when the targets are shared out evenly. Size multiple 64: with
# group norm the amount of padding counts, and shares of a batch are padded each on its own.
SCRIPT = """
import json
import sys
from pathlib import Path

import torch

from detr.coco import CocoDataset, ImageArchive, load_annotations
from detr.distributed import process_group
from detr.evaluate import detect_all
from detr.loss import LossConfig
from detr.matcher import MatcherConfig
from detr.model import ModelConfig, build_model
from detr.train import TrainConfig, fit
from detr.transforms import TrainTransform, TransformConfig

TINY = ModelConfig("resnet10", 0.25, "group", "none", 32, "sine", 20.0, 32, 4, 64, 1, 2, 5, 0.0, 0.0, False)
TRANSFORM = TransformConfig((64,), 64, 0.5, 0.0, (), (0, 0))
CONFIG = TrainConfig(
    0, "none", 2, 8, 1e-3, 1e-3, 1e-4, "cosine", 0, 2, 0.1, "float32", 64, 1, 0, 1.0,
    MatcherConfig(1.0, 5.0, 2.0), LossConfig(1.0, 5.0, 2.0, 1.0, True), TRANSFORM,
)


def cut(image, boxes, labels, key):
    return image[:, : 64 + 7 * (key[1] % 5), : 96 - 9 * (key[1] % 3)], boxes, labels


def measure(drawn, process):
    held_out = CocoDataset(load_annotations(drawn / "instances_val.json"), ImageArchive(drawn / "val.zip"), cut)
    annotations = load_annotations(drawn / "instances_train.json")
    dataset = CocoDataset(annotations, ImageArchive(drawn / "train.zip"), TrainTransform(TRANSFORM, 0))
    torch.manual_seed(0)
    model = build_model(TINY, len(annotations.category_ids))
    detections = detect_all(model, held_out, 2, 1, process)
    rows = [report.row for report in fit(model, dataset, CONFIG, process)]
    weights = sum(p.detach().double().abs().sum() for p in model.parameters()).item()
    return {"rows": rows, "detections": detections, "weights": weights, "ranks": process.gather(process.rank)}


if __name__ == "__main__":
    drawn, output = map(Path, sys.argv[1:])
    with process_group() as process:
        result = measure(drawn, process)
        (output / f"{process.rank}.json").write_text(json.dumps(result))
"""


def test_two_processes_compute_what_one_does(drawn, tmp_path):
    script = tmp_path / "measure.py"
    script.write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [*torchrun, str(script), str(drawn), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    torch.set_num_threads(1)
    expected = runpy.run_path(str(script))["measure"](drawn, Process(0, 1, torch.device("cpu")))
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert results[0] == results[1]
    assert results[0]["ranks"] == [0, 1]
    assert results[0]["detections"] == expected["detections"]
    assert len(results[0]["rows"]) == len(expected["rows"]) == 6
    for row, other in zip(results[0]["rows"], expected["rows"], strict=True):
        for name, value in other.items():
            if name != "class_error":  # a ratio of counts, which each process takes of its own share
                assert row[name] == pytest.approx(value, rel=1e-5), (name, other["step"])
    assert results[0]["weights"] == pytest.approx(expected["weights"], rel=1e-5)


def test_without_torchrun_a_process_is_alone(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with process_group() as process:
        assert (process.rank, process.num_processes, process.is_main) == (0, 1, True)
        value = torch.tensor([1.0, 2.0])
        assert torch.equal(process.mean(value), torch.tensor([1.0, 2.0]))
        assert process.gather({"a": 1}) == [{"a": 1}]
        assert not torch.distributed.is_initialized()


def test_only_the_first_process_is_main():
    assert [Process(rank, 2, torch.device("cpu")).is_main for rank in range(2)] == [True, False]


@pytest.mark.parametrize("threads", ["1", "2"])
def test_threads_on_a_cpu_are_what_the_environment_says(threads, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    before = torch.get_num_threads()
    try:
        with process_group() as process:
            assert process.device.type == "cpu"
            assert torch.get_num_threads() == int(threads)
    finally:
        torch.set_num_threads(before)
