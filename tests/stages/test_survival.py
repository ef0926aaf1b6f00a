"""What training survives: being asked to stop, a kill, a damaged state. More kills: tests/slow/test_survival.py."""

import os
import shutil
import signal
import subprocess

import pytest
import torch

from detr.checkpoint import load_state
from pipelines.train import PREEMPTED, alone_in
from tests.running import call, environment
from tests.training import (
    COMMAND,
    States,
    change,
    kill_training,
    quiet,
    results,
    rows,
    started,
    trained_undisturbed,
    untrained,
    wait_for,
)

EPOCHS = 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return trained_undisturbed(tmp_path_factory.mktemp("whole"), EPOCHS)


@pytest.fixture
def folder(whole, tmp_path):
    return untrained(whole, tmp_path / "there")


def test_asked_to_stop_it_saves_its_state_and_goes_on_to_the_same_bits(whole, folder):
    training, states = started(folder), States(folder)
    wait_for(lambda: states.step() >= 2, training)
    os.kill(training.pid, signal.SIGTERM)
    assert training.wait() == PREEMPTED
    said = (folder / "log").read_text(encoding="utf-8")
    assert said.endswith("error: the training was asked to stop; the same command goes on from its last state\n")
    assert "Traceback" not in said
    assert not (folder / "artifacts/train").exists()
    said = call(folder, *COMMAND, **quiet())
    assert "resuming at step" in said
    assert results(folder) == results(whole)


def test_killed_in_the_middle_it_goes_on_to_the_same_bits(whole, folder):
    kill_training(folder, step=2, processes=2)
    assert not (folder / "artifacts/train").exists()
    assert "resuming at step" in call(folder, *COMMAND, **quiet(processes=2))
    assert results(folder) == results(whole)


def test_a_damaged_state_is_put_aside_for_the_one_before(whole, folder):
    kill_training(folder, step=4)
    (lock,) = folder.glob("scratch/*/lock")
    path = lock.with_name("state")
    if not path.exists():  # killed between the two renames of save_state
        os.replace(path.with_suffix(".torch"), path)
    before = load_state(path)["step"]
    path.write_bytes(path.read_bytes()[:-50])
    said = call(folder, *COMMAND, **quiet())
    assert path.with_suffix(".damaged").exists()
    assert f"resuming at step {before - 1} " in said
    assert results(folder) == results(whole)


def test_a_complete_training_only_writes_its_results_again(whole, folder):
    shutil.copytree(whole / "scratch", folder / "scratch")
    said = call(folder, *COMMAND, **quiet())
    assert f"resuming at step {8 * EPOCHS} " in said
    assert "epoch" not in said
    assert results(folder) == results(whole)


def test_the_same_training_started_twice_waits_and_refuses(folder, capfd):
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom pipelines.train import alone_in\n"
        "with alone_in(Path('lock here')):\n    print(os.getpid(), flush=True)\n    sys.stdin.read()\n"
    )
    command, env = ["python", "-c", code], environment(**quiet())
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=folder, env=env, text=True, **pipes) as other:
        number = int(other.stdout.readline())
        place = folder / "lock here"
        message = rf"the same training is under way in .*lock here \(process {number} on .*\); wait for its end"
        with pytest.raises(ValueError, match=message), alone_in(place, wait_seconds=0.5):
            pass
        assert "waiting 0 seconds for its end" in capfd.readouterr().out
        other.stdin.close()
        with alone_in(place, wait_seconds=600.0):
            assert f"process {os.getpid()} on" in (place / "lock").read_text(encoding="utf-8")


def test_early_stopping_ends_after_evaluations_without_a_rise(folder):
    change(folder, lr=0.0, lr_backbone=0.0, patience=2, epochs=9, keep="last", ema_decay=0.0)
    call(folder, *COMMAND, **quiet())
    assert [row["epoch"] for row in rows(folder) if "AP" in row] == [0, 1, 2]
    assert rows(folder)[-1]["step"] == 24


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
