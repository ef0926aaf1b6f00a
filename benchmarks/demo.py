"""The demo's quality and time, seed by seed: python benchmarks/demo.py [--seeds 0 1 2] [--set KEY=VALUE ...] [--quick]

Each seed is a run in a fresh clone of the last commit, with its own drawn scenes and registry, from download to
registration; no cache helps. Nothing else should run on the machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QUICK = [
    "download.shapes.num_train=32",
    "download.shapes.num_val=8",
    "train.epochs=1",
    "train.batch_size=8",
    "train.warmup_steps=1",
]


def run(seed: int, overrides: list[str]) -> dict[str, float]:
    """AP, AP50 and the seconds of the whole pipeline, as a person waits for them."""
    settings = [f"train.seed={seed}", f"download.shapes.seed={seed}", *overrides]
    command = [sys.executable, "-m", "pipelines", "run", *[part for s in settings for part in ("--set", s)]]
    elsewhere = ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME")
    env = {key: value for key, value in os.environ.items() if key not in elsewhere}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", ".", folder], check=True)
        started = time.perf_counter()
        subprocess.run(command, cwd=folder, env=env, check=True, stdout=sys.stderr)
        seconds = time.perf_counter() - started
        (found,) = Path(folder).glob("scratch/runs/*/metrics.json")
        metrics = json.loads(found.read_text(encoding="utf-8"))
    return {"AP": metrics["AP"], "AP50": metrics["AP50"], "AP75": metrics["AP75"], "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes a parameter")
    parser.add_argument("--quick", action="store_true", help="a smoke run: one seed, a handful of images")
    arguments = parser.parse_args()
    rows = {}
    for seed in arguments.seeds[:1] if arguments.quick else arguments.seeds:
        rows[seed] = run(seed, [*(QUICK if arguments.quick else []), *arguments.set])
    print(f"{'seed':>6}" + "".join(f"{name:>10}" for name in ("AP", "AP50", "AP75", "seconds")))
    for seed, row in rows.items():
        print(f"{seed:>6}{row['AP']:>10.3f}{row['AP50']:>10.3f}{row['AP75']:>10.3f}{row['seconds']:>10.1f}")
    figures = {f"lowest_{name}": min(row[name] for row in rows.values()) for name in ("AP", "AP50")}
    figures["highest_seconds"] = max(row["seconds"] for row in rows.values())
    print(json.dumps({"benchmark": "demo", "ratios": {}, "figures": figures}))


if __name__ == "__main__":
    main()
