"""What a training keeps: the best weights, when it has stalled, its state on a full disk, what its first line says."""

import json
import resource
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from detr.checkpoint import build_model, load_state
from detr.coco import CocoDataset, ImageArchive, load_annotations
from detr.distributed import Process
from detr.metrics import from_results
from detr.train import fit
from detr.transforms import EvalTransform, TrainTransform
from pipelines.progress import Progress
from pipelines.train import describe_start
from pipelines.training_log import Log
from tests.projects import TINY_MODEL, TINY_TRAIN, detections_like

CPU = Process(0, 1, torch.device("cpu"))
CONFIG = replace(TINY_TRAIN, epochs=4, evaluate_epochs=1, keep="best", patience=2)
GOOD, BETTER, NOTHING = 4.0, 0.5, None  # by how many pixels the boxes of an evaluation are off


@pytest.fixture
def trained(drawn, tmp_path):
    """Trains for an epoch per evaluation in `shifts`; the log at the end, and the weights after every epoch."""

    def train(shifts, each=lambda log, report: None):
        torch.manual_seed(0)
        annotations = load_annotations(drawn / "instances_train.json")
        dataset = CocoDataset(annotations, ImageArchive(drawn / "train.zip"), TrainTransform(CONFIG.transform, 0))
        truth = drawn / "instances_val.json"
        held_out = CocoDataset(load_annotations(truth), ImageArchive(drawn / "val.zip"), EvalTransform(64, 96))
        ignored = SimpleNamespace(put=lambda row: None, put_picture=lambda path: None, close=lambda: None)
        config = replace(CONFIG, epochs=len(shifts))
        log, weights = Log(tmp_path, None, ignored, config, held_out, truth), []
        for report in fit(build_model(TINY_MODEL, 8), dataset, config, CPU):
            log.add(report)
            each(log, report)
            if report.epoch_done:
                weights.append({name: value.clone() for name, value in report.model.state_dict().items()})
                shift = shifts[len(weights) - 1]
                found = [] if shift is NOTHING else detections_like(truth, shift)
                log.judge(report, from_results(found))
        return log, weights

    return train


@pytest.mark.parametrize(
    ("shifts", "best", "stalled"),
    [
        ((GOOD, NOTHING, NOTHING), 0, True),
        ((NOTHING, GOOD, BETTER), 2, False),
        ((NOTHING, BETTER, GOOD), 1, False),
    ],
)
def test_the_best_weights_are_kept_and_evaluations_without_a_rise_are_counted(trained, shifts, best, stalled):
    log, weights = trained(shifts)
    assert [name for name, value in weights[best].items() if not torch.equal(log.best[name], value)] == []
    assert any(not torch.equal(log.best[name], value) for name, value in weights[best - 1].items())
    assert log.has_stalled() == stalled
    assert len([row for row in log.history if "AP" in row]) == len(shifts)


def test_a_full_disk_is_a_warning_and_the_last_good_state_stays(trained, tmp_path, capsys):
    """No file may grow beyond half of a state, from the third step on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    saved = []

    def fill(log, report):
        if report.step == 2 and not saved:
            saved.append((tmp_path / "state").read_bytes())
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(saved[0]) // 2, before[1]))

    try:
        log, _ = trained((GOOD,), fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "warning: step 3 is not saved, it is tried again: " in capsys.readouterr().err
    assert (tmp_path / "state").read_bytes() == saved[0]
    assert load_state(tmp_path / "state")["step"] == 2
    assert not list(tmp_path.glob(".*.partial"))
    assert (
        json.loads((tmp_path / "timings.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"]
        == log.history[-1]["step"]
    )


def test_pictures_of_a_training_have_the_letters_of_its_names(drawn, tmp_path):
    """As those of the evaluation have them; Pillow's own font draws one empty box for each of these."""
    seen = []
    for number, names in enumerate((("\u043a\u043e\u0442",) * 5, ("\u043f\u0435\u0441",) * 5)):
        truth = drawn / "instances_val.json"
        annotations = replace(load_annotations(truth), category_names=names)
        held_out = CocoDataset(annotations, ImageArchive(drawn / "val.zip"), EvalTransform(64, 96))
        (folder := tmp_path / str(number)).mkdir()
        ignored = SimpleNamespace(put=lambda row: None, put_picture=lambda path: None)
        log = Log(folder, None, ignored, replace(CONFIG, keep="last"), held_out, truth)
        log.history.append({"step": 1, "epoch": 0, "loss": 1.0})
        log.bar = Progress(None, "train", 1, "step")
        log.timing = {}
        log.judge(SimpleNamespace(epoch=0, epoch_done=False), from_results(detections_like(truth, 0.5)))
        seen.append([path.read_bytes() for path in sorted((folder / "pictures").iterdir())])
    assert any(one != other for one, other in zip(*seen, strict=True))


def test_other_hardware_is_said():
    two = replace(CPU, num_processes=2)
    assert describe_start(None, two) == "starting with 2 processes on cpu"
    assert describe_start({"step": 4, "num_processes": 2}, two) == "resuming at step 4 with 2 processes on cpu"
    assert describe_start({"step": 4, "num_processes": 2}, CPU) == (
        "resuming at step 4 with 1 processes on cpu, not 2 as before: the same order of samples, other rounding"
    )
