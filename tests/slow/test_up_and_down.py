"""What starts, stops, dies and is started again: `up`, `down`, kills, silence, a second project beside the first."""

import json
import re
import time
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
import requests

from pipelines.retraining.services import find_marked
from tests.orchestra import answers_page, listeners, listening, services
from tests.projects import quick_project
from tests.running import call, free_port

SILENT = 45  # seconds; heartbeats come every 30
PYTHON = "python", "-m"


@pytest.fixture(scope="module")
def hook():
    with listening() as found:
        yield found


@pytest.fixture(scope="module")
def env(hook):
    return {"DETR_WEBHOOK_URL": hook[0], "DETR_SILENT_SECONDS": str(SILENT)}


@pytest.fixture(scope="module")
def served(tmp_path_factory, env):
    """A project with quick stages, its servers and its worker. Tests in this module use it in turn."""
    with services(quick_project(tmp_path_factory.mktemp("services")), **env) as found:
        yield found


def told(hook):
    return [json.loads(body) for _, _, body in hook[1]]


@pytest.fixture(scope="module")
def silent(served, hook):
    """A run that fell silent in its training and was retried, and one that waited for it: as they were and ended."""
    with served.held("train.epochs=2", "train.seed=1") as run_id:
        name = f"prefect.flow-run.{run_id}"
        heartbeat = {"event": {"name": ["prefect.flow-run.heartbeat"]}, "resource": {"id": [name]}}
        served.wait_until(lambda: served.ask("POST", "events/filter", filter=heartbeat)["events"], what="a heartbeat")
        worker = served.stop("prefect worker")
        served.kill_services("worker")
        waiting = served.start("collect/collect")
        crashed = served.wait(run_id)
        served.wait_until(lambda: crashed["name"] in [one["run"] for one in told(hook)], what="a message of the crash")
    worker()
    waited = served.wait(waiting)
    served.ask("POST", f"flow_runs/{run_id}/set_state", state={"type": "SCHEDULED", "name": "AwaitingRetry"})
    return SimpleNamespace(crashed=crashed, waited=waited, again=served.wait(run_id), told=told(hook)[-1])


def test_a_silent_run_has_crashed_and_the_queue_goes_on(served, silent):
    assert (silent.crashed["state_type"], silent.crashed["state_name"]) == ("CRASHED", "Crashed")
    assert silent.crashed["state"]["message"].startswith(f"no sign of life for {SILENT} seconds; retry it")
    assert silent.told["run"] == silent.crashed["name"]
    assert silent.waited["state_type"] == "COMPLETED"
    assert silent.again["state_type"] == "COMPLETED", served.log(silent.again["id"])
    assert "resuming at step" in served.log(silent.again["id"])


def test_down_in_a_training_and_the_next_up_goes_on(served, env, hook, silent):
    before = len(told(hook))
    nightly, look = (served.deployments()[name] for name in ("nightly", "watch-data"))
    own_time = {"cron": "0 4 29 2 *", "timezone": "Europe/Berlin"}
    schedule = f"deployments/{nightly['id']}/schedules/{nightly['schedules'][0]['id']}"
    served.ask("PATCH", schedule, active=True, schedule=own_time)
    own = {"schedule": {"cron": "0 5 29 2 *"}, "active": True, "parameters": {"preset": "photos"}, "slug": "mine"}
    added = requests.post(f"{served.prefect}/api/deployments/{look['id']}/schedules", json=[own], timeout=300)
    added.raise_for_status()
    before_up = {name: one["schedules"] for name, one in served.deployments().items()}
    trigger = dict(served.automations())["on-data-change__automation_1"]
    served.ask("PATCH", f"automations/{trigger}", enabled=False)
    with served.held("train.epochs=2", "train.seed=2") as run_id:
        sleep_until(datetime.fromisoformat(silent.again["end_time"]) + timedelta(seconds=SILENT + 5))
        assert served.run(run_id)["state_type"] == "RUNNING"
        for one in (silent.waited, silent.again):  # what has ended is not taken for silent
            states = served.ask("GET", f"flow_run_states/?flow_run_id={one['id']}")
            assert states[-1]["type"] == "COMPLETED"
        started = time.monotonic()
        assert re.fullmatch(r"\d+ processes stopped\n", served.down())
        assert time.monotonic() - started < 30
        served.assert_nothing_runs()
        assert served.states()
        time.sleep(SILENT)  # so that Prefect's server begins with a run that has been silent for too long
        page = served.up(**env)
    for part in (served.prefect, served.mlflow, "scratch/services/", "-m pipelines down", "-m pipelines ui docs"):
        assert part in page
    (line,) = re.findall(r"^export .*", page, re.MULTILINE)
    assert {f"PREFECT_API_URL={served.prefect}/api", f"MLFLOW_TRACKING_URI={served.mlflow}"} <= set(line.split())
    run = served.wait(run_id)
    assert (run["state_type"], run["run_count"]) == ("COMPLETED", 2), served.log(run_id)
    assert "resuming at step" in served.log(run_id)
    after = {name: one["schedules"] for name, one in served.deployments().items()}
    assert [after[name] == before_up[name] for name in ("nightly", "watch-data", "collect")] == [True, True, False]
    assert own_time.items() <= after["nightly"][0]["schedule"].items()
    assert [schedule["active"] for schedule in after["collect"]] == [False]
    off = [one["name"] for one in served.ask("POST", "automations/filter") if not one["enabled"]]
    assert off == ["on-data-change__automation_1"]
    assert f"Run        {run['name']}: it was interrupted and goes on from its last state" in page
    assert [one for one in told(hook)[before:] if one["state"] != "Crashed"] == []


def sleep_until(moment):
    time.sleep(max(0, (moment - datetime.now(UTC)).total_seconds()))


def test_two_projects_side_by_side_and_one_at_another_address(served, tmp_path):
    served.wait_until(lambda: not served.processes("DETR_SERVICES", "prefect.engine"), what="the end of the last run")
    here, before = free_port(), {process.pid for process in find_marked(served.project)}
    other, url = quick_project(tmp_path), f"http://127.0.0.2:{here}"
    try:
        asked = ("--prefect-port", str(free_port()), "--mlflow-port", str(here), "--host", "127.0.0.2")
        page = call(other, *PYTHON, "pipelines", "up", *asked, MLFLOW_SERVER_ALLOWED_HOSTS="proxy.example")
        for host, code in ((f"127.0.0.2:{here}", 200), ("proxy.example", 200), ("elsewhere", 403)):
            path = f"{url}/api/2.0/mlflow/experiments/search?max_results=1"
            assert requests.get(path, headers={"Host": host}, timeout=300).status_code == code, host
        assert "Who reaches 127.0.0.2 can read everything" in page
        assert {ip for ip, _ in listeners(other, "prefect", "mlflow")} == {"127.0.0.2"}
        assert {ip for ip, _ in listeners(other, "worker")} <= {"127.0.0.1"}  # through which it tells runs to end
        search = f"{url}/ajax-api/2.0/mlflow/experiments/search"  # as MLflow's page does
        for origin, code in ((url, 200), ("http://elsewhere", 403)):
            answer = requests.post(search, json={"max_results": 1}, headers={"Origin": origin}, timeout=300)
            assert answer.status_code == code
        (prefect,) = re.findall(r"^Prefect +(\S+)", page, re.MULTILINE)
        for origin, expected in ((prefect, True), ("http://elsewhere", False)):
            assert answers_page(f"{prefect}/api/flow_runs/filter", origin) is expected
        assert requests.get(f"{prefect}/ui-settings", timeout=300).json()["api_url"] == f"{prefect}/api"
    finally:
        call(other, *PYTHON, "pipelines", "down")
    assert find_marked(other) == []
    assert {process.pid for process in find_marked(served.project)} >= before


def test_down_and_up_after_kills(served, env):
    served.kill_services("mlflow")
    served.down()
    served.assert_nothing_runs()
    assert served.down() == "0 processes stopped\n"
    served.up(**env)
    served.kill_services()
    served.up(**env)
    assert served.ask("GET", "health") is True
    assert len(served.deployments()) == 6
    served.kill_services()
    served.down()
    served.assert_nothing_runs()


def test_a_server_that_does_not_start_leaves_nothing_running(served):
    served.down()
    said = served.up(code=1, MLFLOW_BACKEND_STORE_URI="sqlite:////dev/null/mlflow.db")
    assert said.startswith(f"error: {served.mlflow}/health does not answer")
    assert "scratch/services/mlflow.log" in said
    served.assert_nothing_runs()
