"""Stage 3: training. `python -m pipelines.train` starts itself under torchrun.

Hardware comes from torchrun's variables: PET_NPROC_PER_NODE (all GPUs, or 2 processes on a CPU),
PET_NNODES, PET_RDZV_ENDPOINT; OMP_NUM_THREADS (1) threads per process; DETR_WORKERS loader processes.
SIGTERM and SIGINT stop it after the next step with exit code 75; the same command goes on.
"""

import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from detr.checkpoint import Category, InputSize, build_model, load_state, save_model, write_atomically
from detr.coco import Annotations, CocoDataset, load_annotations
from detr.detect import detect_all
from detr.diagnosis import NotFiniteError
from detr.distributed import Process, join_process_group
from detr.images import open_images
from detr.model import DETR, ModelConfig
from detr.official import fetch_weights, initialize_model
from detr.train import Report, fit
from detr.train_config import TrainConfig
from detr.transforms import EvalTransform, TrainTransform
from pipelines import params
from pipelines.data.layout import DATA
from pipelines.imports import trace_imports
from pipelines.launch import PREEMPTED, die_with_parent, launch, record_failure
from pipelines.locks import hold_lock
from pipelines.registry.mirror import Mirror
from pipelines.registry.tracking import get_tracking_uri, require_known, sha256
from pipelines.stage import EXPECTED, command
from pipelines.training_log import Log

PASSED = Path("artifacts/validate/passed.json")
OUTPUT = Path("artifacts/train")
SCRATCH = Path("scratch")


def compute_fingerprint(model: ModelConfig, config: TrainConfig, data_digest: str) -> str:
    """A digest of parameters, data, local weights and code: equal ones give equal bits on equal hardware.

    The code is this file, the log's, and what they import of the library.
    """
    total = hashlib.sha256(json.dumps([asdict(model), asdict(config), data_digest], sort_keys=True).encode())
    for place in (Path(model.backbone_weights), Path(config.initial_weights)):
        file = place / "model.safetensors" if place.is_dir() else place
        total.update(sha256(file).encode() if file.is_file() else b"")
    here, log = Path(__file__), Path(__file__).with_name("training_log.py")
    library = here.parent.parent / "detr"
    for path in sorted(path for path in trace_imports(here) if path.parent == library or path in (here, log)):
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def train(
    model_config: ModelConfig,
    config: TrainConfig,
    data: Path,
    passed: Path,
    output: Path,
    scratch: Path,
    request: "StopRequest",
    process: Process,
) -> bool:
    """Writes `model.safetensors`, `config.json` and `history.jsonl`; false if it stopped before, as asked.

    It goes on from a resume state if there is one. That lies in `scratch/<fingerprint>/`, where a change of
    parameters, data or library code never finds it. Raises ValueError, FloatingPointError or RuntimeError with what to
    do.
    """
    if Path(config.initial_weights).resolve() == output.resolve():
        given = f"train.initial_weights is {config.initial_weights}"
        raise ValueError(f"{given}, which this training replaces; copy it elsewhere first")
    mark = compute_fingerprint(model_config, config, json.loads(passed.read_text(encoding="utf-8"))["data"])
    folder = scratch / mark
    size = InputSize(config.transform.scales[-1], config.transform.max_size, config.size_multiple)
    with alone_in(folder) if process.is_main else nullcontext():
        dataset, held_out = open_datasets(config, data, size)
        model = build_initial(model_config, config, len(dataset.annotations.category_ids))
        state, log = None, None
        if process.is_main:
            state = load_state(folder / "state")
            numbers = f"{len(dataset)} images, {sum(p.numel() for p in model.parameters()):,} parameters"
            print(f"train {mark}: {describe_start(state, process)}, {numbers}", flush=True)
            mirror = Mirror(mark, f"train {mark}", {"model": asdict(model_config), "train": asdict(config)})
            log = Log(folder, state, mirror, config, held_out, data / "instances_val.json")
        reports = fit(model, dataset, config, process, state, lambda: request.asked)
        try:
            report = follow(reports, config, held_out, request, process, log)
        except NotFiniteError as error:
            evidence, place = error.evidence, folder / "not_finite.torch"
            if process.is_main:
                write_atomically(place, lambda file: torch.save(evidence, file))
            process.broadcast(None)  # nobody ends, and has the others ended, before it is written
            raise FloatingPointError(f"{error}; state and gradient norms are in {place}") from error
        if report and log:
            log.save(report)
            write_results(report, log, dataset.annotations, size, mark, output)
            log.close()
    return report is not None


def open_datasets(config: TrainConfig, data: Path, size: InputSize) -> tuple[CocoDataset, CocoDataset]:
    """What is trained on, and what is held out."""
    train = load_annotations(data / "instances_train.json")
    val = load_annotations(data / "instances_val.json")
    return (
        CocoDataset(train, open_images(data / "train.zip"), TrainTransform(config.transform, config.seed)),
        CocoDataset(val, open_images(data / "val.zip"), EvalTransform(size.short, size.max_size)),
    )


def build_initial(model_config: ModelConfig, config: TrainConfig, num_classes: int) -> DETR:
    """The model with the weights that it begins with."""
    torch.manual_seed(config.seed)
    if config.initial_weights == "none":
        return build_model(model_config, num_classes)
    model = build_model(replace(model_config, backbone_weights="none"), num_classes)
    initialize_model(model, config.initial_weights)
    return model


def follow(
    reports: Iterator[Report],
    config: TrainConfig,
    held_out: CocoDataset,
    request: "StopRequest",
    process: Process,
    log: Log | None,
) -> Report | None:
    """Logs, evaluates and saves as training goes; its last report, or None if it stopped before its end, as asked."""
    for report in reports:
        request.at_once = False
        if log:
            log.add(report)
        if report.stopping:
            if log:
                log.stop(report)
            return None
        if report.epoch_done and config.evaluate_epochs and (report.epoch + 1) % config.evaluate_epochs == 0:
            request.at_once = True  # the state is safe
            if process.broadcast(log and not log.is_judged()):
                detections = detect_all(report.model, held_out, config.size_multiple, process)[-1]
                if log:
                    log.judge(report, detections)
            if process.broadcast(log and log.has_stalled()):
                break
    return report


def write_results(report: Report, log: Log, annotations: Annotations, size: InputSize, mark: str, output: Path) -> None:
    pairs = zip(annotations.category_ids.tolist(), annotations.category_names, strict=True)
    lines = "".join(json.dumps(row) + "\n" for row in log.history).encode()
    write_atomically(output / "history.jsonl", lambda file: file.write(lines))
    if log.best:
        report.model.load_state_dict(log.best)
    save_model(report.model, [Category(key, name) for key, name in pairs], size, mark, output)


def describe_start(state: dict[str, Any] | None, process: Process) -> str:
    """What the first line of a training says about how it begins."""
    here = f"{process.num_processes} processes on {process.device.type}"
    if state is None:
        return f"starting with {here}"
    before = state["num_processes"]
    other = (
        f", not {before} as before: the same order of samples, other rounding"
        if before != process.num_processes
        else ""
    )
    return f"resuming at step {state['step']} with {here}{other}"


@contextmanager
def alone_in(folder: Path, wait_seconds: float = 60.0) -> Iterator[None]:
    """Holds the lock of the folder of a training. Raises ValueError when another one holds it for longer than that."""

    def say(holder: str) -> None:
        print(f"{other} ({holder}); waiting {wait_seconds:.0f} seconds for its end", flush=True)

    other = f"the same training is under way in {folder}"
    with ExitStack() as stack:
        try:
            stack.enter_context(hold_lock(folder / "lock", say, wait_seconds))
        except TimeoutError as error:
            raise ValueError(f"{other} ({error}); wait for its end, or stop it and run this again") from None
        for torn in folder.glob(".*.partial"):
            torn.unlink()
        yield


class StopRequest:
    """SIGTERM and SIGINT: the training stops after the next step, or at once while nothing would be lost."""

    def __init__(self) -> None:
        self.asked, self.at_once = False, True

    def __call__(self, number: int, frame: object) -> None:
        self.asked = True
        if self.at_once:
            os._exit(PREEMPTED)

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self)


@record  # what fails before there is a group
def work() -> None:
    die_with_parent()
    request = StopRequest()
    request.listen()
    with join_process_group() as process:
        try:
            done = train(*read_sections(), DATA, PASSED, OUTPUT, SCRATCH, request, process)
        except Exception as error:
            record_failure(error)
            sys.exit(1)
    if not done:
        sys.exit(PREEMPTED)


def read_sections() -> tuple[ModelConfig, TrainConfig]:
    return params.load("model", ModelConfig), params.load("train", TrainConfig)


def main() -> None:
    """Downloads and parses what is needed once on this node, before its processes start, and trains."""
    StopRequest().listen()  # until torchrun listens itself
    require_known(get_tracking_uri())
    config = read_sections()[1]
    fetch_weights(config.initial_weights)
    for path in DATA.glob("instances_*.json"):
        load_annotations(path)
    launch("pipelines.train", config.batch_size // config.micro_batch)


if __name__ == "__main__":
    if "DETR_LAUNCHER" not in os.environ:  # torchrun's own variables may be left over from another training
        command(main)
    else:
        try:
            work()
        except EXPECTED:
            sys.exit(1)  # the launching process has the message
