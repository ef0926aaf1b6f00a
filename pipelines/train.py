"""Stage 3: training. `python -m pipelines.train` starts itself under torchrun.

Hardware comes from torchrun's variables: PET_NPROC_PER_NODE (all GPUs, or 2 processes on a CPU),
PET_NNODES, PET_RDZV_ENDPOINT; OMP_NUM_THREADS (1) threads per process; DETR_WORKERS loader processes.
"""

import ctypes
import hashlib
import json
import logging
import os
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record

from detr.checkpoint import Category, InputSize, load_state, save_model, save_state, write_atomically
from detr.coco import CocoDataset, load_annotations
from detr.distributed import process_group
from detr.evaluate import coco_metrics, detect_all
from detr.images import open_images
from detr.model import ModelConfig, build_model
from detr.official import fetch, initialize
from detr.train import Report, TrainConfig, fit
from detr.transforms import EvalTransform, TrainTransform
from pipelines import params
from pipelines.stage import DATA, EXPECTED, Progress, command, explain
from pipelines.tracking import Mirror, sha256

PASSED = Path("artifacts/validate/passed.json")
OUTPUT = Path("artifacts/train")
SCRATCH = Path("scratch")


def fingerprint(model: ModelConfig, config: TrainConfig, data_digest: str) -> str:
    """A digest of parameters, data, local weights and library code: equal ones give equal bits on equal hardware."""
    total = hashlib.sha256(json.dumps([asdict(model), asdict(config), data_digest], sort_keys=True).encode())
    for place in (Path(model.backbone_weights), Path(config.initial_weights)):
        file = place / "model.safetensors" if place.is_dir() else place
        total.update(sha256(file).encode() if file.is_file() else b"")
    for path in [*sorted((Path(__file__).parent.parent / "detr").glob("*.py")), Path(__file__)]:
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def train(
    model_config: ModelConfig, config: TrainConfig, data: Path, passed: Path, output: Path, scratch: Path
) -> None:
    """Writes `model.safetensors`, `config.json` and `history.jsonl`, going on from a resume state if there is one.

    The resume state lies in `scratch/<fingerprint>/`, where a change of parameters, data or library code never
    finds it. Raises ValueError or FloatingPointError with what to do.
    """
    initial = config.initial_weights
    if Path(initial).resolve() == output.resolve():
        raise ValueError(f"train.initial_weights is {initial}, which this training replaces; copy it elsewhere first")
    mark = fingerprint(model_config, config, json.loads(passed.read_text())["data"])
    size = InputSize(config.transform.scales[-1], config.transform.max_size, config.size_multiple)
    with process_group() as process:
        annotations = load_annotations(data / "instances_train.json")
        transform = TrainTransform(config.transform, config.seed)
        dataset = CocoDataset(annotations, open_images(data / "train.zip"), transform)
        held_out = CocoDataset(
            load_annotations(data / "instances_val.json"),
            open_images(data / "val.zip"),
            EvalTransform(size.short, size.max_size),
        )
        torch.manual_seed(config.seed)
        architecture = model_config if initial == "none" else replace(model_config, backbone_weights="none")
        model = build_model(architecture, len(annotations.category_ids))
        if initial != "none":
            initialize(model, initial)
        state = load_state(scratch / mark / "state")
        history: list[dict[str, float]] = state.pop("history") if state else []
        log = None
        if process.is_main:
            total_steps = config.epochs * (len(dataset) // config.batch_size)
            begins = f"resuming at step {state['step']}" if state else "starting"
            print(
                f"train {mark}: {begins}, {len(dataset)} images, "
                f"{sum(p.numel() for p in model.parameters()):,} parameters, {process.num_processes} processes on "
                f"{process.device.type}",
                flush=True,
            )
            mirror = Mirror(mark, f"train {mark}", {"model": asdict(model_config), "train": asdict(config)})
            log = Log(scratch / mark, history, mirror, total_steps, config)
        for report in fit(model, dataset, config, process, state):
            if report.epoch_done and config.evaluate_epochs and (report.epoch + 1) % config.evaluate_epochs == 0:
                detections = detect_all(model, held_out, config.batch_size, size.size_multiple, process)
                if log:
                    report.row.update(coco_metrics(data / "instances_val.json", detections)[0])
            if log:
                log.add(report)
        if log:
            pairs = zip(annotations.category_ids.tolist(), annotations.category_names, strict=True)
            lines = "".join(json.dumps(row) + "\n" for row in history).encode()
            write_atomically(output / "history.jsonl", lambda file: file.write(lines))
            save_model(model, [Category(key, name) for key, name in pairs], size, mark, output)
            log.close()


class Log:
    """What the main process keeps and shows of a training: history, timings, resume state, MLflow, a progress bar.

    Only `history` and what stands in it is a pure function of code, parameters and data.
    """

    def __init__(
        self, folder: Path, history: list[dict[str, float]], mirror: Mirror, total_steps: int, config: TrainConfig
    ) -> None:
        self.folder, self.history, self.mirror, self.config = folder, history, mirror, config
        self.bar = Progress(None, "train", total_steps, "step")
        self.bar.update(int(history[-1]["step"]) if history else 0)
        self.saved = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, report: Report) -> None:
        row, rate = report.row, report.images_per_second
        self.history.append(row)
        timing = {"step": report.step, "images_per_second": round(rate, 2)}
        with (self.folder / "timings.jsonl").open("a") as file:
            file.write(json.dumps(timing) + "\n")
        self.mirror.put(row | timing)
        self.bar.update(report.step - self.bar.n)
        self.bar.set_postfix_str(f"loss {row['loss']:.3f}, {rate:.0f} images/s", refresh=False)
        if "AP" in row:
            print(
                f"epoch {report.epoch + 1}/{self.config.epochs}: loss {row['loss']:.3f} class {row['loss_class']:.3f} "
                f"box {row['loss_box']:.3f} giou {row['loss_giou']:.3f}, AP {row['AP']:.3f} AP50 {row['AP50']:.3f}, "
                f"{rate:.0f} images/s",
                flush=True,
            )
        if time.monotonic() - self.saved >= self.config.checkpoint_minutes * 60:
            save_state(report.state() | {"history": self.history}, self.folder / "state")
            self.saved = time.monotonic()

    def close(self) -> None:
        """Ends the bar and the mirror, and removes the resume state of a training that is complete."""
        self.bar.close()
        self.mirror.close()
        for name in ("state", "state.previous"):
            (self.folder / name).unlink(missing_ok=True)


def launch() -> None:
    """Runs this module in every process that torchrun's variables ask for; the first failure is the message."""
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("PET_NPROC_PER_NODE", str(torch.cuda.device_count() or 2))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    alone = os.environ.get("PET_NNODES", "1") == "1" and "PET_RDZV_ENDPOINT" not in os.environ
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(parse_args([*(["--standalone"] if alone else []), "-m", "pipelines.train", *sys.argv[1:]]))
    except ChildFailedError as error:
        message: Any = error.get_first_failure()[1].message
        if isinstance(message, dict):  # of a process that recorded its exception
            message = message["message"].partition(": ")[2]
        raise RuntimeError(message) from None


def die_with_parent() -> None:
    """Asks Linux to end this process when torchrun is killed, so that no orphan trains on and writes results."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@record
def work() -> None:
    die_with_parent()
    try:
        train(*sections(), DATA, PASSED, OUTPUT, SCRATCH)
    except OSError as error:
        raise RuntimeError(explain(error)) from error


def sections() -> tuple[ModelConfig, TrainConfig]:
    return params.load("model", ModelConfig), params.load("train", TrainConfig)


def main() -> None:
    """Downloads and parses what is needed once on this node, before its processes start, and trains."""
    fetch(sections()[1].initial_weights)
    for path in DATA.glob("instances_*.json"):
        load_annotations(path)
    launch()


if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        command(main)
    else:
        try:
            work()
        except EXPECTED:
            sys.exit(1)  # the launching process has the message
