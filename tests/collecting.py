"""Projects whose disk is collected: real git, DVC and MLflow, stages of a second."""

import contextlib
import json
import shutil
import sys
import time
from functools import partial

from ruamel.yaml import YAML

from pipelines.params import to_yaml
from pipelines.registry import tracking
from pipelines.registry.database import relocate
from pipelines.retraining.collect import collect
from pipelines.workspace import worktree
from tests.running import ROOT, call, environment

OLD = time.time() - 30 * 86400
MAKE = """
import random, sys
from pathlib import Path
seed = int(sys.argv[1])
for number, name in enumerate(sys.argv[2:]):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text('{"fingerprint": "%016x"}' % seed)
    else:
        path.write_bytes(random.Random(f"{seed} {number}").randbytes(50_000))
"""
GRAPH = """
stages:
  download:
    cmd: python make.py ${download.seed} data/coco/train.zip data/coco/plots/a data/coco/plots/b
    deps: [make.py]
    params: [download]
    outs: [data/coco/train.zip, data/coco/plots]
  train:
    cmd: python make.py ${train.seed} artifacts/train/model.safetensors artifacts/evaluate/x artifacts/register/version.json
    deps: [make.py, data/coco/train.zip]
    params: [train]
    outs: [artifacts/train/model.safetensors, artifacts/evaluate, artifacts/register/version.json]
"""


def collectable(root, registry, monkeypatch):
    """A project with the real folders and quick stages, and a registry of its own: a copy of the one in `registry`."""
    (root / ".dvc").mkdir(parents=True)
    shutil.copy(ROOT / ".dvc" / "config", root / ".dvc" / "config")
    shutil.copy(ROOT / ".gitignore", root / ".gitignore")
    (root / "make.py").write_text(MAKE, encoding="utf-8")
    (root / "dvc.yaml").write_text(GRAPH, encoding="utf-8")
    (root / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n", encoding="utf-8")
    (root / "params.yaml").write_text(to_yaml(parameters(0, root)), encoding="utf-8")
    call(root, "git", "init", "--quiet", "--initial-branch=main")
    for name, value in (("name", "test"), ("email", "test@localhost")):
        call(root, "git", "config", f"user.{name}", value)
    call(root, "git", "add", "--all")
    call(root, "git", "commit", "--quiet", "-m", "start")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    monkeypatch.setenv("PATH", environment()["PATH"])
    monkeypatch.setattr(sys, "executable", shutil.which("python"))  # what `collect` runs DVC by
    shutil.copy(registry / "mlflow.db", root)
    relocate(root / "mlflow.db")
    return root


def parameters(seed, _):
    return {
        "download": {"source": "shapes", "sha256": {}, "seed": seed % 2},
        "model": {"backbone_weights": "none"},
        "train": {"initial_weights": "none", "seed": seed},
    }


def train(place):
    """The run that the training leaves in MLflow, of what is in `place`."""
    client, path = tracking.connect(), place / "artifacts/register/version.json"
    return client.get_run(
        tracking.find_run(client, json.loads(path.read_text(encoding="utf-8"))["fingerprint"], "a training")
    )


def register(place):
    """What the register stage leaves in MLflow, of what is in `place`; the version's number."""
    client, run = tracking.connect(), train(place)
    with contextlib.suppress(Exception):
        client.create_registered_model(tracking.MODEL)
    client.log_artifact(run.info.run_id, str(place / "dvc.lock"))
    weights = tracking.sha256(place / "artifacts/train/model.safetensors")
    client.set_tag(run.info.run_id, "weights_sha256", weights)
    tags = {
        "git_commit": call(place, "git", "rev-parse", "HEAD").strip(),
        "git_branch": call(place, "git", "branch", "--show-current").strip() or "none",
        "dvc_lock_sha256": tracking.sha256(place / "dvc.lock"),
        "weights_sha256": weights,
        "fingerprint": run.data.tags["fingerprint"],
    }
    source = f"{run.info.artifact_uri}/model"
    return client.create_model_version(tracking.MODEL, source, run.info.run_id, tags=tags).version


def run(root, name, seed, ends=lambda: None, registered=False, ref="HEAD"):
    """A retraining in its worktree; `ends` may end it before its end. Its branch."""
    with (
        worktree.hold_run_lock(root, print),
        worktree.make_worktree(root, name, ref, partial(parameters, seed)) as (place, branch),
    ):
        call(place, "dvc", "--wait-for-lock", "repro")
        worktree.keep_results(place)
        (register if registered else train)(place)
        ends()
    return branch


def weights_in_cache(root, branch):
    """The file in DVC's cache of the weights that a branch has."""
    lock = YAML(typ="safe").load(call(root, "git", "show", f"{branch}:dvc.lock"))
    outs = lock["stages"]["train"]["outs"]
    (md5,) = [out["md5"] for out in outs if out["path"] == "artifacts/train/model.safetensors"]
    return root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]


def collected(root, days=0, dry_run=False, shared_cache=False):
    return collect(root, days, dry_run, shared_cache, lambda line: None)
