"""What `dvc repro` makes of a small drawn dataset with every real part: files, an MLflow run, a model that answers."""

import base64
import csv
import json
import shutil
import subprocess
import zipfile

import pytest

from detr.metrics import METRICS
from tests.projects import commit, reference
from tests.running import call, environment, mlflow_server

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
    return reference(tmp_path_factory.mktemp("project"))


def read(project, path):
    return json.loads((project / path).read_text(encoding="utf-8"))


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
    always = {"confusion", "errors", "precision_recall", "slots", "worst_00", "worst_01"}
    assert pictures == always  # it finds nothing yet, so nothing is best
    assert (project / "scratch/data_docs/index.html").exists()
    assert not list(project.glob("scratch/*/state*")), "registration removes the resume state"
    assert "train: 100%" not in (project / "artifacts/train/history.jsonl").read_text(encoding="utf-8")


def test_the_tables_fit_the_metrics(project):
    def table(name):
        with (project / f"artifacts/evaluate/{name}.csv").open(encoding="utf-8") as file:
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
    torchrun = ["python", "-c", "from torch.distributed.run import main; main()"]  # -m torch... would not be warm
    call(tmp_path, *torchrun, "--standalone", "--nproc-per-node=2", "-m", "pipelines.evaluate")
    made = {path.relative_to(tmp_path) for path in (tmp_path / "artifacts/evaluate").rglob("*") if path.is_file()}
    assert made == {path.relative_to(project) for path in (project / "artifacts/evaluate").rglob("*") if path.is_file()}
    assert all((tmp_path / path).read_bytes() == (project / path).read_bytes() for path in made)


def test_history_is_the_training_without_times(project):
    rows = [
        json.loads(line)
        for line in (project / "artifacts/train/history.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert {"loss", "loss_class", "loss_box", "loss_giou", "loss_class_layer0", "lr", "grad_norm"} <= set(rows[0])
    assert {"AP", "AP50"} <= set(rows[2])
    assert not [key for key in rows[0] if "second" in key or "time" in key]


def test_nothing_to_do_the_second_time(project):
    said = call(project, "dvc", "repro")
    for stage in ("download", "validate", "train", "evaluate"):
        assert f"Stage '{stage}' didn't change, skipping" in said
    assert "these weights were registered before" in said


def test_code_runs_again_what_imports_it_and_nothing_else(project):
    for name, again in (
        ("detr/export.py", set()),
        ("detr/loss.py", {"train"}),
        ("detr/model.py", {"train", "evaluate"}),
    ):
        before = (project / name).read_bytes()
        (project / name).write_bytes(before + b"# a comment\n")
        said = call(project, "dvc", "status", "download", "validate", "train", "evaluate")
        (project / name).write_bytes(before)
        assert {line[:-1] for line in said.splitlines() if line.endswith(":") and line[0].isalpha()} == again, said


def test_force_leaves_the_lock_byte_for_byte(project):
    """Stages of one hash seed; of others: tests/slow/test_hash_seeds.py."""
    before = (project / "dvc.lock").read_bytes()
    said = call(project, "dvc", "repro", "--force")
    assert said.count("Running stage") == 5
    assert (project / "dvc.lock").read_bytes() == before


def mlflow_client(project, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow.db")
    from pipelines.registry.tracking import connect

    return connect()


def test_mlflow_shows_what_the_files_hold(project, monkeypatch):
    client = mlflow_client(project, monkeypatch)
    version = client.get_model_version_by_alias("detr", "champion")
    run = client.get_run(version.run_id)
    rows = [
        json.loads(line)
        for line in (project / "artifacts/train/history.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    for name in ("loss", "loss_giou", "lr", "grad_norm"):
        logged = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, f"train/{name}")]
        assert logged == [(row["step"], row[name]) for row in rows]
    assert len(client.get_metric_history(run.info.run_id, "train/images_per_second")) == len(rows)
    metrics = read(project, "artifacts/evaluate/metrics.json")
    known = {name: value for name, value in metrics.items() if value != -1}  # without such objects there is no number
    assert {name: run.data.metrics.get(name) for name in metrics} == dict.fromkeys(metrics) | known
    with (project / "artifacts/evaluate/per_class.csv").open(encoding="utf-8") as file:
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
        ["python", "-c", ASK],
        cwd=tmp_path,
        env=env,
        input=json.dumps(images),
        capture_output=True,
        encoding="utf-8",
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


def test_any_mlflow_server_will_do(project, tmp_path):
    with zipfile.ZipFile(project / "data/coco/val.zip") as archive:
        image = base64.b64encode(archive.read(archive.namelist()[0])).decode()
    with mlflow_server(tmp_path / "server") as (uri, _):
        said = call(project, "python", "-m", "pipelines.register", MLFLOW_TRACKING_URI=uri)
        assert "registered detr version 1 as champion" in said
        env = environment(MLFLOW_TRACKING_URI=uri)
        done = subprocess.run(
            ["python", "-c", ASK],
            cwd=tmp_path,
            env=env,
            input=json.dumps([image]),
            capture_output=True,
            encoding="utf-8",
            check=True,
        )
    (row,) = json.loads(done.stdout.strip().splitlines()[-2])
    assert len(row["scores"]) == len(row["boxes"]) == len(row["labels"]) > 0


def test_dvc_shows_plots_and_differences_of_metrics(project, tmp_path):
    commit(project, "lock", "dvc.lock")
    call(project, "dvc", "plots", "show", "--out", str(tmp_path / "plots"))
    page = (tmp_path / "plots/index.html").read_text(encoding="utf-8")
    for title in ("AP per class", "Precision and recall", "What limits AP50", "AP per decoder layer", "Confusion"):
        assert title in page
    assert "slots.png" in page
    metrics = project / "artifacts/evaluate/metrics.json"
    before = metrics.read_bytes()
    call(project, "dvc", "unprotect", "artifacts/evaluate/metrics.json")
    metrics.write_text(json.dumps(json.loads(before) | {"AP": 0.9}), encoding="utf-8")
    changed = json.loads(call(project, "dvc", "metrics", "diff", "--json"))
    assert changed["artifacts/evaluate/metrics.json"]["AP"]["new"] == 0.9
    call(project, "dvc", "checkout", "--force", "artifacts/evaluate/metrics.json")
    assert metrics.read_bytes() == before
