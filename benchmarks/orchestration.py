"""What Prefect adds to plain DVC: python benchmarks/orchestration.py [--rounds 2] [--set KEY=VALUE ...] [--quick]

Two clones of the last commit, each with its own cache, use one MLflow server. In each round both train, evaluate and
register once, each a seed of its own, in turn: one by `dvc repro`, the other as a run of the deployment
retrain/on-demand in a worktree, by Prefect's server and worker. The ratio is the median over rounds of the run's
seconds, from its start to its end, by those of `dvc repro`. Then the same run again, with nothing to do. Nothing else
should run on the machine.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import requests

QUICK = ["download.shapes.num_train=32", "download.shapes.num_val=8", "train.batch_size=8", "train.warmup_steps=1"]


def call(folder: Path, *command: str, **env: str) -> str:
    done = subprocess.run([sys.executable, "-m", *command], cwd=folder, env=os.environ | env, stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(f"{command} ended with {done.returncode}: {done.stdout.decode()[-2000:]}")
    return done.stdout.decode()


def plain(clone: Path, overrides: list[str], mlflow: str) -> float:
    """Seconds of `dvc repro`."""
    settings = [part for override in overrides for part in ("--set", override)]
    subprocess.run(["git", "checkout", "--quiet", "params.yaml"], cwd=clone, check=True)  # those of the round before
    merged = call(clone, "pipelines", "params", *settings)
    started = time.perf_counter()
    (clone / "params.yaml").write_text(merged, encoding="utf-8")
    call(clone, "dvc", "repro", MLFLOW_TRACKING_URI=mlflow)
    return time.perf_counter() - started


def retrain(api: str, overrides: list[str]) -> dict[str, Any]:
    """Seconds of a run: `total` from its start to its end, `first` to its first stage, `waited` before; its states."""
    found = requests.get(f"{api}/deployments/name/retrain/on-demand", timeout=30).json()
    asked = {"parameters": {"overrides": overrides}}
    run = requests.post(f"{api}/deployments/{found['id']}/create_flow_run", json=asked, timeout=30).json()
    while run["state_type"] not in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
        time.sleep(1)
        run = requests.get(f"{api}/flow_runs/{run['id']}", timeout=30).json()
    if run["state_type"] != "COMPLETED":
        raise SystemExit(f"the run ended as {run['state_name']}: {run['state']['message']}")
    query: dict[str, Any] = {"flow_runs": {"id": {"any_": [run["id"]]}}, "sort": "EXPECTED_START_TIME_ASC"}
    stages = requests.post(f"{api}/task_runs/filter", json=query, timeout=30).json()
    start, end, created = (datetime.fromisoformat(run[name]) for name in ("start_time", "end_time", "created"))
    first = min(datetime.fromisoformat(stage["start_time"]) for stage in stages)
    return {
        "total": (end - start).total_seconds(),
        "first": (first - start).total_seconds(),
        "waited": (start - created).total_seconds(),
        "states": sorted({stage["state_name"] for stage in stages}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes a parameter")
    parser.add_argument("--quick", action="store_true", help="a smoke run: one round, a handful of images")
    arguments = parser.parse_args()
    overrides = [*(QUICK if arguments.quick else []), *arguments.set]
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(str(free.getsockname()[1]))
    api, mlflow = f"http://127.0.0.1:{ports[0]}/api", f"http://127.0.0.1:{ports[1]}"
    os.environ.pop("PREFECT_HOME", None)  # each clone has its own
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as an exception, which stops the servers
    with tempfile.TemporaryDirectory() as folder:
        clones = {name: Path(folder, name) for name in ("plain", "prefect")}
        for clone in clones.values():
            subprocess.run(["git", "clone", "--quiet", ".", clone], check=True)
        try:
            call(clones["prefect"], "pipelines", "up", "--prefect-port", ports[0], "--mlflow-port", ports[1])
            plain(clones["plain"], [*overrides, "train.epochs=1"], mlflow)  # data, for both sides
            retrain(api, [*overrides, "train.epochs=1"])
            seconds: dict[str, list[float]] = {name: [] for name in clones}
            for turn in range(1 if arguments.quick else arguments.rounds):
                seeds = {name: [*overrides, f"train.seed={100 + 2 * turn + k}"] for k, name in enumerate(clones)}
                for name in list(clones)[:: 1 if turn % 2 else -1]:
                    took = (
                        plain(clones[name], seeds[name], mlflow)
                        if name == "plain"
                        else retrain(api, seeds[name])["total"]
                    )
                    seconds[name].append(took)
                    print(f"round {turn + 1}: {name} {took:.1f} s", file=sys.stderr, flush=True)
            again = retrain(api, seeds["prefect"])
        finally:
            call(clones["prefect"], "pipelines", "down")
    ratio = statistics.median(a / b for a, b in zip(seconds["prefect"], seconds["plain"], strict=True))
    print(f"{'dvc repro':<44}{statistics.median(seconds['plain']):>8.1f} s")
    print(f"{'the same by Prefect':<44}{statistics.median(seconds['prefect']):>8.1f} s   {ratio:.3f}")
    print(f"{'start of a run to its first stage':<44}{again['first']:>8.1f} s")
    print(f"{'nothing to do: ' + ', '.join(again['states']):<44}{again['total']:>8.1f} s")
    print(f"{'before that, until the worker took the run':<44}{again['waited']:>8.1f} s")
    figures = {name: round(again[name], 1) for name in ("first", "total", "waited")}
    print(json.dumps({"benchmark": "orchestration", "ratios": {"dvc repro": round(ratio, 3)}, "figures": figures}))


if __name__ == "__main__":
    main()
