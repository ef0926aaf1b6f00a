"""A registered version made again: after an interruption and a kill, elsewhere, of other code, data and hardware."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from pipelines.params import read_yaml, to_yaml
from pipelines.registry.tracking import connect, sha256
from tests.projects import reference
from tests.reproductions import everything_of, made_again, written
from tests.running import call, environment, mlflow_server


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A small project after one `dvc repro`, whose dvc.lock is not committed. Tests in this module use it in turn."""
    return reference(tmp_path_factory.mktemp("project"))


@pytest.fixture
def client(project, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow.db")
    return connect()


def started(project, model="champion"):
    """The process of a reproduction whose training is under way; it heeds SIGINT, whether or not the tests do."""
    command = ["env", "--default-signal=INT", "python", "-m", "pipelines", "reproduce", model]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=project, env=environment(cold=True), start_new_session=True, **pipes)
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
    said = made_again(project, "models:/detr@champion", cold=True)
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
    said = made_again(project, "1", cold=True, ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41")
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
    assert line in path.read_text(encoding="utf-8")
    path.write_text(
        path.read_text(encoding="utf-8").replace(line, "torch.manual_seed(config.seed + 1)"), encoding="utf-8"
    )
    params.write_text(
        params.read_text(encoding="utf-8").replace("num_queries: 20", "num_queries: 11"), encoding="utf-8"
    )
    call(project, "dvc", "repro")
    version = client.get_model_version("detr", "2")
    assert version.tags["git_dirty"] == "true"
    artifacts = Path(client.get_run(version.run_id).info.artifact_uri.removeprefix("file://"))
    diff = artifacts / "git.diff"
    if not diff.exists():
        diff.write_text(call(project, "git", "diff", "--binary", "HEAD"), encoding="utf-8")
    call(project, "git", "checkout", "pipelines/train.py", "params.yaml")
    before = everything_of(project, client)
    assert "models:/detr/2 is bit-identical\n" in made_again(project, "2")
    assert everything_of(project, client) == before

    good = diff.read_text(encoding="utf-8")
    diff.write_text(good.replace("config.seed + 1", "config.seed + 2"), encoding="utf-8")
    said = made_again(project, "models:/detr/2", 1)
    assert said.splitlines()[-1].startswith("error: models:/detr/2 is different: first at step 2, loss ")
    assert "the training's code, parameters or data are others" in said
    document = written(project, 2)
    assert document["weights"]["different"] > 0
    assert client.get_model_version("detr", "2").tags["reproduced"] == f"different, {document['date']}"

    diff.write_text(
        good.replace("torch.manual_seed(config.seed + 1)", "raise ValueError('no such luck')"), encoding="utf-8"
    )
    said = made_again(project, "2", 1)
    assert said.splitlines()[-1] == "error: train: no such luck"
    assert written(project, 2) == document
    diff.write_text("nothing that git knows", encoding="utf-8")
    said = made_again(project, "2", 1)
    assert "error: the git.diff of models:/detr/2 does not fit its commit: git apply" in said
    assert everything_of(project, client) == before
    diff.write_text(good, encoding="utf-8")


def test_other_data_end_it_before_the_training(project, client, tmp_path):
    """Where neither cache nor remote has the data, the download stage makes them; they are compared file by file."""
    version = client.get_model_version("detr", "1")
    lock = Path(client.get_run(version.run_id).info.artifact_uri.removeprefix("file://")) / "dvc.lock"
    good = lock.read_text(encoding="utf-8")
    document = read_yaml(lock)
    for out in document["stages"]["download"]["outs"]:
        out["md5"] = "0" * 32 if out["path"].endswith("train.zip") else out["md5"]
    lock.write_text(to_yaml(document), encoding="utf-8")
    said = made_again(project, "1", 1)
    lock.write_text(good, encoding="utf-8")
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
        command = ["python", "-m", "pipelines", "reproduce", "1"]
        said = call(project, "unshare", "-rm", "sh", "-ec", mount, "sh", *command, code=1, cold=True)
        assert "No space left on device" in said.splitlines()[-1] or "disk is full" in said.splitlines()[-1], said
        assert said.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in said
        assert call(project, "git", "worktree", "list").count("\n") == 1


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
