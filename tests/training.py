"""Trainings as processes: a folder that one runs in, its start, how far it is, what it made."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kill_resume import OUTPUTS, prepare
from detr.checkpoint import load_state
from pipelines.params import read_yaml, to_yaml
from pipelines.workspace.dvc import reproduce
from tests.running import ROOT, call, environment

COMMAND = ("python", "-m", "pipelines.train")


def quiet(processes: int = 1) -> dict[str, str]:
    """The environment of a training that no tracking server hears of."""
    return {
        "PYTHONPATH": str(ROOT),
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "PET_NPROC_PER_NODE": str(processes),
        "PYTHONUNBUFFERED": "1",
    }


def started(folder: Path, processes: int = 1, cold: bool = False) -> subprocess.Popen:
    """The launching process, in a group of its own and with its output in `log`."""
    with (folder / "log").open("w", encoding="utf-8") as log:
        env = environment(cold, **quiet(processes))
        return subprocess.Popen(COMMAND, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)


def trained_undisturbed(folder: Path, epochs: int, cold: bool = False) -> Path:
    """The folder, in which a training went through."""
    prepare(folder, epochs)
    assert "starting with 1 processes" in call(folder, *COMMAND, cold=cold, **quiet())
    return folder


def untrained(folder: Path, copy: Path) -> Path:
    """A copy of the folder as it was before its training."""
    return Path(shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("train", "scratch")))


def kill_training(folder: Path, step: int, processes: int = 1, cold: bool = False) -> None:
    """Starts a training and kills it from this step on."""
    training, states = started(folder, processes, cold), States(folder)
    wait_for(lambda: states.step() >= step, training)
    os.killpg(training.pid, signal.SIGKILL)
    training.wait()
    wait_until_nobody_works_in(folder)


def interrupt_training(project: Path) -> None:
    """Starts the train stage and interrupts it, as Ctrl-C does, once it says that it starts."""

    def interrupt(line: str) -> None:
        if line.startswith("train ") and "starting" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce("train", project, interrupt)
    wait_until_nobody_works_in(project)


def wait_for(reached: Callable[[], Any], process: subprocess.Popen) -> None:
    while not reached():
        assert process.poll() is None, f"the training ended with {process.returncode} before"
        time.sleep(0.002)


class States:
    """The resume state of the training in a folder; it is read again only when it has changed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen, self.state = folder, None, None

    def newest(self) -> dict | None:
        for path in self.folder.glob("scratch/*/state"):
            try:
                found = path.stat()
                if (found.st_mtime_ns, found.st_ino) != self.seen:
                    self.state = load_state(path)
                    self.seen = (found.st_mtime_ns, found.st_ino)
            except FileNotFoundError:  # it is just being replaced
                continue
        return self.state

    def step(self) -> int:
        state = self.newest()
        return state["step"] if state else 0

    def is_judged_next(self) -> bool:
        """Whether the newest state is one of an epoch's end, after which an evaluation begins."""
        state = self.newest()
        return state is not None and state["step"] % 8 == 0 and "AP" not in state["history"][-1]


def results(folder: Path) -> list[bytes]:
    return [(folder / "artifacts/train" / name).read_bytes() for name in OUTPUTS]


def rows(folder: Path) -> list[dict]:
    return [
        json.loads(line) for line in (folder / "artifacts/train/history.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def change(folder: Path, **changes: object) -> None:
    """Changes parameters of the training."""
    document = read_yaml(folder / "params.yaml")
    document["train"] |= changes
    (folder / "params.yaml").write_text(to_yaml(document), encoding="utf-8")


def wait_until_nobody_works_in(folder: Path) -> None:
    """Returns once no process has `folder` as its working directory: killed trainings leave no orphans."""
    while True:  # until the time of the test is over
        places = []
        for link in Path("/proc").glob("[0-9]*/cwd"):
            try:
                places.append(os.readlink(link))
            except OSError:
                continue
        if str(folder) not in places:
            return
        time.sleep(0.05)
