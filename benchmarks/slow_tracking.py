"""What MLflow costs a training, by the state of its server: python benchmarks/slow_tracking.py [--quick] [--rounds 5]

Each side is the same small training, with the demo's model on one thread, in a process of its own, from the making of
the Mirror until it is closed: without tracking, with a server that accepts and never answers, with an address where
nothing listens, and with a new SQLite file. A row goes out every second step. The sides take turns; a ratio is the
median over rounds of this side's seconds by those without tracking in the same round, of the wall clock or of the
process's processor time, which other programs on the machine disturb less.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SIDES = ("no tracking", "server hangs", "server absent", "SQLite")
NUM_IMAGES = 160


def train(data: Path, epochs: int, tracked: bool) -> dict[str, float]:
    """Seconds of one training and of closing its mirror, and the share of the mirror's thread."""
    import psutil
    import torch

    from detr.checkpoint import build_model
    from detr.coco import CocoDataset, load_annotations
    from detr.distributed import join_process_group
    from detr.images import open_images
    from detr.model import ModelConfig
    from detr.train import fit
    from detr.train_config import TrainConfig
    from detr.transforms import TrainTransform
    from pipelines.params import from_document, merge_parameters
    from pipelines.registry.mirror import Mirror

    torch.set_num_threads(1)
    document = merge_parameters(ROOT, None, [f"train.epochs={epochs}", "train.log_steps=2", "train.evaluate_epochs=0"])
    config = from_document(document, "train", TrainConfig)
    annotations = load_annotations(data / "instances_train.json")
    dataset = CocoDataset(annotations, open_images(data / "train.zip"), TrainTransform(config.transform, config.seed))
    torch.manual_seed(config.seed)
    model = build_model(from_document(document, "model", ModelConfig), len(annotations.category_ids))
    with join_process_group() as process:
        wall, processor = time.perf_counter(), time.process_time()
        mirror = Mirror("slow", "slow", document) if tracked else None
        for report in fit(model, dataset, config, process):
            if mirror and report.row:
                mirror.put(report.row | {"images_per_second": report.images_per_second})
        ended, own = time.perf_counter(), 0.0
        if mirror:
            threads = psutil.Process().threads()
            own = sum(t.user_time + t.system_time for t in threads if t.id == mirror._thread.native_id)
            mirror.close()
        now, processor = time.perf_counter(), time.process_time() - processor
        return {"wall": now - wall, "processor": processor, "close": now - ended, "share": own / processor}


def measure(side: str, uri: str, data: Path, epochs: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, "--data", str(data), "--epochs", str(epochs)]
    env = os.environ | {"MLFLOW_TRACKING_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, encoding="utf-8")
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def compare(rounds: int, epochs: int, folder: Path) -> dict[str, list[dict[str, float]]]:
    """The measurements of each side, round by round; the first side of a round is another one each time."""
    from pipelines.data.shapes import write_shapes
    from pipelines.download import DownloadParams
    from pipelines.params import from_document, merge_parameters

    document = merge_parameters(ROOT, None, [f"download.shapes.num_train={NUM_IMAGES}", "download.shapes.num_val=1"])
    write_shapes(from_document(document, "download", DownloadParams).shapes, folder)
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with socket.socket() as silent, socket.socket() as taken:
        for listener in (silent, taken):
            listener.bind(("127.0.0.1", 0))
        silent.listen()
        for turn in range(rounds):
            for side in SIDES[turn % len(SIDES) :] + SIDES[: turn % len(SIDES)]:
                port = (silent if side == "server hangs" else taken).getsockname()[1]
                uri = f"sqlite:///{folder}/{turn}.db" if side == "SQLite" else f"http://127.0.0.1:{port}"
                found[side].append(measure(side, uri, folder, epochs))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: one round of one epoch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(train(arguments.data, arguments.epochs, arguments.side != "no tracking")))
        return
    rounds, epochs = (1, 1) if arguments.quick else (arguments.rounds, arguments.epochs)
    with tempfile.TemporaryDirectory() as folder:
        found = compare(rounds, epochs, Path(folder))
    ratios: dict[str, list[float]] = {}
    print(
        f"{'':16}{'seconds':>10}{'processor':>11}{'close':>8}{'share':>8}   ratio of seconds       of processor seconds"
    )
    for side, rows in found.items():
        line = f"{side:16}"
        for key, width in (("wall", 10), ("processor", 11), ("close", 8), ("share", 8)):
            line += f"{statistics.median(row[key] for row in rows):>{width}.3f}"
        for key in ("wall", "processor"):
            each = [row[key] / base[key] for row, base in zip(rows, found[SIDES[0]], strict=True)]
            ratios[f"{side}, {key}"] = [round(x, 4) for x in (statistics.median(each), min(each), max(each))]
            line += "   {:.3f} ({:.3f} to {:.3f})".format(*ratios[f"{side}, {key}"])
        print(line)
    best = {
        f"{side}, {key}": round(min(row[key] for row in rows) / min(row[key] for row in found[SIDES[0]]), 4)
        for side, rows in found.items()
        for key in ("wall", "processor")
        if side != SIDES[0]
    }
    figures: dict[str, Any] = {
        "epochs": epochs,
        "rounds": rounds,
        "median, least, most": ratios,
        "least by least": best,
    }
    for key in ("close", "share"):
        figures[key] = {side: round(statistics.median(row[key] for row in rows), 4) for side, rows in found.items()}
    medians = {name: values[0] for name, values in ratios.items() if not name.startswith(SIDES[0])}
    print(json.dumps({"benchmark": "slow_tracking", "ratios": {SIDES[0]: medians}, "figures": figures}))


if __name__ == "__main__":
    main()
