"""Validation and versioning at COCO's size, archives beside single files: python benchmarks/data_scale.py [--quick]

Drawn data of 118,287 and 5,000 small JPEGs with annotations as large as COCO's, in two clones of the last commit: one
tracks archives, as the project does, the other folders of files. Each side's stages run by DVC, then in turn: `dvc
repro validate` with nothing to do, `dvc status`, and the validation stage (wall seconds, peak memory of all its
processes together). Takes about 15 minutes and 3 GB in scratch/.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from synthetic_coco import write_synthetic

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
DVC = [sys.executable, "-m", "dvc"]
COPY = "mkdir -p data/coco && cp -r {0}/train {0}/val {0}/instances_train.json {0}/instances_val.json data/coco"


def project(folder: Path, data: Path, single_files: bool) -> Path:
    """A clone whose download stage takes `data` as archives, or copies its folders of files, and has run."""
    from pipelines.params import merge_parameters, read_yaml, to_yaml

    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    overrides = [f"download.source={data}", "download.sha256={}", "download.mirrors={}"]
    (folder / "params.yaml").write_text(to_yaml(merge_parameters(folder, "coco-detr-r50", overrides)), encoding="utf-8")
    if single_files:
        graph = read_yaml(folder / "dvc.yaml")
        graph["stages"]["download"] |= {"cmd": COPY.format(data)}
        text = to_yaml(graph).replace("data/coco/train.zip", "data/coco/train").replace("coco/val.zip", "coco/val")
        (folder / "dvc.yaml").write_text(text, encoding="utf-8")
    (folder / "dvc.lock").unlink()
    run([*DVC, "repro", "validate"], folder)
    return folder


def run(command: list[str], folder: Path) -> tuple[float, float]:
    """Wall seconds of a command, and the peak in MB of what its processes together hold (shared pages once)."""
    env = os.environ | {"DVC_NO_ANALYTICS": "true", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    started, peak = time.perf_counter(), 0.0
    with (folder / ".." / f"{folder.name}.log").open("a", encoding="utf-8") as log:
        process = psutil.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
        while process.poll() is None:
            peak = max(peak, held(process))
            time.sleep(0.1)
    if process.returncode:
        raise RuntimeError(f"{command} failed in {folder}: {Path(log.name).read_text(encoding='utf-8')[-2000:]}")
    return time.perf_counter() - started, peak


def held(process: psutil.Process) -> float:
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss
        except psutil.Error:
            continue
    return total / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: 600 images, once")
    arguments = parser.parse_args()
    sizes = (500, 100, 3500, 700) if arguments.quick else (118_287, 5_000, 860_001, 36_781)
    (ROOT / "scratch").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "scratch") as name:
        data = Path(name) / "data"
        write_synthetic(data, *sizes, folders=True)
        folders = {side: project(Path(name) / side, data, side == "files") for side in ("archives", "files")}
        repro, _ = measure(lambda side: run([*DVC, "repro", "validate"], folders[side]), 1 if arguments.quick else 5)
        status, _ = measure(lambda side: run([*DVC, "status", "validate"], folders[side]), 1 if arguments.quick else 5)
        stage = [sys.executable, "-m", "pipelines.validate"]
        seconds, peaks = measure(lambda side: run(stage, folders[side]), 1 if arguments.quick else 3)
    rows = {
        "validate_seconds": seconds,
        "validate_peak_mb": peaks,
        "noop_repro_seconds": repro,
        "noop_status_seconds": status,
    }
    print(f"{'':24}{'archives':>12}{'files':>12}")
    for row, sides in rows.items():
        print(f"{row:24}{sides['archives']:>12.1f}{sides['files']:>12.1f}")
    figures = {row: round(sides["archives"], 2) for row, sides in rows.items()}
    figures |= {f"files_{row}": round(sides["files"], 2) for row, sides in rows.items()}
    ratios = {row: round(sides["files"] / sides["archives"], 3) for row, sides in rows.items()}
    print(json.dumps({"benchmark": "data_scale", "ratios": {"files": ratios}, "figures": figures}))


def measure(once: Callable[[str], tuple[float, float]], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Medians of seconds and of peaks of both sides, in turn."""
    found: dict[str, list[tuple[float, float]]] = {"archives": [], "files": []}
    for _ in range(rounds):
        for side, values in found.items():
            values.append(once(side))
    medians = {
        side: [statistics.median(column) for column in zip(*values, strict=True)] for side, values in found.items()
    }
    return {side: pair[0] for side, pair in medians.items()}, {side: pair[1] for side, pair in medians.items()}


if __name__ == "__main__":
    main()
