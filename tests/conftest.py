"""What several tests need: quiet tools, a small drawn dataset, and a small clone of the project to run in."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from detr.checkpoint import Category, InputSize, save_model  # noqa: E402
from detr.judge import coco_metrics, from_results  # noqa: E402
from detr.loss import LossConfig  # noqa: E402
from detr.matcher import MatcherConfig  # noqa: E402
from detr.model import DETR, ModelConfig  # noqa: E402
from detr.train import TrainConfig  # noqa: E402
from detr.transforms import TransformConfig  # noqa: E402
from pipelines.params import from_document, merged, to_yaml  # noqa: E402
from pipelines.rules import ValidateParams  # noqa: E402
from pipelines.shapes import ShapesParams, write_shapes  # noqa: E402
from pipelines.stage import QUIET  # noqa: E402

os.environ.update(QUIET)

TINY = [
    "download.shapes.num_train=48",
    "download.shapes.num_val=16",
    "model.hidden_dim=32",
    "model.num_heads=4",
    "model.dim_feedforward=64",
    "model.num_encoder_layers=1",
    "train.epochs=2",
    "train.batch_size=8",
    "train.micro_batch=4",
    "train.log_steps=2",
    "train.evaluate_epochs=1",
    "train.warmup_steps=2",
    "train.checkpoint_minutes=0.0",
    "evaluate.num_pictures=2",
]
TINY_MODEL = ModelConfig(
    backbone="resnet10",
    backbone_width=0.25,
    backbone_norm="group",
    backbone_weights="none",
    stride=32,
    position="sine",
    position_temperature=20.0,
    hidden_dim=32,
    num_heads=4,
    dim_feedforward=64,
    num_encoder_layers=1,
    num_decoder_layers=2,
    num_queries=5,
    dropout=0.0,
    attention_dropout=0.0,
    pre_norm=False,
)
TINY_TRAIN = TrainConfig(
    seed=0,
    initial_weights="none",
    epochs=3,
    batch_size=8,
    micro_batch=4,
    group_window=0,
    lr=1e-3,
    lr_backbone=1e-4,
    weight_decay=1e-4,
    schedule="cosine",
    lr_drop_epoch=0,
    warmup_steps=2,
    clip_norm=0.1,
    ema_decay=0.0,
    precision="float32",
    compile=False,
    deterministic=False,
    size_multiple=32,
    log_steps=2,
    evaluate_epochs=0,
    patience=0,
    keep="last",
    max_skipped=0,
    checkpoint_minutes=0.0,
    matcher=MatcherConfig(1.0, 5.0, 2.0),
    loss=LossConfig(1.0, 5.0, 2.0, 0.1, auxiliary=True),
    transform=TransformConfig((64,), 96, flip=0.5, crop=0.0, crop_scales=(), crop_range=(0, 0)),
)
SHAPES = ShapesParams(
    seed=3,
    num_train=24,
    num_val=12,
    image_size=96,
    max_objects=3,
    min_object_size=20,
    max_object_size=60,
    empty_share=0.1,
    crowd_share=0.2,
)


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """A folder with the four files of a small drawn dataset. Read only."""
    folder = tmp_path_factory.mktemp("drawn")
    write_shapes(SHAPES, folder)
    return folder


@pytest.fixture
def source(drawn, tmp_path):
    """A copy of the drawn dataset to break."""
    return Path(shutil.copytree(drawn, tmp_path / "source"))


def validate_params(tolerated: int | None = None, **changes: object) -> ValidateParams:
    """The parameters of params.yaml, with one number tolerated of every rule and other changes."""
    params = from_document(merged(ROOT, None, []), "validate", ValidateParams)
    if tolerated is not None:
        params = replace(params, tolerated=dict.fromkeys(params.tolerated, tolerated))
    return replace(params, **changes)


def environment(**extra: str) -> dict[str, str]:
    """The environment of a person who has activated the virtual environment and nothing else."""
    kept = {key: os.environ[key] for key in ("HOME", "LANG", "TMPDIR") if key in os.environ}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return kept | QUIET | {"PATH": path, "OMP_NUM_THREADS": "1"} | extra


def call(cwd: Path, *arguments: str, code: int | None = 0, **extra: str) -> str:
    """The output of a command, stdout and stderr together; fails unless it ends with `code`."""
    done = subprocess.run(
        arguments,
        cwd=cwd,
        env=environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert code is None or done.returncode == code, f"{arguments} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def small_project(folder: Path, *overrides: str) -> Path:
    """A committed copy of the project's files with a small dataset and model as its params.yaml."""
    listed = call(ROOT, "git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    for name in listed:
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "dvc.lock").unlink(missing_ok=True)
    (folder / "params.yaml").write_text(to_yaml(merged(ROOT, None, [*TINY, *overrides])))
    call(folder, "git", "init", "--quiet", "--initial-branch=main")
    call(folder, "git", "add", "--all")
    call(folder, "git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "--quiet", "-m", "start")
    return folder


def detections_like(annotations: Path, shift: float, seed: int = 0, lost: str | None = None) -> list[dict]:
    """COCO detections made from the truth: boxes shifted by normal `shift` pixels, none of the category `lost`."""
    rng = np.random.default_rng(seed)
    document = json.loads(annotations.read_text())
    names = {category["id"]: category["name"] for category in document["categories"]}
    return [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": [round(value + float(rng.normal(0, shift)), 2) for value in a["bbox"]],
            "score": round(float(rng.uniform(0.5, 1)), 6),
        }
        for a in document["annotations"]
        if not a["iscrowd"] and names[a["category_id"]] != lost
    ]


def trained_project(folder: Path, data: Path, mark: str, detections: list[dict], **register: object) -> Path:
    """What the register stage reads, of a small untrained model with its own weights and the given detections."""
    document = merged(ROOT, None, TINY)
    document["register"] |= register
    for name in ("validate/dataset", "evaluate/plots", "train"):
        (folder / "artifacts" / name).mkdir(parents=True)
    (folder / "params.yaml").write_text(to_yaml(document))
    (folder / "dvc.lock").write_text("stages: {}\n")
    shutil.copytree(data, folder / "data/coco")
    report = [{"outcome": outcome} for outcome in ("holds", "holds", "warning")]
    categories = json.loads((data / "instances_val.json").read_text())["categories"]
    metrics = coco_metrics(data / "instances_val.json", from_results(detections))
    rows = {
        "validate/passed.json": {"data": "0123"},
        "validate/report.json": report,
        "validate/statistics.json": {},
        "evaluate/detections.json": detections,
        "evaluate/metrics.json": metrics | {"AP_low": 0.0, "AP_high": 1.0},
    }
    for name, content in rows.items():
        (folder / "artifacts" / name).write_text(json.dumps(content))
    table = [f"{c['id']},{c['name']},0.25" for c in categories]
    (folder / "artifacts/evaluate/per_class.csv").write_text("\n".join(["category_id,name,AP", *table, ""]))
    torch.manual_seed(int(hashlib.sha256(mark.encode()).hexdigest()[:8], 16))
    labels = [Category(c["id"], c["name"]) for c in categories]
    save_model(DETR(TINY_MODEL, len(labels)), labels, InputSize(96, 96, 1), mark, folder / "artifacts/train")
    (folder / "artifacts/train/history.jsonl").write_text('{"step": 2, "loss": 1.5}\n{"step": 4, "loss": 1.25}\n')
    (folder / "scratch" / mark).mkdir(parents=True)
    timings = [json.dumps({"step": step, "images_per_second": 4.0}) for step in (2, 4)]
    (folder / "scratch" / mark / "timings.jsonl").write_text("\n".join([*timings, ""]))
    return folder


PROGRAMS = {"chromium": "chromium", "docker-compose": "docker-compose", "postgresql": "postgres"}


def needs(package: str) -> Path:
    """The program that a Debian package is for; skips the test with the line that gets it where it is missing."""
    folders = [
        os.environ["PATH"],
        "/usr/sbin",
        *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)),
    ]
    found = shutil.which(PROGRAMS[package], path=os.pathsep.join(folders))
    if found is None:
        pytest.skip(f"{PROGRAMS[package]} is missing: apt-get install {package}")
    return Path(found)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def mlflow_server(folder: Path, port: int | None = None) -> Iterator[tuple[str, subprocess.Popen]]:
    """A real tracking server on its own SQLite file and artifacts: its address and its process, once it is healthy."""
    folder.mkdir(exist_ok=True)
    port = port or free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/store"]
    env = environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")  # eight processes that nothing here uses
    with (folder / "log").open("a") as log:
        server = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError((folder / "log").read_text()) from None
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}", server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A small project with its servers and worker. The tests of a module use it in turn."""
    from tests.orchestra import services  # which needs what stands above

    with services(small_project(tmp_path_factory.mktemp("served"))) as found:
        yield found
