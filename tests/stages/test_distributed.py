"""Any number of processes computes what one does, with what torchrun tells each of itself."""

import json
import runpy

import pytest
import torch

from detr.distributed import Process, join_process_group
from tests.running import ROOT, call

# The padded size is one for all images, because how much padding an image has counts, and a micro-batch has its own.
SCRIPT = """
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from detr.checkpoint import build_model
from detr.coco import CocoDataset, ImageArchive, load_annotations
from detr.detect import detect_all
from detr.distributed import join_process_group
from detr.train import fit
from detr.transforms import TrainTransform
from tests.projects import TINY_MODEL, TINY_TRAIN

CONFIG = replace(TINY_TRAIN, epochs=4, lr=1e-4, lr_backbone=1e-5, size_multiple=96, log_steps=1)


def cut(image, boxes, labels, key):
    return image[:, : 64 + 7 * (key[1] % 5), : 96 - 9 * (key[1] % 3)], boxes, labels


def measure(drawn, process, micro_batch):
    held_out = CocoDataset(load_annotations(drawn / "instances_val.json"), ImageArchive(drawn / "val.zip"), cut)
    annotations = load_annotations(drawn / "instances_train.json")
    dataset = CocoDataset(annotations, ImageArchive(drawn / "train.zip"), TrainTransform(CONFIG.transform, 0))
    torch.manual_seed(process.rank)  # the main process's weights are everybody's
    model = build_model(replace(TINY_MODEL, backbone_norm="frozen"), len(annotations.category_ids))
    rows, detections = [], []
    for report in fit(model, dataset, replace(CONFIG, micro_batch=micro_batch), process):
        rows += [report.row] if report.row else []
        detections = detections or detect_all(report.model, held_out, 1, process)[-1].tolist()
    weights = sum(value.detach().double().abs().sum() for value in model.state_dict().values()).item()
    return {"rows": rows, "weights": weights, "detections": detections}


if __name__ == "__main__":
    drawn, output, micro_batch = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    with join_process_group() as process:
        result = measure(drawn, process, micro_batch)
        result["ranks"] = process.all_gather(process.rank)
        result["said"] = process.broadcast(f"by {process.rank}")
        (output / f"{process.rank}.json").write_text(json.dumps(result))
"""


def torchrun(script, drawn, output, processes, micro_batch):
    """What every process of the script has computed."""
    run = "from torch.distributed.run import main; main()"
    call(
        output,
        *("python", "-c", run, "--standalone", "--nproc-per-node", str(processes), "--no-python"),
        *("python", str(script), str(drawn), str(output), str(micro_batch)),
        PYTHONPATH=str(ROOT),
        CUDA_VISIBLE_DEVICES="",
    )
    return [json.loads((output / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(processes)]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "measure.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


def assert_close(result, expected):
    assert len(result["rows"]) == len(expected["rows"]) == 12
    for row, other in zip(result["rows"], expected["rows"], strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-12), other["step"]
    assert result["weights"] == pytest.approx(expected["weights"], rel=1e-5)


def test_any_number_of_processes_and_passes_computes_what_one_pass_does(script, drawn, tmp_path):
    torch.set_num_threads(1)
    measure, alone = runpy.run_path(str(script))["measure"], Process(0, 1, torch.device("cpu"))
    whole = measure(drawn, alone, 8)
    for micro_batch in (4, 1):
        assert_close(measure(drawn, alone, micro_batch), whole)
    results = torchrun(script, drawn, tmp_path, 2, 4)
    assert results[0] == results[1]
    assert (results[0]["ranks"], results[0]["said"]) == ([0, 1], "by 0")
    assert_close(results[0], whole)
    assert results[0]["detections"] == whole["detections"]
    uneven = torchrun(script, drawn, tmp_path, 3, 1)
    assert_close(uneven[2], whole)


def test_without_torchrun_a_process_is_alone(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with join_process_group() as process:
        assert (process.rank, process.num_processes, process.is_main) == (0, 1, True)
        value = torch.tensor([1.0, 2.0])
        assert torch.equal(process.all_reduce(value), torch.tensor([1.0, 2.0]))
        assert process.broadcast(value) is value
        assert process.all_gather({"a": 1}) == [{"a": 1}]
        assert not torch.distributed.is_initialized()


def test_only_the_first_process_is_main():
    assert [Process(rank, 2, torch.device("cpu")).is_main for rank in range(2)] == [True, False]


@pytest.mark.parametrize("threads", ["1", "2"])
def test_threads_on_a_cpu_are_what_the_environment_says(threads, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    before = torch.get_num_threads()
    try:
        with join_process_group() as process:
            assert process.device.type == "cpu"
            assert torch.get_num_threads() == int(threads)
    finally:
        torch.set_num_threads(before)
