"""compose.yaml, its commands and settings run here as they are: with PostgreSQL and S3 behind Prefect and MLflow."""

import contextlib
import json
import re
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from pipelines.retraining import services
from pipelines.retraining.automations import MOST_ATTEMPTS
from tests.compose import COMPOSE, SECRETS, Team
from tests.orchestra import Services, answers_page, listening
from tests.projects import detections_like, small_project, trained_project
from tests.running import ROOT, call, environment, needs

AUTHOR = {f"GIT_{who}_{what}": "test@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


@pytest.fixture(scope="module")
def hook():
    with listening() as found:
        yield found


@pytest.fixture(scope="module")
def team(tmp_path_factory, hook):
    """All services, up. Tests in this module use them in turn."""
    postgres = needs("postgresql").parent
    with tempfile.TemporaryDirectory(prefix="team") as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL's user gets through
        for inside in ("objects", "data", "prefect"):
            (folder / inside).mkdir()
        project = small_project(tmp_path_factory.mktemp("project"))
        found = Team(folder, project, postgres, SECRETS | {services.WEBHOOK: hook[0]})
        try:
            found.initialize()
            for service in list(COMPOSE["services"])[1:]:
                found.start(service)
            yield found
        finally:
            found.stop_all()
            services.down(project)


def served(team):
    return Services(team.project, f"http://127.0.0.1:{team.ports[4200]}", f"http://127.0.0.1:{team.ports[5000]}")


def client_environment(team):
    """Of a colleague with the clone, behind an SSH tunnel: the servers, and the keys of the DVC remote."""
    settings = team.environment("worker")
    keys = {key: settings[key] for key in settings if key.startswith("AWS_") and key != "AWS_ENDPOINT_URL"}
    places = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9000", "MLFLOW_TRACKING_URI": "http://127.0.0.1:5000"}
    return keys | {key: team.here(place) for key, place in places.items()}


@pytest.fixture(scope="module")
def retrained(team):
    """The branch of a retraining through the worker, started by its form."""
    prefect = served(team)
    run_id = prefect.start("retrain/on-demand", overrides=["train.epochs=1"], note="for the team")
    run = prefect.wait(run_id, 800)
    assert run["state_type"] == "COMPLETED", prefect.log(run_id)
    assert prefect.tasks(run_id) == dict.fromkeys(("download", "validate", "train", "evaluate", "register"), "Ran")
    return run["state"]["message"].removeprefix("branch ")


def test_a_retraining_lies_in_postgresql_and_s3(team, retrained):
    assert team.sql("SELECT count(*) FROM flow_run WHERE state_type = 'COMPLETED'", "prefect").strip() == "1"
    assert team.sql("SELECT name, version FROM model_versions", "mlflow").strip() == "detr|1"
    keys = [one.key for one in team.bucket().objects.filter(Prefix="mlflow/")]
    assert any(key.endswith("model.safetensors") for key in keys)
    assert any(key.endswith("dvc.lock") for key in keys)
    assert not [name for name in ("mlflow.db", "mlartifacts", "mlruns") if (team.project / name).exists()]
    prefect = served(team)
    (page,) = [artifacts["result"]["data"] for run in prefect.runs() if (artifacts := prefect.artifacts(run["id"]))]
    assert f"]({prefect.mlflow}/#/" in page  # where a browser is, not what containers call it
    assert "http://localhost" not in page
    for name in COMPOSE["services"]:
        assert not [
            secret for key, secret in SECRETS.items() if key != "AWS_ACCESS_KEY_ID" and secret in team.log(name)
        ]


def test_a_colleague_gets_the_data_from_the_same_storage_and_the_model_predicts(team, retrained, tmp_path):
    env = client_environment(team)
    dvc = ("python", "-m", "dvc")
    call(team.project, *dvc, "remote", "add", "--default", "team", "s3://detr/dvc")
    call(team.project, "git", "commit", "--quiet", "--all", "-m", "a remote", **AUTHOR)
    call(team.project, "git", "checkout", "--quiet", retrained)
    call(team.project, "git", "checkout", "--quiet", "main", "--", ".dvc/config")
    call(team.project, *dvc, "push", **env)
    call(team.project, "git", "checkout", "--quiet", "--force", "main")
    call(tmp_path, "git", "clone", "--quiet", "--branch", retrained, str(team.project), "clone")
    clone = tmp_path / "clone"
    shutil.copy(team.project / ".dvc/config", clone / ".dvc/config")
    call(clone, *dvc, "pull", **env)
    assert call(clone, *dvc, "status", "evaluate") == "Data and pipelines are up to date.\n"
    call(clone, "python", "-c", "from zipfile import ZipFile; ZipFile('data/coco/val.zip').extractall('pictures')")
    call(clone, "python", "-m", "pipelines", "predict", "pictures", "--threshold", "0", **env)
    assert (clone / "scratch/predictions").is_dir()


def test_two_registrations_at_once_both_count(team, retrained, drawn, tmp_path):
    env = environment(PYTHONPATH=str(ROOT), **client_environment(team))
    folders = [
        trained_project(tmp_path / mark, drawn, mark, detections_like(drawn / "instances_val.json", shift))
        for mark, shift in (("weak", 4.0), ("strong", 1.0))
    ]
    command = ["python", "-m", "pipelines.register"]
    both = [
        subprocess.Popen(
            command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
        )
        for folder in folders
    ]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    numbers = [re.search(r"registered detr version (\d+) as", text)[1] for text in said]
    assert sorted(numbers) == ["2", "3"]
    aliases = dict(
        line.split("|") for line in team.sql("SELECT alias, version FROM registered_model_aliases", "mlflow").split()
    )
    assert aliases["champion"] == numbers[1]


def test_all_is_there_after_everything_was_restarted(team, retrained, hook):
    """Runs, a schedule that a person has turned on, and a run that fell silent when the host did: it goes on.

    One that fell silent again and again does not: it may be what the host dies of.
    """
    prefect = served(team)
    team.stop("worker")
    run_id = prefect.start("retrain/on-demand", overrides=["train.epochs=1"])
    failed, tired = (prefect.start("collect/collect", dry_run=True) for _ in range(2))
    for _ in range(MOST_ATTEMPTS):
        prefect.ask("POST", f"flow_runs/{tired}/set_state", state={"type": "RUNNING"}, force=True)
    silent = "no sign of life for 180 seconds; retry it"
    for one, message in ((run_id, silent), (tired, silent), (failed, "killed by a person")):
        state = {"type": "CRASHED", "name": "Crashed", "message": message}
        prefect.ask("POST", f"flow_runs/{one}/set_state", state=state, force=True)
    nightly = prefect.ask("GET", "deployments/name/retrain/nightly")
    (schedule,) = nightly["schedules"]
    prefect.ask("PATCH", f"deployments/{nightly['id']}/schedules/{schedule['id']}", active=True)
    ours = [one["id"] for one in prefect.runs() if one["deployment_id"] != nightly["id"]]
    prefect.wait_until(lambda: len(hook[1]) >= 3, what="three messages")
    for _, _, body in hook[1]:
        assert json.loads(body)["url"].startswith(f"{prefect.prefect}/runs/flow-run/")

    team.stop_all()
    team.start_all()
    assert [one["id"] for one in prefect.runs() if one["deployment_id"] != nightly["id"]] == ours
    (schedule,) = prefect.ask("GET", "deployments/name/retrain/nightly")["schedules"]
    assert schedule["active"]
    run = prefect.wait(run_id, 800)
    assert run["state_type"] == "COMPLETED", prefect.log(run_id)
    assert set(prefect.tasks(run_id).values()) <= {"Restored", "Unchanged", "Ran"}
    assert prefect.run(failed)["state"]["message"] == "killed by a person"
    ended = prefect.run(tired)["state"]
    assert ended["message"] == "it began 5 times within a day and never ended; find the cause, then retry it"
    assert ended["type"] == "CRASHED"
    assert team.sql("SELECT count(*) FROM model_versions", "mlflow").strip() == "3"  # these weights were there


def test_pages_of_others_cannot_call_prefects_server(team):
    url = f"{served(team).prefect}/api/flow_runs/filter"
    assert answers_page(url, served(team).prefect)
    assert not answers_page(url, "http://elsewhere")


def test_servers_answer_by_the_names_that_services_call_them_by(team):
    (port,) = (team.ports[5000],)
    for host, code in ((f"mlflow:{port}", 200), (f"127.0.0.1:{port}", 200), (f"elsewhere.example:{port}", 403)):
        path = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=1"
        with contextlib.suppress(urllib.error.HTTPError):
            request = urllib.request.Request(path, headers={"Host": host})
            try:
                with urllib.request.urlopen(request) as answer:
                    got = answer.status
            except urllib.error.HTTPError as error:
                error.close()
                got = error.code
        assert got == code, host
