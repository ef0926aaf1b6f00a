"""Versions side by side, from a real registry: two trained models, an old release's, one of other data."""

import csv
import json
import shutil
import sqlite3
from contextlib import closing

import pytest
from PIL import Image

from pipelines.params import merge_parameters, to_yaml
from pipelines.registry import tracking
from pipelines.registry.compare import compare
from tests.projects import reference
from tests.running import call

OTHER = {"model.num_queries": "10", "train.seed": "1"}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with the versions 1 and 2 of two trainings on the same data."""
    folder = reference(tmp_path_factory.mktemp("project"))
    overrides = [f"{key}={value}" for key, value in OTHER.items()]
    (folder / "params.yaml").write_text(to_yaml(merge_parameters(folder, None, overrides)), encoding="utf-8")
    call(folder, "dvc", "repro")
    return folder


@pytest.fixture
def client(project, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow.db")
    found = tracking.connect()
    found.set_registered_model_alias(tracking.MODEL, "champion", "1")
    found.set_registered_model_alias(tracking.MODEL, "challenger", "2")
    return found


def another(client, mark, tags, files):
    """The number of a version whose run has these artifacts, text by path."""
    run_id = tracking.find_run(client, mark, mark)
    for path, text in files.items():
        client.log_text(run_id, text, path)
    return client.create_model_version(tracking.MODEL, f"runs:/{run_id}/model", run_id, tags=tags).version


def document(project, name):
    return json.loads((project / f"scratch/comparisons/{name}/comparison.json").read_text(encoding="utf-8"))


def cells(said, title):
    """The cells of the first row with this title."""
    line = next(line for line in said.splitlines() if line.startswith(f"| {title} "))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_champion_and_challenger_side_by_side(project, client):
    said = call(project, "python", "-m", "pipelines", "compare")
    aps = [float(client.get_model_version("detr", str(number)).tags["AP"]) for number in (1, 2)]
    assert cells(said, "AP") == [f"{ap:.4f}" for ap in aps]
    found = document(project, "1-2")
    assert found["titles"] == ["1 (champion)", "2 (challenger)"]
    gain = found["difference"][1]
    assert gain["paired"]
    assert gain["AP"] == pytest.approx(aps[1] - aps[0])
    assert gain["low"] <= gain["high"]
    assert 0 < gain["p"] <= 1
    assert gain["significant"] == (not gain["low"] <= 0 <= gain["high"])
    assert cells(said, "difference to 1") == ["", f"{gain['AP']:+.4f}"]
    assert found["params"] == {"model.num_queries": ["20", "10"], "train.seed": ["0", "1"]}
    assert cells(said, "train.seed") == ["0", "1"]
    assert (found["data"], found["notes"]) == ({}, [])
    assert "Data: nothing differs" in said
    assert found["environment"]["git_dirty"] == ["false", "true"]
    assert all(value > 0 for value in found["cost"]["train/images_per_second"])


def test_intervals_are_those_of_the_evaluations(project, client):
    compare(project, ["1", "2"])
    tags = [client.get_model_version("detr", str(number)).tags for number in (1, 2)]
    assert document(project, "1-2")["interval"] == [[float(t["AP_low"]), float(t["AP_high"])] for t in tags]


def test_changes_by_class_are_those_of_the_tables(project, client):
    compare(project, ["champion", "2"])
    rows = document(project, "1-2")["classes"]
    assert {row["name"] for row in rows} == {"ellipse", "box", "triangle", "star", "cross"}
    assert [row["change"][1] for row in rows] == sorted((row["change"][1] for row in rows), reverse=True)
    with (project / "artifacts/evaluate/per_class.csv").open(newline="", encoding="utf-8") as file:
        latest = {row["name"]: float(row["AP"]) for row in csv.DictReader(file)}
    assert {row["name"]: row["AP"][1] for row in rows} == latest
    assert all(row["change"][1] == pytest.approx(row["AP"][1] - row["AP"][0]) for row in rows)


def test_it_lies_in_files_and_in_the_newest_versions_run(project, client, tmp_path):
    said = compare(project, ["2", "1"])
    assert said.endswith("All classes, a picture and JSON: scratch/comparisons/2-1/")
    folder = project / "scratch/comparisons/2-1"
    with Image.open(folder / "comparison.png") as picture:
        assert picture.size[0] > picture.size[1] > 400
    run_id = client.get_model_version("detr", "2").run_id
    logged = tracking.fetch_artifact(client, run_id, "comparison/2-1", tmp_path)
    names = ["comparison.json", "comparison.md", "comparison.png"]
    assert sorted(path.name for path in logged.iterdir()) == names
    assert all((logged / name).read_bytes() == (folder / name).read_bytes() for name in names)
    assert said.startswith((folder / "comparison.md").read_text(encoding="utf-8").split("\n\n")[0])


def test_one_is_compared_with_the_champion(project, client):
    assert cells(compare(project, ["2"]), "") == ["1 (champion)", "2 (challenger)"]


def test_a_comparison_with_itself_and_with_three(project, client):
    with pytest.raises(ValueError, match="champion is version 1 and 1 is version 1; give versions that differ"):
        compare(project, ["1"])
    run = client.get_model_version("detr", "1")
    twin = client.create_model_version("detr", run.source, run.run_id, tags=run.tags).version
    compare(project, ["1", "2", str(twin)])
    gains = document(project, f"1-2-{twin}")["difference"]
    margin = 1 - 0.025 ** (1 / 16)  # no image of 16 tells them apart
    expected = {"AP": 0, "paired": True, "low": -margin, "high": margin, "p": 1, "significant": False}
    assert gains[2] == pytest.approx(expected)


def test_an_old_release_shows_what_it_has(project, client):
    number = another(client, "old", {"AP": "0.25", "AP50": "0.5"}, {})
    said = compare(project, ["champion", str(number)])
    assert cells(said, "AP")[1] == "0.2500"
    assert cells(said, "95% interval")[1] == "-"
    assert cells(said, "difference to 1")[1] == "not comparable"
    assert f"- version {number} was evaluated on other validation data than 1: not comparable" in said


def test_without_detections_a_difference_is_not_paired(project, client):
    tags = client.get_model_version("detr", "1").tags
    files = {"dvc.lock": (project / "dvc.lock").read_text(encoding="utf-8")}
    number = another(client, "no detections", {"AP": "0.25", "data_digest": tags["data_digest"]}, files)
    said = compare(project, ["1", str(number)])
    assert cells(said, "difference to 1")[1] == f"{0.25 - float(tags['AP']):+.4f}"
    assert cells(said, "its 95% interval")[1] == "not paired"
    assert f"not paired: MLflow has no evaluate/detections.json of version {number}" in said


def test_other_training_data_are_told_and_other_validation_data_not_compared(project, client):
    tags = client.get_model_version("detr", "2").tags | {"data_digest": "f" * 64}
    lock = (project / "dvc.lock").read_text(encoding="utf-8")
    md5 = {
        name: lock.partition(f"path: data/coco/{name}\n")[2].split("md5: ")[1].split()[0]
        for name in ("instances_train.json", "instances_val.json")
    }
    statistics = json.loads((project / "artifacts/validate/statistics.json").read_text(encoding="utf-8"))
    statistics["train"]["images"] += 7
    files = {
        "dvc.lock": lock.replace(md5["instances_train.json"], "0" * 32),
        "validate/statistics.json": json.dumps(statistics),
        "evaluate/detections.json": (project / "artifacts/evaluate/detections.json").read_text(encoding="utf-8"),
    }
    number = another(client, "more data", tags, files)
    said = compare(project, ["1", str(number)])
    found = document(project, f"1-{number}")
    assert found["difference"][1]["paired"]
    assert found["data"]["train.images"] == [48, 55]
    assert cells(said, "digest")[1] == "f" * 12
    files["dvc.lock"] = lock.replace(md5["instances_val.json"], "0" * 32)
    number = another(client, "other judge", tags, files)
    said = compare(project, ["1", str(number)])
    assert document(project, f"1-{number}")["difference"] == [None, None]
    assert cells(said, "its 95% interval")[1] == "not comparable"


def test_without_the_ground_truth_it_says_what_is_missing(project, client, tmp_path):
    (tmp_path / "data/coco").mkdir(parents=True)
    shutil.copy(project / "params.yaml", tmp_path)
    (tmp_path / "data/coco/instances_val.json").write_text("{}", encoding="utf-8")
    said = compare(tmp_path, ["1", "2"])
    commit = call(project, "git", "rev-parse", "HEAD").strip()
    truth = tmp_path / "data/coco/instances_val.json"
    assert f"not paired: {truth} is not the ground truth that version 1 was evaluated on; get it: " in said
    assert f"git checkout {commit} && dvc checkout" in said
    assert cells(said, "95% interval") != ["-", "-"]


@pytest.mark.parametrize("names", [["99"], ["1", "nobody"]])
def test_an_unknown_version_is_one_line(project, client, names):
    said = call(project, "python", "-m", "pipelines", "compare", *names, code=1)
    uri = f"sqlite:///{project}/mlflow.db"
    assert said.startswith(f"error: {uri} has no {names[-1]}; versions of detr: 1, 2")
    assert "aliases: challenger (2), champion (1)" in said
    assert len(said.splitlines()) == 1


def test_mlflow_that_is_dead_or_empty_is_one_line(project, client, tmp_path):
    dead = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    said = call(project, "python", "-m", "pipelines", "compare", code=1, **dead)
    assert said.startswith("error: MLflow at http://127.0.0.1:9 is unreachable")
    assert len(said.splitlines()) == 1
    said = call(
        project, "python", "-m", "pipelines", "compare", code=1, MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/no.db"
    )
    assert (
        said
        == f"error: nothing is registered yet: sqlite:///{tmp_path}/no.db does not exist; python -m pipelines run\n"
    )


def test_an_artifact_that_is_absent_or_damaged(project, client, tmp_path):
    run_id = tracking.find_run(client, "damaged", "damaged")
    client.log_text(run_id, "{}", "dvc.lock")
    assert tracking.fetch_artifact(client, run_id, "evaluate/detections.json", tmp_path) is None
    assert tracking.fetch_artifact(client, run_id, "dvc.lock", tmp_path).read_text(encoding="utf-8") == "{}"
    with pytest.raises(ValueError, match=f"dvc.lock of MLflow's run {'0' * 32} cannot be read: .*not found"):
        tracking.fetch_artifact(client, "0" * 32, "dvc.lock", tmp_path)


def test_a_version_whose_run_is_gone_is_one_line(project, client):
    number = another(client, "gone", {"AP": "0.1"}, {})
    with closing(sqlite3.connect(project / "mlflow.db")) as database, database:
        database.execute("PRAGMA foreign_keys = OFF")
        database.execute("UPDATE model_versions SET run_id = ? WHERE version = ?", ("0" * 32, int(number)))
    said = call(project, "python", "-m", "pipelines", "compare", "1", str(number), code=1)
    assert said.startswith(
        f"error: the comparison stopped, MLflow at sqlite:///{project}/mlflow.db failed: Run with id="
    )
    assert len(said.splitlines()) == 1
