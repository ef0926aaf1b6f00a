"""A registered version made again, with every real part: DVC, git, MLflow, a training."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines import verdict
from pipelines.params import read_yaml, to_yaml
from pipelines.reproduce import chain
from pipelines.tracking import connect, named_version, sha256
from tests.conftest import ROOT, call, environment, mlflow_server, small_project


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A small project after one `dvc repro`, whose dvc.lock is not committed. Tests in this module use it in turn."""
    folder = small_project(tmp_path_factory.mktemp("project"))
    call(folder, "dvc", "repro")
    return folder


@pytest.fixture
def client(project, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow.db")
    return connect()


def made_again(project, model, code=0, **extra):
    return call(project, sys.executable, "-m", "pipelines", "reproduce", model, code=code, **extra)


def written(project, version):
    return json.loads((project / f"scratch/reproductions/{version}.json").read_text())


def everything_of(project, client):
    """What must be the same after a reproduction as before."""
    files = [p for folder in (".dvc/cache", "artifacts", "data") for p in sorted((project / folder).rglob("*"))]
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return {
        "git": [
            call(project, "git", *a) for a in (["status", "--short"], ["branch", "-a", "-v"], ["worktree", "list"])
        ],
        "files": [(p, p.stat().st_mtime_ns, p.stat().st_size) for p in files],
        "bytes": [(project / name).read_bytes() for name in ("dvc.lock", "params.yaml", ".dvc/config")],
        "runs": [(run.info.run_id, run.data.metrics, run.data.tags) for run in runs],
        "versions": [(v.version, v.aliases) for v in client.search_model_versions("name = 'detr'")],
    }


def started(project, model="champion"):
    """The process of a reproduction whose training is under way; it heeds SIGINT, whether or not the tests do."""
    command = ["env", "--default-signal=INT", sys.executable, "-m", "pipelines", "reproduce", model]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=project, env=environment(), start_new_session=True, **pipes)
    said = ""
    while "images, " not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    return process


def at_work_in(place):
    found = []
    for process in psutil.process_iter(["cwd"]):
        if (process.info["cwd"] or "").startswith(str(place)):
            found.append(process)
    return found


def test_interrupted_killed_and_done_it_is_bit_identical_and_nothing_else_changes(project, client):
    before = everything_of(project, client)
    place = project / "scratch/worktrees/reproduce-1"
    interrupted = started(project)
    os.kill(interrupted.pid, signal.SIGINT)
    said = interrupted.communicate()[0]
    assert interrupted.returncode == 130, said
    assert not place.exists()
    assert everything_of(project, client) == before
    killed = started(project)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    assert place.exists()
    said = made_again(project, "models:/detr@champion")
    for stage in ("validate", "train", "evaluate"):
        assert f"Running stage '{stage}'" in said
    assert "starting with" in said
    assert "models:/detr/1 is bit-identical\n" in said
    assert "warning" not in said
    assert "data        from the DVC cache" in said
    assert f"weights     identical, sha256 {sha256(project / 'artifacts/train/model.safetensors')}" in said
    assert not at_work_in(place)
    assert not place.exists()
    assert everything_of(project, client) == before
    assert not list(project.glob("scratch/*/*state*"))
    document = written(project, 1)
    assert (document["verdict"], document["first_difference"], document["warnings"]) == ("bit-identical", "", [])
    assert client.get_model_version("detr", "1").tags["reproduced"] == f"bit-identical, {document['date']}"


def test_other_instructions_of_the_processor_are_within_the_tolerance(project):
    said = made_again(project, "1", ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41")
    assert "models:/detr/1 is equal within tolerance: first at step " in said
    assert "tolerance   AP within 0.005, the losses of the first row within 0.001 of their value" in said
    document = written(project, 1)
    assert document["weights"]["different"] > 0
    assert document["history"]["close"]


def test_a_run_with_overrides_from_another_clone_by_server_and_remote(project, tmp_path):
    """Registered from a branch runs/..., made again where only git, the DVC remote and MLflow's server lead."""
    call(project, "dvc", "remote", "add", "--local", "--default", "store", str(tmp_path / "store"))
    with mlflow_server(tmp_path / "server") as (uri, _):
        said = call(
            project, "python", "-m", "pipelines", "run", "--set", "model.num_queries=9", MLFLOW_TRACKING_URI=uri
        )
        (branch,) = call(project, "git", "branch", "--list", "runs/*", "--format=%(refname:short)").split()
        assert f"branch    {branch}" in said
        call(project, "git", "clone", "--quiet", str(project), str(tmp_path / "clone"))
        clone = tmp_path / "clone"
        call(project, "dvc", "push")
        call(clone, "dvc", "remote", "add", "--local", "--default", "store", "../store")
        said = made_again(clone, "models:/detr/1", MLFLOW_TRACKING_URI=uri)
        assert "models:/detr/1 is bit-identical\n" in said
        assert "data        from the DVC remote" in said
        assert call(clone, "git", "status", "--short") == ""
        assert not (clone / "mlflow.db").exists()
        shutil.rmtree(clone / "scratch")
        call(clone, "git", "checkout", "--quiet", "--orphan", "nothing")
        for name in ("main", f"remotes/origin/{branch}", "remotes/origin/main"):
            call(
                clone,
                "git",
                "update-ref",
                "-d",
                f"refs/{name.replace('main', 'heads/main', name == 'main')}",
                code=None,
            )
        call(clone, "git", "reflog", "expire", "--expire=now", "--all")
        call(clone, "git", "update-ref", "-d", "refs/remotes/origin/HEAD", code=None)
        call(clone, "git", "remote", "remove", "origin")
        call(clone, "git", "gc", "--quiet", "--prune=now")
        said = made_again(clone, "1", 1, MLFLOW_TRACKING_URI=uri)
    assert f"(branch {branch}), which is not in this clone; git fetch --all" in said
    assert said.count("\n") == 1


def test_uncommitted_code_is_applied_and_other_code_is_found_out(project, client):
    path, params = project / "pipelines/train.py", project / "params.yaml"
    line = "torch.manual_seed(config.seed)"
    assert line in path.read_text()
    path.write_text(path.read_text().replace(line, "torch.manual_seed(config.seed + 1)"))
    params.write_text(params.read_text().replace("num_queries: 20", "num_queries: 11"))
    call(project, "dvc", "repro")
    version = client.get_model_version("detr", "2")
    assert version.tags["git_dirty"] == "true"
    artifacts = Path(client.get_run(version.run_id).info.artifact_uri.removeprefix("file://"))
    diff = artifacts / "git.diff"
    if not diff.exists():
        diff.write_text(call(project, "git", "diff", "--binary", "HEAD"))
    call(project, "git", "checkout", "pipelines/train.py", "params.yaml")
    before = everything_of(project, client)
    assert "models:/detr/2 is bit-identical\n" in made_again(project, "2")
    assert everything_of(project, client) == before

    good = diff.read_text()
    diff.write_text(good.replace("config.seed + 1", "config.seed + 2"))
    said = made_again(project, "models:/detr/2", 1)
    assert said.splitlines()[-1].startswith("error: models:/detr/2 is different: first at step 2, loss ")
    assert "the training's code, parameters or data are others" in said
    document = written(project, 2)
    assert document["weights"]["different"] > 0
    assert client.get_model_version("detr", "2").tags["reproduced"] == f"different, {document['date']}"

    diff.write_text(good.replace("torch.manual_seed(config.seed + 1)", "raise ValueError('no such luck')"))
    said = made_again(project, "2", 1)
    assert said.splitlines()[-1] == "error: train: no such luck"
    assert written(project, 2) == document
    diff.write_text("nothing that git knows")
    said = made_again(project, "2", 1)
    assert "error: the git.diff of models:/detr/2 does not fit its commit: git apply" in said
    assert everything_of(project, client) == before
    diff.write_text(good)


def test_other_data_end_it_before_the_training(project, client, tmp_path):
    """Where neither cache nor remote has the data, the download stage makes them; they are compared file by file."""
    version = client.get_model_version("detr", "1")
    lock = Path(client.get_run(version.run_id).info.artifact_uri.removeprefix("file://")) / "dvc.lock"
    good = lock.read_text()
    document = read_yaml(lock)
    for out in document["stages"]["download"]["outs"]:
        out["md5"] = "0" * 32 if out["path"].endswith("train.zip") else out["md5"]
    lock.write_text(to_yaml(document))
    said = made_again(project, "1", 1)
    lock.write_text(good)
    assert "Running stage 'download'" in said
    assert "Running stage 'validate'" not in said
    assert "is different: before the training: not the data of the version: data/coco/train.zip\n" in said
    assert "download: not whole in the DVC cache" in said
    assert written(project, 1)["data"] == "made anew"

    client.set_model_version_tag("detr", "1", "data_digest", "abc")
    said = made_again(project, "1", 1)
    client.set_model_version_tag("detr", "1", "data_digest", version.tags["data_digest"])
    assert "not the data of the version: digest " in said
    assert "Running stage 'train'" not in said


def test_a_full_disk_is_one_line_and_leaves_no_worktree(project):
    """On a real file system, too small for the worktree or its data, mounted in a namespace of its own."""
    (project / "scratch/worktrees").mkdir(parents=True, exist_ok=True)
    for size in ("100k", "2m"):
        mount = f'mount -t tmpfs -o size={size} none scratch/worktrees; "$@"'
        command = [sys.executable, "-m", "pipelines", "reproduce", "1"]
        said = call(project, "unshare", "-rm", "sh", "-ec", mount, "sh", *command, code=1)
        assert "No space left on device" in said.splitlines()[-1] or "disk is full" in said.splitlines()[-1], said
        assert said.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in said
        assert call(project, "git", "worktree", "list").count("\n") == 1


def test_what_is_not_there_is_said(project, client, tmp_path):
    said = made_again(project, "77", 1)
    assert "has no 77; versions of detr: 1" in said
    assert "aliases: " in said
    assert "champion (" in said
    assert "is of the model 'other'" in made_again(project, "models:/other/1", 1)
    commit = client.get_model_version("detr", "1").tags["git_commit"]
    for tag, expected in (("f" * 40, "which is not in this clone"), ("none", "was registered outside of git")):
        client.set_model_version_tag("detr", "1", "git_commit", tag)
        assert expected in made_again(project, "1", 1)
    client.set_model_version_tag("detr", "1", "git_commit", commit)
    said = made_again(project, "1", 1, MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/none.db")
    assert said.startswith("error: nothing is registered yet: ")
    assert not (tmp_path / "none.db").exists()
    assert named_version(client, "models:/detr@champion").version == named_version(client, "champion").version


def test_libraries_that_differ_are_told_and_lost_weights_leave_their_digest(project, client):
    version = client.get_model_version("detr", "1")
    stored = list((project / "mlartifacts").glob("models/*/artifacts/artifacts/model.safetensors"))
    (path,) = [p for p in stored if sha256(p) == version.tags["weights_sha256"]]
    path.rename(path.with_suffix(".lost"))
    client.set_model_version_tag("detr", "1", "torch", "1.0")
    said = made_again(project, "1")
    path.with_suffix(".lost").rename(path)
    client.set_model_version_tag("detr", "1", "torch", version.tags["torch"])
    assert said.index("warning: torch is 2.") < said.index("Running stage")
    assert "1.0 there: the bits may differ" in said
    assert "model.safetensors cannot be had" in said
    assert "models:/detr/1 is bit-identical\n" in said


HISTORY = [
    {"step": 50, "loss": 6.1190, "loss_box": 0.5, "lr": 1e-4},
    {"step": 100, "loss": 5.0, "loss_box": 0.4, "lr": 1e-4},
]
SAME = {"identical": True, "close": True, "largest_difference": None}


def rows(path, history):
    path.write_text("".join(json.dumps(row) + "\n" for row in history))
    return path


def weights(path, **changes):
    tensors = {"b": torch.arange(4.0), "a": torch.full((2,), math.nan), "c": torch.tensor([1, 2])} | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return path


@pytest.mark.parametrize(
    ("index", "change", "close", "said"),
    [
        (0, {}, True, ""),
        (0, {"loss": 6.1193}, True, "first at step 50, loss 6.1193 here, 6.119 there"),
        (0, {"loss": 6.1290}, False, "first at step 50, loss 6.129 here, 6.119 there"),
        (0, {"lr": 2e-4}, True, "first at step 50, lr 0.0002 here, 0.0001 there"),
        (0, {"loss_box": math.nan}, False, "first at step 50, loss_box nan here, 0.5 there"),
        (1, {"loss": 9.0, "loss_box": 1.0}, True, "first at step 100, loss 9 here, 5 there"),
        (1, {"AP": 0.5}, True, "first at step 100, AP 0.5 here, None there"),
        (0, {"loss": 6.119000000001}, True, "first at step 50, loss 6.119000000001 here, 6.119 there"),
    ],
)
def test_histories_part_at_a_step_and_a_name(tmp_path, index, change, close, said):
    ours = [row | change if k == index else row for k, row in enumerate(HISTORY)]
    found = verdict.compare_history(rows(tmp_path / "here", ours), rows(tmp_path / "there", HISTORY))
    assert (found["identical"], found["close"]) == (not change, close)
    path = weights(tmp_path / "w")
    other = weights(tmp_path / "v", b=torch.arange(4.0) + 1) if change else path
    parts = verdict.compare_weights(path, other, sha256(other))
    expected = verdict.IDENTICAL if not change else verdict.CLOSE if close else verdict.DIFFERENT
    assert verdict.judge(parts, found, SAME, SAME) == (expected, said)


def test_a_shorter_history_is_another_one(tmp_path):
    found = verdict.compare_history(rows(tmp_path / "here", HISTORY[:1]), rows(tmp_path / "there", HISTORY))
    assert found["first_difference"] == {"step": 100, "name": "loss", "here": None, "there": 5.0}
    assert not found["close"]


@pytest.mark.parametrize(
    ("changes", "number", "gap", "first", "answer"),
    [
        ({"b": torch.arange(4.0) + 1e-4}, 1, pytest.approx(1e-4, rel=1e-2), "b", verdict.CLOSE),
        ({"b": torch.arange(4.0) + 1, "c": torch.tensor([1, 9])}, 2, 7.0, "b", verdict.DIFFERENT),
        ({"a": torch.zeros(2)}, 1, None, "a", verdict.DIFFERENT),
        ({"b": torch.zeros(5)}, 1, None, "b", verdict.DIFFERENT),
        ({"c": None}, 1, None, "c", verdict.DIFFERENT),
    ],
)
def test_weights_part_at_a_tensor(tmp_path, changes, number, gap, first, answer):
    """Where all of the history is the same, only rounding may be left to differ."""
    here, there = weights(tmp_path / "here"), weights(tmp_path / "there", **changes)
    found = verdict.compare_weights(here, there, sha256(there))
    assert (found["different"], found["largest_difference"], found["first_different"]) == (number, gap, first)
    assert verdict.judge(found, SAME, SAME, SAME)[0] == answer


def test_altered_and_lost_weights(tmp_path):
    here, there = weights(tmp_path / "here"), weights(tmp_path / "there", b=torch.zeros(4))
    assert torch.equal(load_file(there)["b"], torch.zeros(4))
    answer, where = verdict.judge(verdict.compare_weights(here, there, sha256(here)), SAME, SAME, SAME)
    assert (answer, where.partition(" weights")[0]) == (verdict.DIFFERENT, "the artifact store has")
    answer, where = verdict.judge(verdict.compare_weights(here, None, "abc"), SAME, SAME, SAME)
    assert answer == verdict.DIFFERENT
    assert where.endswith("abc there; without the registered file there is no finer answer")
    lost = {"identical": None, "close": None, "largest_difference": None}
    assert verdict.judge(verdict.compare_weights(here, None, sha256(here)), lost, lost, lost)[0] == verdict.IDENTICAL
    there.write_bytes(b"torn")
    assert "damaged" in verdict.compare_weights(here, there, sha256(there))["problem"]


def test_metrics_and_detections(tmp_path):
    found = verdict.compare_metrics({"AP": 0.30, "AP50": 0.5, "new": 1.0}, {"AP": 0.304, "AP50": 0.6, "old": 2.0})
    assert (found["identical"], found["close"], found["largest_difference"]["name"]) == (False, True, "AP50")
    assert not verdict.compare_metrics({"AP": 0.30}, {"AP": 0.306})["close"]
    assert verdict.compare_metrics({"AP": 0.30}, {})["identical"] is None
    boxes = [{"image_id": k, "score": 0.5} for k in range(3)]
    (tmp_path / "here").write_text(json.dumps(boxes))
    (tmp_path / "there").write_text(json.dumps([*boxes[:2], {"image_id": 7, "score": 0.5}], indent=1))
    found = verdict.compare_detections(tmp_path / "here", tmp_path / "there")
    assert found == {"identical": False, "images": 4, "different": 2}
    assert verdict.judge({"identical": True, "stored_sha256": None, "registered_sha256": ""}, SAME, SAME, found) == (
        verdict.CLOSE,
        "in the detections of 2 images",
    )


def test_the_stages_of_older_code_are_found_by_their_files():
    stages = read_yaml(ROOT / "dvc.yaml")["stages"]
    needed = chain(stages, "artifacts/evaluate/metrics.json", {})
    assert list(needed) == ["download", "validate", "train", "evaluate"]
    assert not needed["download"]
    older = {
        "judge": {
            "deps": ["artifacts/train", "data"],
            "metrics": [{"artifacts/evaluate/metrics.json": {"cache": False}}],
        },
        "fit": {"deps": ["data/coco", "code.py"], "outs": ["artifacts/train"]},
        "get": {"deps": ["code.py"], "outs": ["data/coco/train.zip"]},
        "other": {"deps": ["artifacts/train"], "outs": ["elsewhere"]},
    }
    assert list(chain(older, "artifacts/evaluate/metrics.json", {})) == ["get", "fit", "judge"]
