"""What goes wrong around a small project, and what is said: drift, no MLflow, an interruption."""

import json
import shutil
import socket

import pytest

from tests.projects import quick_project, reference
from tests.running import call
from tests.training import interrupt_training


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A small project after one `dvc repro`. Tests in this module use it in turn."""
    return reference(tmp_path_factory.mktemp("project"))


def test_drift_is_judged_against_the_champion_that_mlflow_names(project, tmp_path):
    for item in ("detr", "pipelines", "params.yaml"):
        copy = shutil.copytree if (project / item).is_dir() else shutil.copy
        copy(project / item, tmp_path / item)
    shutil.copytree(project / "data/coco", tmp_path / "data/coco", copy_function=shutil.copyfile)
    path = tmp_path / "data/coco/instances_train.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    for entry in document["annotations"]:
        entry["category_id"] = 3
    path.write_text(json.dumps(document), encoding="utf-8")
    command = ["python", "-m", "pipelines.validate"]
    said = call(tmp_path, *command, MLFLOW_TRACKING_URI=f"sqlite:///{project}/mlflow.db")
    assert "warning: [like_champion] champion_drift: distances from the champion's data are at most 0.1: 1 of" in said
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


def test_an_interrupted_stage_ends_with_all_its_processes(tmp_path):
    """One that quick.py stands in for, and that stays after its first step; a real training: tests/slow/test_survival.py."""
    slow = quick_project(tmp_path / "slow")
    for stage in ("download", "validate"):
        call(slow, "dvc", "repro", "--single-item", stage)
    (slow / "scratch").mkdir(exist_ok=True)
    (slow / "scratch/hold").write_text("1", encoding="utf-8")
    interrupt_training(slow)


@pytest.mark.parametrize("which", ["mlflow", "docs"])
def test_a_busy_port_is_named(project, which):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = call(project, "python", "-m", "pipelines", "ui", which, "--port", str(port), code=1)
    assert said == f"error: port {port} is in use; stop what listens there, or choose another: --port {port + 1}\n"
