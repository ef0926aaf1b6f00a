"""The flow `python -m pipelines run` on a small project: what it finds, an override, a wrong one, a second run, broken data."""

import json
import os
import platform
import re
import shutil
import sqlite3
import subprocess
from contextlib import closing

import pytest

from detr.metrics import METRICS
from pipelines.params import read_yaml, to_yaml
from pipelines.workspace.git import is_dirty
from pipelines.workspace.worktree import hold_run_lock
from tests.projects import commit, quick_project, reference, small_project
from tests.running import call, environment


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A small project after one `dvc repro`. Tests in this module use it in turn."""
    return reference(tmp_path_factory.mktemp("project"))


def read(project, path):
    return json.loads((project / path).read_text(encoding="utf-8"))


def test_the_flow_finds_everything_unchanged_and_says_where_to_look(project):
    said = call(project, "python", "-m", "pipelines", "run")
    for stage in ("download", "validate", "train", "evaluate"):
        assert f"Task run '{stage}' - Finished in state Unchanged" in said
    assert "Task run 'register' - Finished in state Ran" in said
    assert "model     detr version 1" in said
    for line in ("AP50", "pictures  artifacts/evaluate/plots/", "ui prefect", "ui mlflow", "ui docs", "ui dataset"):
        assert line in said
    with closing(sqlite3.connect(project / ".prefect/prefect.db")) as store:
        (text,) = store.execute("select data from artifact where key = 'dataset' order by created desc").fetchone()
    counts = read(project, "artifacts/validate/statistics.json")
    assert ["images", *(str(counts[name]["images"]) for name in ("train", "val"))] in [
        [cell.strip() for cell in line.strip("|").split("|")] for line in json.loads(text).splitlines()
    ]
    assert "83 of 83 expectations hold" in text
    assert "python -m pipelines ui dataset" in text


def test_an_override_runs_in_a_worktree_and_is_a_commit(project, tmp_path):
    commit(project, "lock", "dvc.lock")
    before = {name: (project / name).read_bytes() for name in ("params.yaml", "dvc.lock")}
    asked = ("train.epochs=1", "model.num_queries=9", "train.warmup_steps=99")
    said = call(project, "python", "-m", "pipelines", "run", *(word for one in asked for word in ("--set", one)))
    assert said.count("warning: train.warmup_steps is 99 of 6 steps") == 1
    assert "Task run 'download' - Finished in state Restored" in said
    assert "Task run 'train' - Finished in state Ran" in said
    assert {name: (project / name).read_bytes() for name in before} == before
    assert not is_dirty(project)
    (branch,) = call(project, "git", "branch", "--list", "runs/*", "--format=%(refname:short)").split()
    assert f"branch    {branch}" in said
    kept = project / "scratch" / branch / "metrics.json"
    assert tuple(json.loads(kept.read_text(encoding="utf-8")))[:12] == METRICS
    assert call(project, "git", "worktree", "list").count("\n") == 1

    other = tmp_path / "there"
    call(project, "git", "worktree", "add", str(other), branch)
    (other / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {project}/.dvc/cache\n", encoding="utf-8")
    call(other, "dvc", "checkout")
    status = json.loads(call(other, "dvc", "status", "--json"))
    assert list(status) == ["register"]
    assert status["register"] == ["always changed"]
    assert "num_queries: 9" in (other / "params.yaml").read_text(encoding="utf-8")
    assert len(read(other, "artifacts/evaluate/detections.json")) == 9 * 16
    call(project, "git", "worktree", "remove", "--force", str(other))


def test_stages_of_a_person_run_where_the_graph_has_them_and_a_version_names_its_own_commit(tmp_path):
    project = quick_project(tmp_path / "project")
    graph = read_yaml(project / "dvc.yaml")
    own = {"notes": stage("artifacts/evaluate/metrics.json", "artifacts/notes.json")}
    told = {"foreach": ["a", "b"], "do": stage("artifacts/register/version.json", "artifacts/${item}.json")}
    graph["stages"] = own | graph["stages"] | {"told": told}
    (project / "dvc.yaml").write_text(to_yaml(graph), encoding="utf-8")
    commit(project, "own stages", "dvc.yaml")
    said = call(project, "python", "-m", "pipelines", "run", "--set", "train.epochs=1")
    ended = re.findall(r"Task run '(\S+)' - Finished in state Ran", said)
    assert sorted(ended) == ["download", "evaluate", "notes", "register", "told@a", "told@b", "train", "validate"]
    assert ended.index("evaluate") < ended.index("notes")
    assert ended.index("register") < ended.index("told@a")
    (branch,) = call(project, "git", "branch", "--list", "runs/*", "--format=%(refname:short)").split()
    assert "told@b:" in call(project, "git", "show", f"{branch}:dvc.lock")
    with closing(sqlite3.connect(project / "mlflow.db")) as store:
        ((made,),) = store.execute("select value from model_version_tags where key = 'git_commit'")
    assert "evaluate:" in call(project, "git", "show", f"{made}:dvc.lock")  # what `reproduce` starts from


def stage(needed, made):
    return {"cmd": f"cp {needed} {made}", "deps": [needed], "outs": [made]}


def test_a_wrong_override_changes_nothing(project):
    said = call(project, "python", "-m", "pipelines", "run", "--set", "train.epoch=1", code=1)
    assert said == "error: params.yaml: train: there is no key 'epoch' to override; did you mean 'epochs'?\n"


def test_a_second_run_waits_and_says_so(project):
    with hold_run_lock(project, print):
        second = subprocess.Popen(
            ["python", "-m", "pipelines", "run"],
            cwd=project,
            env=environment(),
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        said = second.stdout.readline()
        holder = f"process {os.getpid()} on {platform.node()}"
        assert said == f"another run ({holder}) is under way in {project}; waiting for it to end\n"
        assert second.poll() is None
        second.kill()
        second.communicate()


def test_broken_data_stops_before_training(project, tmp_path):
    broken = small_project(tmp_path / "broken")
    shutil.copytree(project / "data/coco", tmp_path / "source", copy_function=shutil.copyfile)
    path = tmp_path / "source/instances_train.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["annotations"][0]["bbox"] = [90, 90, 50, 50]
    path.write_text(json.dumps(document), encoding="utf-8")
    params = broken / "params.yaml"
    params.write_text(
        params.read_text(encoding="utf-8").replace("source: shapes", f"source: {tmp_path}/source", 1), encoding="utf-8"
    )
    home = str(project / ".prefect")  # whose database is made already
    said = call(broken, "python", "-m", "pipelines", "run", code=1, PREFECT_HOME=home)
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: validate: 1 of 83 expectations on data/coco are broken"), said
    assert said.count(last.removeprefix("error: validate: ")) == 1
    assert "NoneType" not in said
    assert f"(ids {document['annotations'][0]['id']})" in said
    assert "Traceback" not in said
    assert not (broken / "artifacts/train").exists()
    assert not (broken / "artifacts/validate/passed.json").exists()
