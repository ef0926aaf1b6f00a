"""What training survives, by real interpreters: signals, kills, a full disk, a second start, other hardware."""

import os
import resource
import signal

import psutil
import pytest
from safetensors.torch import load_file

from detr.checkpoint import load_state
from pipelines.train import PREEMPTED
from tests.projects import reference
from tests.running import call
from tests.training import (
    COMMAND,
    States,
    change,
    interrupt_training,
    kill_training,
    quiet,
    results,
    rows,
    started,
    trained_undisturbed,
    untrained,
    wait_for,
)

EPOCHS = 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return trained_undisturbed(tmp_path_factory.mktemp("whole"), EPOCHS, cold=True)


@pytest.fixture
def folder(whole, tmp_path):
    return untrained(whole, tmp_path / "there")


@pytest.mark.parametrize(("number", "processes"), [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_asked_to_stop_it_saves_its_state_and_goes_on_to_the_same_bits(whole, folder, number, processes):
    training, states = started(folder, processes, cold=True), States(folder)
    wait_for(lambda: states.step() >= 2, training)
    os.kill(training.pid, number)
    assert training.wait() == PREEMPTED
    said = (folder / "log").read_text(encoding="utf-8")
    assert said.endswith("error: the training was asked to stop; the same command goes on from its last state\n")
    assert "Traceback" not in said
    assert "warning" not in said.replace("warning: MLflow", "")
    assert not (folder / "artifacts/train").exists()
    said = call(folder, *COMMAND, **quiet(processes))
    assert "resuming at step" in said
    assert results(folder) == results(whole)


def test_asked_to_stop_in_an_evaluation_it_ends_at_once_and_judges_later(whole, folder):
    change(folder, checkpoint_minutes=60.0)
    training, states = started(folder, cold=True), States(folder)
    wait_for(states.is_judged_next, training)
    os.kill(training.pid, signal.SIGTERM)
    assert training.wait() == PREEMPTED
    assert "stopped after step" not in (folder / "log").read_text(encoding="utf-8")
    assert "resuming at step 8 " in call(folder, *COMMAND, **quiet())
    assert results(folder)[2] == results(whole)[2]


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_in_the_middle_it_goes_on_to_the_same_bits(whole, folder, processes):
    """SIGKILL after a state is on disk; what follows resumes and ends as if nothing had happened."""
    kill_training(folder, 1, processes, cold=True)
    assert not (folder / "artifacts/train/model.safetensors").exists()
    assert "resuming at step" in call(folder, *COMMAND, **quiet(processes))
    assert results(folder) == results(whole)


def test_an_interrupted_stage_ends_with_all_its_processes(tmp_path):
    slow = reference(tmp_path / "slow")
    text = (slow / "params.yaml").read_text(encoding="utf-8")
    for was, now in (("epochs: 2", "epochs: 100000"), ("evaluate_epochs: 1", "evaluate_epochs: 0")):
        assert was in text
        text = text.replace(was, now)
    (slow / "params.yaml").write_text(text, encoding="utf-8")
    interrupt_training(slow)


def test_a_full_disk_is_a_warning_and_the_last_good_state_stays(whole, folder):
    """Files may grow to the size of the results and no further, which cuts states off as a full disk does."""
    size = (whole / "artifacts/train/model.safetensors").stat().st_size
    training, states = started(folder, cold=True), States(folder)
    wait_for(lambda: states.step() >= 3, training)
    for process in psutil.Process(training.pid).children(recursive=True):
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2 * size, 2 * size))
    assert training.wait() == 0
    said = (folder / "log").read_text(encoding="utf-8")
    assert said.count("is not saved, it is tried again") > 5
    step = States(folder).step()
    assert 3 <= step < 8 * EPOCHS
    assert not list(folder.glob("scratch/*/.*.partial"))
    assert results(folder) == results(whole)
    assert f"resuming at step {step} " in call(folder, *COMMAND, **quiet())
    assert results(folder) == results(whole)


def test_a_damaged_state_is_put_aside_for_the_one_before_and_it_says_so(whole, folder):
    kill_training(folder, step=4, cold=True)
    (lock,) = folder.glob("scratch/*/lock")
    path = lock.with_name("state")
    if not path.exists():  # killed between the two renames of save_state
        os.replace(path.with_suffix(".torch"), path)
    before = load_state(path)["step"]
    path.write_bytes(path.read_bytes()[:-50])
    said = call(folder, *COMMAND, cold=True, **quiet())
    assert "state is damaged and was moved to" in said
    assert f"resuming at step {before - 1} " in said
    assert results(folder) == results(whole)


def test_other_hardware_is_said_and_changes_the_bits_at_most(whole, folder):
    kill_training(folder, 4, processes=2, cold=True)
    said = call(folder, *COMMAND, **quiet())
    assert "with 1 processes on cpu, not 2 as before: the same order of samples, other rounding" in said
    for row, other in zip(rows(folder), rows(whole), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_two_at_once_end_with_one_result(whole, folder):
    first, second = started(folder, cold=True), started(folder, cold=True)
    assert (first.wait(), second.wait()) == (0, 0)
    assert results(folder) == results(whole)


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
