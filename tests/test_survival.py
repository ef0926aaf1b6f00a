"""What training survives: being asked to stop, a full disk, a damaged state, a second start, other hardware."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.kill_resume import OUTPUTS, is_judged_next, prepare
from detr.checkpoint import load_state
from pipelines.params import read_yaml, to_yaml
from pipelines.train import PREEMPTED, alone_in
from tests.conftest import ROOT, call, environment

COMMAND = (sys.executable, "-m", "pipelines.train")
EPOCHS = 3


def quiet(processes=1):
    return {
        "PYTHONPATH": str(ROOT),
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "PET_NPROC_PER_NODE": str(processes),
        "PYTHONUNBUFFERED": "1",
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder in which a training went through undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    prepare(folder, EPOCHS)
    assert "starting with 1 processes" in call(folder, *COMMAND, **quiet())
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """The same before any training."""
    return Path(shutil.copytree(whole, tmp_path / "there", ignore=shutil.ignore_patterns("train", "scratch")))


def results(folder):
    return [(folder / "artifacts/train" / name).read_bytes() for name in OUTPUTS]


def rows(folder):
    return [json.loads(line) for line in (folder / "artifacts/train/history.jsonl").read_text().splitlines()]


def change(folder, **changes):
    document = read_yaml(folder / "params.yaml")
    document["train"] |= changes
    (folder / "params.yaml").write_text(to_yaml(document))


def started(folder, processes=1):
    """The launching process, its output in `log`."""
    with (folder / "log").open("w") as log:
        env = environment(**quiet(processes))
        return subprocess.Popen(COMMAND, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)


def wait_for(reached, process):
    while not reached():
        assert process.poll() is None, "the training ended before"
        time.sleep(0.002)


def step_of(folder):
    for path in folder.glob("scratch/*/state"):
        state = load_state(path)
        return state["step"] if state else 0
    return 0


@pytest.mark.parametrize(("number", "processes"), [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_asked_to_stop_it_saves_its_state_and_goes_on_to_the_same_bits(whole, folder, number, processes):
    training = started(folder, processes)
    wait_for(lambda: step_of(folder) >= 2, training)
    os.kill(training.pid, number)
    assert training.wait() == PREEMPTED
    said = (folder / "log").read_text()
    assert said.endswith("error: the training was asked to stop; the same command goes on from its last state\n")
    assert "Traceback" not in said
    assert "warning" not in said.replace("warning: MLflow", "")
    assert not (folder / "artifacts/train").exists()
    said = call(folder, *COMMAND, **quiet(processes))
    assert "resuming at step" in said
    assert results(folder) == results(whole)


def test_asked_to_stop_in_an_evaluation_it_ends_at_once_and_judges_later(whole, folder):
    change(folder, checkpoint_minutes=60.0)
    training = started(folder)
    wait_for(lambda: is_judged_next(folder), training)
    os.kill(training.pid, signal.SIGTERM)
    assert training.wait() == PREEMPTED
    assert "stopped after step" not in (folder / "log").read_text()
    assert "resuming at step 8 " in call(folder, *COMMAND, **quiet())
    assert results(folder)[2] == results(whole)[2]


def test_a_full_disk_is_a_warning_and_the_last_good_state_stays(whole, folder):
    """Files may grow to the size of the results and no further, which cuts states off as a full disk does."""
    size = (whole / "artifacts/train/model.safetensors").stat().st_size
    training = started(folder)
    wait_for(lambda: step_of(folder) >= 3, training)
    for process in psutil.Process(training.pid).children(recursive=True):
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2 * size, 2 * size))
    assert training.wait() == 0
    said = (folder / "log").read_text()
    assert said.count("is not saved, it is tried again") > 5
    assert 3 <= step_of(folder) < 8 * EPOCHS
    assert not list(folder.glob("scratch/*/.*.partial"))
    assert results(folder) == results(whole)
    assert f"resuming at step {step_of(folder)} " in call(folder, *COMMAND, **quiet())
    assert results(folder) == results(whole)


def test_a_damaged_state_is_put_aside_for_the_one_before(whole, folder):
    training = started(folder)
    wait_for(lambda: step_of(folder) >= 4, training)
    os.killpg(training.pid, signal.SIGKILL)
    training.wait()
    (lock,) = folder.glob("scratch/*/lock")
    path = lock.with_name("state")
    if not path.exists():  # killed between the two renames of save_state
        os.replace(path.with_suffix(".torch"), path)
    before = load_state(path)["step"]
    path.write_bytes(path.read_bytes()[:-50])
    said = call(folder, *COMMAND, **quiet())
    assert "state is damaged and was moved to" in said
    assert f"resuming at step {before - 1} " in said
    assert results(folder) == results(whole)


def test_other_hardware_is_said_and_changes_the_bits_at_most(whole, folder):
    training = started(folder, processes=2)
    wait_for(lambda: step_of(folder) >= 4, training)
    os.killpg(training.pid, signal.SIGKILL)
    training.wait()
    said = call(folder, *COMMAND, **quiet())
    assert "with 1 processes on cpu, not 2 as before: the same order of samples, other rounding" in said
    for row, other in zip(rows(folder), rows(whole), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_complete_training_only_writes_its_results_again(whole, folder):
    shutil.copytree(whole / "scratch", folder / "scratch")
    said = call(folder, *COMMAND, **quiet())
    assert f"resuming at step {8 * EPOCHS} " in said
    assert "epoch" not in said
    assert results(folder) == results(whole)


def test_the_same_training_started_twice_waits_and_refuses(folder, capfd):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom pipelines.train import alone_in\n"
        "with alone_in(Path('lock here')):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    command, env = [sys.executable, "-c", code], environment(**quiet())
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=folder, env=env, text=True, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        place = folder / "lock here"
        message = rf"the same training is under way in .*lock here \(process {other.pid} on .*\); wait for its end"
        with pytest.raises(ValueError, match=message), alone_in(place, wait_seconds=0.5):
            pass
        assert "waiting 0 seconds for its end" in capfd.readouterr().out
        other.stdin.close()
        with alone_in(place, wait_seconds=60.0):
            assert f"process {os.getpid()} on" in (place / "lock").read_text()


def test_two_at_once_end_with_one_result(whole, folder):
    first, second = started(folder), started(folder)
    assert (first.wait(), second.wait()) == (0, 0)
    assert results(folder) == results(whole)


def test_early_stopping_ends_after_evaluations_without_a_rise(folder):
    change(folder, lr=0.0, lr_backbone=0.0, patience=2, epochs=9, keep="last", ema_decay=0.0)
    call(folder, *COMMAND, **quiet())
    assert [row["epoch"] for row in rows(folder) if "AP" in row] == [0, 1, 2]
    assert rows(folder)[-1]["step"] == 24


def test_the_best_weights_are_kept(folder):
    """Those of the first evaluation when the second is no better; a rate that never falls makes these the last of two."""
    change(folder, epochs=4, ema_decay=0.0, evaluate_epochs=2, schedule="step", lr_drop_epoch=99)
    call(folder, *COMMAND, **quiet())
    best = load_file(folder / "artifacts/train/model.safetensors")
    first, second = (row["AP"] for row in rows(folder) if "AP" in row)
    change(folder, keep="last", epochs=4 if second > first else 2)
    call(folder, *COMMAND, **quiet())
    expected = load_file(folder / "artifacts/train/model.safetensors")
    assert [name for name, value in expected.items() if not (best[name] == value).all()] == []
    assert len({path.name for path in (folder / "scratch").iterdir()}) == 2


def test_what_is_not_finite_leaves_evidence(folder):
    change(folder, lr=1e30, lr_backbone=1e30, warmup_steps=0)
    said = call(folder, *COMMAND, code=1, **quiet(processes=2))
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "at step" in line
    assert "Traceback" not in said
    (path,) = folder.glob("scratch/*/not_finite.torch")
    assert line.endswith(f"state and gradient norms are in {path.relative_to(folder)}")
    evidence = torch.load(path, weights_only=True)
    assert len(evidence["image_ids"]) == 8
    assert evidence["state"]["step"] >= 1
    assert not (folder / "artifacts/train").exists()
