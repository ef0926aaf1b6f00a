"""Exactness: a training killed again and again ends in the same bits: python benchmarks/kill_resume.py [--kills 20]

A small training by the real launcher, with dropout, averaged weights and evaluations, is ended by SIGKILL of its whole
process group and started again, until it has been killed that often: at random moments of its start, of its steps, of
evaluations, and while a state is written, as told by what each kill left. Its weights, config and history must be byte
for byte those of a training that nobody disturbed: on a CPU, with one process and two, each killed `--kills` times.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from detr.checkpoint import load_state  # noqa: E402
from pipelines.data.shapes import write_shapes  # noqa: E402
from pipelines.download import DownloadParams  # noqa: E402
from pipelines.params import from_document, merge_parameters, to_yaml  # noqa: E402

OUTPUTS = ("model.safetensors", "config.json", "history.jsonl")
SMALL = [
    "download.shapes.num_train=64", "download.shapes.num_val=32", "model.hidden_dim=32", "model.dim_feedforward=64",
    "model.num_encoder_layers=1", "model.dropout=0.1", "train.batch_size=8", "train.micro_batch=4", "train.log_steps=3",
    "train.evaluate_epochs=1", "train.warmup_steps=2", "train.ema_decay=0.9", "train.keep=best",
    "train.checkpoint_minutes=0.0",
]  # fmt: skip
STEPS_PER_EPOCH = 8
PHASES = ("state", "step", "evaluation", "launch", "state", "evaluation", "step", "start")


def prepare(folder: Path, epochs: int) -> None:
    """A folder that `python -m pipelines.train` runs in, with a copy of the code: an edit meanwhile changes nothing."""
    document = merge_parameters(ROOT, None, [*SMALL, f"train.epochs={epochs}"])
    for name in ("detr", "pipelines"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "data/coco").mkdir(parents=True)
    write_shapes(from_document(document, "download", DownloadParams).shapes, folder / "data/coco")
    (folder / "params.yaml").write_text(to_yaml(document), encoding="utf-8")
    (folder / "artifacts/validate").mkdir(parents=True)
    (folder / "artifacts/validate/passed.json").write_text('{"data": "kill_resume"}', encoding="utf-8")


def start(folder: Path, processes: int) -> subprocess.Popen[bytes]:
    extra = {"PYTHONPATH": str(folder), "PET_NPROC_PER_NODE": str(processes), "PYTHONUNBUFFERED": "1"}
    env = os.environ | extra | {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "CUDA_VISIBLE_DEVICES": ""}
    with (folder / "log").open("ab") as log:
        command = [sys.executable, "-m", "pipelines.train"]
        return subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)


def newest(folder: Path) -> tuple[int, int]:
    """What changes with every state that is written: when it was, and its number on the disk."""
    found = [path.stat() for path in folder.glob("scratch/*/state")]
    return (found[0].st_mtime_ns, found[0].st_ino) if found else (0, 0)


def is_judged_next(folder: Path) -> bool:
    """Whether the newest state is one of an epoch's end, after which an evaluation begins."""
    for path in folder.glob("scratch/*/state"):
        with contextlib.suppress(OSError, ValueError):
            state = load_state(path)
            return state is not None and state["step"] % STEPS_PER_EPOCH == 0 and "AP" not in state["history"][-1]
    return False


def torn(folder: Path) -> set[tuple[Path, int]]:
    """Files of a state that is being written, or was when the training was killed, with their inodes."""
    names = (".state.torch.*.partial", "state.torch")
    found = set()
    for path in (path for name in names for path in folder.glob(f"scratch/*/{name}")):
        with contextlib.suppress(OSError):
            found.add((path, path.stat().st_ino))
    return found


def has_workers(launcher: subprocess.Popen[bytes]) -> bool:
    with contextlib.suppress(psutil.Error):
        return any("pipelines.train" in child.cmdline() for child in psutil.Process(launcher.pid).children())
    return False


def kill_in(phase: str, victim: subprocess.Popen[bytes], folder: Path, rng: random.Random) -> str | None:
    """Ends the training at a random moment near the phase; what it hit, or None if the training was through before."""
    before, torn_before = newest(folder), torn(folder)

    def until(reached: Callable[[], object]) -> None:
        while victim.poll() is None and not reached():
            time.sleep(0.001)

    if phase == "launch":  # of torchrun, before there are workers
        time.sleep(rng.uniform(0.5, 4.0))
    elif phase == "start":  # of the workers
        until(lambda: has_workers(victim))
        time.sleep(rng.uniform(0.0, 4.0))
    else:
        until(lambda: newest(folder) != before)  # some progress, or the same moment would be killed for ever
        if phase == "step":
            time.sleep(rng.uniform(0.0, 1.5))
        elif phase == "state":
            until(lambda: torn(folder) - torn_before)
            time.sleep(rng.uniform(0.0, 0.03))
        else:
            until(lambda: is_judged_next(folder))
            time.sleep(rng.uniform(0.0, 0.4))
    if victim.poll() is not None:
        return None
    workers = psutil.Process(victim.pid).children(recursive=True)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    left = newest(folder)
    if psutil.wait_procs(workers, timeout=60)[1] or (phase == "start" and newest(folder) != left):
        raise RuntimeError(f"killed in {phase}, it left a process that trains on")
    if torn(folder) - torn_before:
        return "state"
    if newest(folder) == before:
        return "start" if workers else "launch"
    return "evaluation" if is_judged_next(folder) else "step"


def measure(folder: Path, processes: int, kills: int) -> tuple[Counter[str], bool]:
    """How often the training was killed in each phase, and whether it ended in the bits of an undisturbed one."""
    rng = random.Random(processes)
    for name in ("whole", "killed"):
        prepare(folder / name, epochs=2 + kills)
    whole, killed = folder / "whole", folder / "killed"
    if start(whole, processes).wait():
        raise RuntimeError((whole / "log").read_text(encoding="utf-8"))
    counts: Counter[str] = Counter()
    while sum(counts.values()) < kills:
        phase = PHASES[sum(counts.values()) % len(PHASES)]
        hit = kill_in(phase, start(killed, processes), killed, rng)
        if hit is None:
            raise RuntimeError(
                f"it ended after {dict(counts)} kills: {(killed / 'log').read_text(encoding='utf-8')[-2000:]}"
            )
        counts[hit] += 1
        print(f"{processes} processes, kill {sum(counts.values())}: in {hit}", flush=True)
    if start(killed, processes).wait():
        raise RuntimeError((killed / "log").read_text(encoding="utf-8")[-2000:])
    results = [[(side / "artifacts/train" / name).read_bytes() for name in OUTPUTS] for side in (whole, killed)]
    return counts, results[0] == results[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="a smoke run: two kills, one process")
    arguments = parser.parse_args()
    kills, several = (2, [1]) if arguments.quick else (arguments.kills, arguments.processes)
    figures: dict[str, Any] = {"kills": 0, "identical": True}
    for processes in several:
        with tempfile.TemporaryDirectory() as folder:
            counts, identical = measure(Path(folder), processes, kills)
        figures["kills"] += sum(counts.values())
        figures["identical"] &= identical
        figures[f"phases with {processes} processes"] = dict(counts)
    print(json.dumps({"benchmark": "kill_resume", "ratios": {}, "figures": figures}))
    sys.exit(not figures["identical"])


if __name__ == "__main__":
    main()
