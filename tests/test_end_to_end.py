"""The main job with every real part: DVC, torchrun, MLflow, Prefect, git, on a small drawn dataset."""

import base64
import csv
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import zipfile
from contextlib import closing
from pathlib import Path

import pytest

from detr.judge import METRICS
from pipelines.git import is_dirty
from pipelines.repro import reproduce
from pipelines.worktree import only_one
from tests.conftest import call, environment, mlflow_server, small_project

ASK = """
import json, sys
import mlflow, pandas as pd
model = mlflow.pyfunc.load_model("models:/detr@champion")
answer = model.predict(pd.DataFrame({"image": json.loads(sys.stdin.read())}), params={"threshold": 0.0})
print(json.dumps(answer.to_dict("records")))
import detr
print(detr.__file__)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A small project after one `dvc repro`. Tests in this module use it in turn."""
    folder = small_project(tmp_path_factory.mktemp("project"))
    call(folder, "dvc", "repro")
    return folder


def read(project, path):
    return json.loads((project / path).read_text())


def test_dvc_repro_makes_every_output(project):
    metrics = read(project, "artifacts/evaluate/metrics.json")
    assert tuple(metrics) == (*METRICS, "AP_low", "AP_high", "parameters_millions", "gflops")
    assert all(-1 <= metrics[name] <= 1 for name in METRICS)
    assert 0 < metrics["parameters_millions"] < 1
    assert 0 < metrics["gflops"] < 1
    assert metrics["AP_low"] <= metrics["AP"] <= metrics["AP_high"]
    version = read(project, "artifacts/register/version.json")
    assert (version["name"], version["version"]) == ("detr", 1)
    pictures = {p.stem for p in (project / "artifacts/evaluate/plots").iterdir()}
    assert pictures == {
        "best_00", "best_01", "confusion", "errors", "precision_recall", "slots", "worst_00", "worst_01",
    }  # fmt: skip
    assert (project / "scratch/data_docs/index.html").exists()
    assert not list(project.glob("scratch/*/state*")), "registration removes the resume state"
    assert "train: 100%" not in (project / "artifacts/train/history.jsonl").read_text()


def test_the_tables_fit_the_metrics(project):
    def table(name):
        with (project / f"artifacts/evaluate/{name}.csv").open() as file:
            return list(csv.DictReader(file))

    metrics = read(project, "artifacts/evaluate/metrics.json")
    *_, last = layers = table("per_layer")
    assert [row["layer"] for row in layers] == ["1", "2"]
    assert {name: float(last[name]) for name in METRICS} == {name: metrics[name] for name in METRICS}
    truth = read(project, "data/coco/instances_val.json")
    per_class = table("per_class")
    assert [row["name"] for row in per_class] == [c["name"] for c in sorted(truth["categories"], key=lambda c: c["id"])]
    assert sum(int(row["num_objects"]) for row in per_class) == sum(not a["iscrowd"] for a in truth["annotations"])
    present = [float(row["AP"]) for row in per_class if float(row["AP"]) >= 0]
    assert sum(present) / len(present) == pytest.approx(metrics["AP"], abs=1e-6)
    curve = table("precision_recall")
    assert [row["recall"] for row in curve] == [f"{k / 100:.6f}" for k in range(101)]
    mean = sum(float(row[f"{0.5 + 0.05 * k:.2f}"]) for row in curve for k in range(10)) / 1010
    assert mean == pytest.approx(metrics["AP"], abs=1e-5)
    assert len(table("errors")) == 6


def test_two_processes_evaluate_to_the_same_bytes(project, tmp_path):
    for item in ("pipelines", "detr", "data", "artifacts/train", "params.yaml"):
        copy = shutil.copytree if (project / item).is_dir() else shutil.copy
        copy(project / item, tmp_path / item)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    call(tmp_path, *torchrun, "-m", "pipelines.evaluate")
    made = {path.relative_to(tmp_path) for path in (tmp_path / "artifacts/evaluate").rglob("*") if path.is_file()}
    assert made == {path.relative_to(project) for path in (project / "artifacts/evaluate").rglob("*") if path.is_file()}
    assert all((tmp_path / path).read_bytes() == (project / path).read_bytes() for path in made)


def test_history_is_the_training_without_times(project):
    rows = [json.loads(line) for line in (project / "artifacts/train/history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert {"loss", "loss_class", "loss_box", "loss_giou", "loss_class_layer0", "lr", "grad_norm"} <= set(rows[0])
    assert {"AP", "AP50"} <= set(rows[2])
    assert not [key for key in rows[0] if "second" in key or "time" in key]


def test_nothing_to_do_the_second_time(project):
    said = call(project, "dvc", "repro")
    for stage in ("download", "validate", "train", "evaluate"):
        assert f"Stage '{stage}' didn't change, skipping" in said
    assert "these weights were registered before" in said


def test_force_leaves_the_lock_byte_for_byte(project):
    before = (project / "dvc.lock").read_bytes()
    said = call(project, "dvc", "repro", "--force")
    assert said.count("Running stage") == 5
    assert (project / "dvc.lock").read_bytes() == before


def mlflow_client(project, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow.db")
    from pipelines.tracking import connect

    return connect()


def test_mlflow_shows_what_the_files_hold(project, monkeypatch):
    client = mlflow_client(project, monkeypatch)
    version = client.get_model_version_by_alias("detr", "champion")
    run = client.get_run(version.run_id)
    rows = [json.loads(line) for line in (project / "artifacts/train/history.jsonl").read_text().splitlines()]
    for name in ("loss", "loss_giou", "lr", "grad_norm"):
        logged = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, f"train/{name}")]
        assert logged == [(row["step"], row[name]) for row in rows]
    assert len(client.get_metric_history(run.info.run_id, "train/images_per_second")) == len(rows)
    metrics = read(project, "artifacts/evaluate/metrics.json")
    assert {name: run.data.metrics[name] for name in metrics} == metrics
    with (project / "artifacts/evaluate/per_class.csv").open() as file:
        per_class = {row["name"]: float(row["AP"]) for row in csv.DictReader(file)}
    assert {f"class_AP/{name}": ap for name, ap in per_class.items() if ap >= 0}.items() <= run.data.metrics.items()
    assert run.data.metrics["images_per_second"] > 0
    assert run.data.metrics["val/AP"] == pytest.approx(run.data.metrics["AP"], abs=1e-6)
    assert run.data.params["train.epochs"] == "2"
    stored = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"dvc.lock", "params.yaml", "data_docs", "evaluate", "validate", "train"} <= stored
    validated = {artifact.path for artifact in client.list_artifacts(run.info.run_id, "validate")}
    assert validated == {f"validate/{name}" for name in ("dataset", "report.json", "statistics.json")}
    assert (project / "mlartifacts").is_dir()
    head = call(project, "git", "rev-parse", "HEAD").strip()
    assert version.tags["git_commit"] == run.data.tags["git_commit"] == head
    assert version.tags["data_digest"] == read(project, "artifacts/validate/passed.json")["data"]
    assert version.tags["fingerprint"] == read(project, "artifacts/train/config.json")["fingerprint"]


def test_the_champion_answers_an_image_without_the_project(project, tmp_path):
    with zipfile.ZipFile(project / "data/coco/val.zip") as archive:
        images = [base64.b64encode(archive.read(name)).decode() for name in archive.namelist()[:3]]
    env = environment(MLFLOW_TRACKING_URI=f"sqlite:///{project}/mlflow.db")
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        cwd=tmp_path,
        env=env,
        input=json.dumps(images),
        capture_output=True,
        text=True,
        check=True,
    )
    *_, answer, home = done.stdout.strip().splitlines()
    assert str(project / "mlartifacts") in home
    stored = read(project, "artifacts/evaluate/detections.json")
    names = {c["id"]: c["name"] for c in read(project, "data/coco/instances_val.json")["categories"]}
    ids = [image["id"] for image in read(project, "data/coco/instances_val.json")["images"][:3]]
    for image_id, row in zip(ids, json.loads(answer), strict=True):
        expected = sorted((d for d in stored if d["image_id"] == image_id), key=lambda d: -d["score"])
        assert row["scores"] == sorted(row["scores"], reverse=True)
        assert row["scores"] == pytest.approx([d["score"] for d in expected], abs=1e-5)
        assert sorted(row["labels"]) == sorted(names[d["category_id"]] for d in expected)
        x, y, w, h = expected[0]["bbox"]
        assert any(box == pytest.approx([x, y, x + w, y + h], abs=0.05) for box in row["boxes"])


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
    assert "75 of 75 expectations hold" in text
    assert "python -m pipelines ui dataset" in text


def test_an_override_runs_in_a_worktree_and_is_a_commit(project, tmp_path):
    call(project, "git", "add", "dvc.lock")
    call(project, "git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "-m", "lock")
    before = {name: (project / name).read_bytes() for name in ("params.yaml", "dvc.lock")}
    said = call(project, "python", "-m", "pipelines", "run", "--set", "train.epochs=1", "--set", "model.num_queries=9")
    assert "Task run 'download' - Finished in state Restored" in said
    assert "Task run 'train' - Finished in state Ran" in said
    assert {name: (project / name).read_bytes() for name in before} == before
    assert not is_dirty(project)
    (branch,) = call(project, "git", "branch", "--list", "runs/*", "--format=%(refname:short)").split()
    assert f"branch    {branch}" in said
    kept = project / "scratch" / branch / "metrics.json"
    assert tuple(json.loads(kept.read_text()))[:12] == METRICS
    assert call(project, "git", "worktree", "list").count("\n") == 1

    other = tmp_path / "there"
    call(project, "git", "worktree", "add", str(other), branch)
    (other / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {project}/.dvc/cache\n")
    call(other, "dvc", "checkout")
    status = json.loads(call(other, "dvc", "status", "--json"))
    assert list(status) == ["register"]
    assert status["register"] == ["always changed"]
    assert "num_queries: 9" in (other / "params.yaml").read_text()
    assert len(read(other, "artifacts/evaluate/detections.json")) == 9 * 16
    call(project, "git", "worktree", "remove", "--force", str(other))


def test_dvc_shows_plots_and_differences_of_metrics(project, tmp_path):
    call(project, "dvc", "plots", "show", "--out", str(tmp_path / "plots"))
    page = (tmp_path / "plots/index.html").read_text()
    for title in ("AP per class", "Precision and recall", "What limits AP50", "AP per decoder layer", "Confusion"):
        assert title in page
    assert "slots.png" in page
    metrics = project / "artifacts/evaluate/metrics.json"
    before = metrics.read_bytes()
    call(project, "dvc", "unprotect", "artifacts/evaluate/metrics.json")
    metrics.write_text(json.dumps(json.loads(before) | {"AP": 0.9}))
    changed = json.loads(call(project, "dvc", "metrics", "diff", "--json"))
    assert changed["artifacts/evaluate/metrics.json"]["AP"]["new"] == 0.9
    call(project, "dvc", "checkout", "--force", "artifacts/evaluate/metrics.json")
    assert metrics.read_bytes() == before


def test_the_demos_benchmark_runs(project):
    *_, last = call(project, "python", "benchmarks/demo.py", "--quick").strip().splitlines()
    result = json.loads(last)
    assert (result["benchmark"], result["ratios"]) == ("demo", {})
    assert set(result["figures"]) == {"lowest_AP", "lowest_AP50", "highest_seconds"}


def test_a_wrong_override_changes_nothing(project):
    said = call(project, "python", "-m", "pipelines", "run", "--set", "train.epoch=1", code=1)
    assert said == "error: params.yaml: train: there is no key 'epoch' to override; did you mean 'epochs'?\n"


def test_a_second_run_waits_and_says_so(project):
    with only_one(project, print):
        second = subprocess.Popen(
            [sys.executable, "-m", "pipelines", "run"],
            cwd=project,
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        said = second.stdout.readline()
        assert said == f"another run (process {os.getpid()}) is under way in {project}; waiting for it to end\n"
        assert second.poll() is None
        second.kill()
        second.communicate()


@pytest.mark.parametrize("processes", ["1", "2"])
def test_killed_in_the_middle_it_goes_on_to_the_same_bits(project, tmp_path, processes):
    """SIGKILL after a state is on disk; what follows resumes and ends as if nothing had happened."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        for item in ("detr", "pipelines", "data", "artifacts/validate"):
            shutil.copytree(project / item, tmp_path / name / item, dirs_exist_ok=True)
        text = (project / "params.yaml").read_text()
        (tmp_path / name / "params.yaml").write_text(text.replace("dropout: 0.0", "dropout: 0.1"))
    command, extra = [sys.executable, "-m", "pipelines.train"], {"PET_NPROC_PER_NODE": processes}
    call(tmp_path / "whole", *command, **extra)
    killed = tmp_path / "killed"
    victim = subprocess.Popen(
        command,
        cwd=killed,
        env=environment(**extra),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not list(killed.glob("scratch/*/state")):
        assert victim.poll() is None, "the training ended before it saved a state"
        time.sleep(0.02)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    wait_until_nobody_works_in(killed)
    assert not (killed / "artifacts/train/model.safetensors").exists()
    assert "resuming at step" in call(killed, *command, **extra)
    for name in ("model.safetensors", "history.jsonl", "config.json"):
        assert (killed / "artifacts/train" / name).read_bytes() == (
            tmp_path / "whole/artifacts/train" / name
        ).read_bytes()


def wait_until_nobody_works_in(folder):
    """Returns once no process has `folder` as its working directory: killed trainings leave no orphans."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        places = []
        for link in Path("/proc").glob("[0-9]*/cwd"):
            try:
                places.append(link.readlink())
            except OSError:
                continue
        if folder not in places:
            return
        time.sleep(0.05)
    raise AssertionError(f"processes still work in {folder} a minute after the kill")


def test_broken_data_stops_before_training(project, tmp_path):
    broken = small_project(tmp_path / "broken")
    shutil.copytree(project / "data/coco", tmp_path / "source", copy_function=shutil.copyfile)
    path = tmp_path / "source/instances_train.json"
    document = json.loads(path.read_text())
    document["annotations"][0]["bbox"] = [90, 90, 50, 50]
    path.write_text(json.dumps(document))
    params = broken / "params.yaml"
    params.write_text(params.read_text().replace("source: shapes", f"source: {tmp_path}/source", 1))
    said = call(broken, "python", "-m", "pipelines", "run", code=1)
    last = said.strip().splitlines()[-2:]
    assert any(line.startswith("error: validate: 1 of 75 expectations on data/coco are broken") for line in last), said
    assert f"(ids {document['annotations'][0]['id']})" in said
    assert "Traceback" not in said
    assert not (broken / "artifacts/train").exists()
    assert not (broken / "artifacts/validate/passed.json").exists()


def test_drift_is_judged_against_the_champion_that_mlflow_names(project, tmp_path):
    for item in ("pipelines", "params.yaml"):
        copy = shutil.copytree if (project / item).is_dir() else shutil.copy
        copy(project / item, tmp_path / item)
    shutil.copytree(project / "data/coco", tmp_path / "data/coco", copy_function=shutil.copyfile)
    path = tmp_path / "data/coco/instances_train.json"
    document = json.loads(path.read_text())
    for entry in document["annotations"]:
        entry["category_id"] = 3
    path.write_text(json.dumps(document))
    command = [sys.executable, "-m", "pipelines.validate"]
    said = call(tmp_path, *command, MLFLOW_TRACKING_URI=f"sqlite:///{project}/mlflow.db")
    assert "warning: champion_drift: distances from the champion's data are at most 0.1: 1 break it" in said
    report = (tmp_path / "artifacts/validate/report.json").read_bytes()
    said = call(tmp_path, *command)
    assert "drift" not in said
    assert not (tmp_path / "mlflow.db").exists()
    dead = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    said = call(tmp_path, *command, **dead)
    assert "warning: drift from the champion's data is not judged: MLflow at http://127.0.0.1:9 is unreachable" in said
    assert (tmp_path / "artifacts/validate/report.json").read_bytes() == report


def test_without_mlflow_training_goes_on_and_registration_says_so(project):
    dead = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    before = (project / "dvc.lock").read_bytes()
    call(project, "dvc", "repro", "--force", "--single-item", "train", **dead)
    said = call(project, "dvc", "repro", "--single-item", "register", code=None, **dead)
    assert "error: MLflow at http://127.0.0.1:9 is unreachable" in said
    assert "Traceback" not in said
    call(project, "dvc", "repro", "--single-item", "register")
    assert (project / "dvc.lock").read_bytes() == before


def test_an_interrupted_stage_ends_with_all_its_processes(project, tmp_path):
    slow = small_project(tmp_path / "slow", "train.epochs=100000", "train.evaluate_epochs=0")
    for made in ("data/coco", "artifacts/validate"):
        shutil.copytree(project / made, slow / made)

    def interrupt(line):
        if line.startswith("train ") and "starting" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce("train", slow, interrupt)
    wait_until_nobody_works_in(slow)


def test_any_mlflow_server_will_do(project, tmp_path):
    with zipfile.ZipFile(project / "data/coco/val.zip") as archive:
        image = base64.b64encode(archive.read(archive.namelist()[0])).decode()
    with mlflow_server(tmp_path / "server") as (uri, _):
        said = call(project, "python", "-m", "pipelines.register", MLFLOW_TRACKING_URI=uri)
        assert "registered detr version 1 as champion" in said
        env = environment(MLFLOW_TRACKING_URI=uri)
        done = subprocess.run(
            [sys.executable, "-c", ASK],
            cwd=tmp_path,
            env=env,
            input=json.dumps([image]),
            capture_output=True,
            text=True,
            check=True,
        )
    (row,) = json.loads(done.stdout.strip().splitlines()[-2])
    assert len(row["scores"]) == len(row["boxes"]) == len(row["labels"]) > 0


@pytest.mark.parametrize("which", ["mlflow", "docs"])
def test_a_busy_port_is_named(project, which):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = call(project, "python", "-m", "pipelines", "ui", which, "--port", str(port), code=1)
    assert said == f"error: port {port} is in use; stop what listens there, or choose another: --port {port + 1}\n"
