"""The memory and time of COCO's annotations, beside Python objects: python benchmarks/dataset_memory.py [--quick]

Drawn data of COCO's full size in scratch/: 118,287 pictures, 860,001 objects, a JSON of 444 MB. The peer is
torchvision.datasets.CocoDetection on single files, which holds pycocotools' dicts, as the authors' dataset does. A
loader with one worker reads the whole epoch; the worker's own memory is what Linux calls private, less that of a worker
on 640 pictures. Takes 10 minutes and 8 GB of memory, most of it the peer's.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from synthetic_coco import write_synthetic
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def ours(folder: Path) -> Dataset:
    from detr.coco import CocoDataset, load_annotations
    from detr.images import open_images

    return CocoDataset(load_annotations(folder / "instances_train.json"), open_images(folder / "train.zip"), unchanged)


def unchanged(image: Any, boxes_xyxy: Any, labels: Any, key: tuple[int, int]) -> tuple[Any, Any, Any]:
    return image, boxes_xyxy, labels


def objects(folder: Path) -> Dataset:
    from torchvision.datasets import CocoDetection

    with contextlib.redirect_stdout(io.StringIO()):
        return CocoDetection(folder / "train", str(folder / "instances_train.json"))


def measure(build: Callable[[Path], Any], full: Path, small: Path) -> dict[str, float]:
    """Figures of one side, of a process that does nothing else."""
    little = build(small)  # imports what is needed
    figures = {}
    for turn in ("first", "second"):
        dataset = None  # frees the first
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        dataset = build(full)
        figures[f"{turn} open, seconds"] = time.perf_counter() - started
        if turn == "first":
            figures["first open, peak MB"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    for method in ("fork", "spawn"):
        added = worker(dataset, method) - worker(little, method)
        figures[f"worker by {method}, MB"] = added
    return figures


def worker(dataset: Any, method: str) -> float:
    """Private MB of a loader's worker after an epoch."""
    order = random.Random(0).sample(range(len(dataset)), len(dataset))
    keys = order if hasattr(dataset, "coco") else [(0, index) for index in order]
    loader: DataLoader = DataLoader(
        dataset, 16, sampler=keys, num_workers=1, multiprocessing_context=method, collate_fn=len
    )  # fmt: skip
    read = 0
    for count in loader:
        read += count
        if read == len(dataset):
            (process,) = multiprocessing.active_children()
            return private(process.pid)
    raise RuntimeError(f"the loader ended after {read} of {len(dataset)} pictures")


def private(pid: int | None) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run on 1,000 pictures")
    counts = (1000, 80, 7000, 400) if parser.parse_args().quick else (118_287, 80, 860_001, 400)
    (ROOT / "scratch").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "scratch") as name:
        full, small = Path(name) / "full", Path(name) / "small"
        write_synthetic(full, *counts, folders=True)
        write_synthetic(small, 640, 80, 4000, 400, folders=True)
        sides = []
        for build in (objects, ours):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                sides.append(pool.submit(measure, build, full, small).result())
    print(f"{'':32}{'objects':>12}{'ours':>12}{'ratio':>9}")
    table = {what: (round(sides[0][what], 2), round(sides[1][what], 2)) for what in sides[0]}
    ratios = {}
    for what, (theirs, mine) in table.items():
        least = 1.0 if "MB" in what else 0.01  # of which noise is as much
        ratios[what] = round(max(theirs, least) / max(mine, least), 3)
        print(f"{what:32}{theirs:>12.4g}{mine:>12.4g}{ratios[what]:>8.1f}x")
    print(json.dumps({"benchmark": "dataset_memory", "ratios": {"objects": ratios}, "figures": table}))


if __name__ == "__main__":
    main()
