"""COCO's numbers beside pycocotools: python benchmarks/coco_eval.py [--quick]

Drawn ground truth and detections of COCO val2017's size: 5,000 images, 36,781 objects, 500,000 detections. Each side
reads the same ground truth and takes the same array of detections in a process of its own, in turn: processor time,
peak memory and the twelve numbers.
faster-coco-eval is measured too where it is installed, and the bootstrap of 1,000 resamples is timed. So is its
matching of detections with objects, beside what hotcoco's `eval_imgs` tells of hotcoco's own.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

NUM_CATEGORIES = 80
MATCHING = ("own matching", "hotcoco's matching")
PEERS = {"pycocotools": "pycocotools", "faster-coco-eval": "faster_coco_eval"}


def draw(folder: Path, num_images: int, num_objects: int, per_image: int) -> None:
    """Writes `truth.json` and `found.npy`: a detector that finds much, doubles, mistakes and invents."""
    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1, NUM_CATEGORIES + 1) ** 0.8
    shares /= shares.sum()
    ids = [k + 1 + k // 9 for k in range(NUM_CATEGORIES)]  # with gaps, as COCO's
    owner = np.sort(rng.choice(num_images, num_objects, p=rng.dirichlet(np.full(num_images, 0.9))))
    sides = np.exp(rng.normal(4, 1, (num_objects, 2))).clip(4, 400)
    corners = rng.random((num_objects, 2)) * (np.array([640, 480]) - sides).clip(min=1)
    labels = rng.choice(NUM_CATEGORIES, num_objects, p=shares)
    boxes = np.c_[corners, sides].round(2)
    crowd = rng.random(num_objects) < 0.012
    filled = sides.prod(axis=1) * rng.uniform(0.3, 1, num_objects)
    annotations = [
        {
            "id": k + 1,
            "image_id": int(owner[k]) + 1,
            "category_id": ids[labels[k]],
            "bbox": boxes[k].tolist(),
            "area": float(filled[k]),
            "iscrowd": int(crowd[k]),
        }
        for k in range(num_objects)
    ]
    document = {
        "info": {},
        "images": [{"id": k + 1, "width": 640, "height": 480, "file_name": f"{k}.jpg"} for k in range(num_images)],
        "categories": [{"id": key, "name": str(key)} for key in ids],
        "annotations": annotations,
    }
    (folder / "truth.json").write_text(json.dumps(document), encoding="utf-8")

    starts = np.searchsorted(owner, np.arange(num_images + 1))
    found = []
    for image in range(num_images):
        own = np.arange(starts[image], starts[image + 1])
        for _ in range(per_image):
            if len(own) and rng.random() < 0.45:
                k = rng.choice(own)
                side = sides[k] * np.exp(rng.normal(0, 0.12, 2))
                corner = corners[k] + (sides[k] - side) / 2 + sides[k] * rng.normal(0, 0.08, 2)
                label, score = (labels[k] if rng.random() < 0.8 else rng.integers(NUM_CATEGORIES)), rng.beta(2, 2)
            else:
                side, corner = np.exp(rng.normal(4, 1, 2)).clip(4, 400), rng.random(2) * [500, 400]
                label, score = rng.choice(NUM_CATEGORIES, p=shares), rng.beta(1, 6)
            found.append([image + 1, *np.r_[corner, side].round(2).tolist(), round(float(score), 6), ids[label]])
    np.save(folder / "found.npy", np.array(found))


def evaluate(side: str, folder: Path) -> list[float]:
    """COCO's twelve numbers of the two files."""
    truth, found = folder / "truth.json", np.load(folder / "found.npy")
    if side == "ours":
        from detr.metrics import compute_coco_metrics

        return list(compute_coco_metrics(truth, found).values())
    if side == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    else:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    held = COCO(str(truth))
    judge = COCOeval(held, held.loadRes(found), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return [float(value) for value in judge.stats]


def match(side: str, folder: Path) -> list[float]:
    """How many detections are hits, and how many ignored, at each IoU threshold: 20 numbers."""
    truth, found = folder / "truth.json", np.load(folder / "found.npy")
    if side == "own matching":
        from detr.bootstrap import match_detections

        matches = match_detections(truth, found)
        return [*matches.hit.sum(axis=0), *matches.ignored.sum(axis=0)]
    from detr.metrics import build_evaluator

    judge = build_evaluator(truth, found)
    judge.params.area_rng, judge.params.area_rng_lbl, judge.params.max_dets = [[0, 1e10]], ["all"], [100]
    judge.evaluate()
    entries = [entry for entry in judge.eval_imgs if entry]
    ignored = np.concatenate([entry["dtIgnore"] for entry in entries], axis=1) > 0  # [10, D]
    hit = np.concatenate([entry["dtMatches"] for entry in entries], axis=1) > 0
    return [*(hit & ~ignored).sum(axis=1), *ignored.sum(axis=1)]


def measure(side: str, folder: Path) -> dict:
    """Processor seconds, peak memory and numbers of one side; imports are not counted, reading the files is."""
    if side == "bootstrap":
        from detr.bootstrap import bootstrap_ap, find_interval, match_detections

        rows = np.load(folder / "found.npy")
        started = time.perf_counter()
        matches = match_detections(folder / "truth.json", rows)
        numbers = list(find_interval(bootstrap_ap([matches], 1000, seed=0)[0], 0.95, len(matches.objects), lowest=0))
        seconds = time.perf_counter() - started
    elif side.endswith("matching"):
        import detr.bootstrap
        import detr.metrics  # noqa: F401

        started = time.process_time()
        numbers = match(side, folder)
        seconds = time.process_time() - started
    else:
        find = {"ours": "hotcoco", **PEERS}[side]
        __import__(find)
        started = time.process_time()
        numbers = evaluate(side, folder)
        seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"seconds": seconds, "peak_gb": round(peak, 3), "numbers": [float(value) for value in numbers]}


def apart(side: str, folder: Path) -> dict:
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: 50 images, once")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments.folder)))
        return
    peers = [name for name, module in PEERS.items() if find_spec(module)]
    sides, rounds = ["ours", *peers], 1 if arguments.quick else 3
    runs: dict[str, list[dict]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as name:
        draw(Path(name), *((50, 400, 20) if arguments.quick else (5000, 36781, 100)))
        for _ in range(rounds):
            for side in sides:
                runs[side].append(apart(side, Path(name)))
        bootstrap = apart("bootstrap", Path(name))
        matching = {side: [apart(side, Path(name)) for _ in range(rounds)] for side in MATCHING}
    seconds = {side: statistics.median(run["seconds"] for run in runs[side]) for side in sides}
    memory = {side: statistics.median(run["peak_gb"] for run in runs[side]) for side in sides}
    expected = runs["pycocotools"][0]["numbers"]
    difference = {
        side: max(abs(a - b) for a, b in zip(runs[side][0]["numbers"], expected, strict=True)) for side in sides
    }
    print(f"{'':<20}{'CPU seconds':>12}{'peak GB':>10}{'largest difference':>20}")
    for side in sides:
        print(f"{side:<20}{seconds[side]:>12.2f}{memory[side]:>10.2f}{difference[side]:>20.1e}")
    print(f"AP {expected[0]:.4f}; 1,000 resamples: {bootstrap['seconds']:.1f} s, interval {bootstrap['numbers']}")
    counts = [runs[0]["numbers"] for runs in matching.values()]
    of_matching = {side: statistics.median(run["seconds"] for run in runs) for side, runs in matching.items()}
    for side, each in matching.items():
        print(f"{side:<20}{of_matching[side]:>12.2f}{statistics.median(run['peak_gb'] for run in each):>10.2f}")
    figures = {
        "max_difference": difference["ours"],
        "cpu_seconds": seconds,
        "peak_gb": memory,
        "bootstrap_seconds": bootstrap["seconds"],
        "bootstrap_peak_gb": bootstrap["peak_gb"],
        "matching_seconds": of_matching,
        "matching_is_equal": counts[0] == counts[1],
    }
    ratios = {side: seconds[side] / seconds["ours"] for side in peers}
    print(json.dumps({"benchmark": "coco_eval", "ratios": ratios, "figures": figures}))


if __name__ == "__main__":
    main()
