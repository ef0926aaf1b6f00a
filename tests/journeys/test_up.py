"""`up` and `down`: what they say, what goes on after them, and what they leave running where something is wrong: nothing."""

import re
import signal
import socket
import subprocess
import time

import pytest

from pipelines.retraining.services import find_log, find_marked, start, wait_for
from tests.orchestra import connections
from tests.projects import quick_project
from tests.running import call, environment, free_port

pytestmark = pytest.mark.xdist_group("servers")
PYTHON = "python", "-m"


def test_up_says_where_everything_is_and_the_printed_command_runs_a_deployment(served):
    page = served.pages[-1]
    for part in (served.prefect, served.mlflow, "scratch/services/", "-m pipelines down", "-m pipelines ui docs"):
        assert part in page
    (line,) = re.findall(r"^export (.*)", page, re.MULTILINE)
    assert {f"PREFECT_API_URL={served.prefect}/api", f"MLFLOW_TRACKING_URI={served.mlflow}"} <= set(line.split())
    exported = dict(pair.split("=", 1) for pair in line.split())
    (command,) = re.findall(r"^\S+ -m (prefect deployment run .*) --watch$", page, re.MULTILINE)
    said = call(
        served.project, "bash", "-c", f"python -m {command.replace('train.epochs=4', 'train.epochz=4')}", **exported
    )
    assert "train.epochz=4" in said
    (run,) = [run for run in served.runs() if run["parameters"].get("overrides") == ["train.epochz=4"]]
    served.wait(run["id"])


def test_down_or_killed_in_a_training_it_goes_on_with_the_next_up_as_a_person_left_it(served, env, outside):
    """More of it, without a warm interpreter: tests/slow/test_up_and_down.py and test_retrain_faults.py."""
    nightly = served.deployments()["nightly"]
    own_time = {"cron": "0 4 29 2 *", "timezone": "Europe/Berlin"}
    schedule = f"deployments/{nightly['id']}/schedules/{nightly['schedules'][0]['id']}"
    served.ask("PATCH", schedule, active=True, schedule=own_time)
    chosen = served.deployments()["nightly"]["schedules"]
    trigger = dict(served.automations())["on-data-change__automation_1"]
    served.ask("PATCH", f"automations/{trigger}", enabled=False)
    with connections(served.project) as found:
        with served.held("train.epochs=2", "train.seed=20") as run_id:
            served.kill(words="prefect server")
            served.kill(words="prefect worker")
            assert served.processes("DETR_WORKTREE")  # the training outlives them
            assert re.fullmatch(r"\d+ processes stopped\n", served.down())
            served.assert_nothing_runs()
            assert served.states()
            first = served.up(**env)
            assert served.deployments()["nightly"]["schedules"] == chosen
            off = [one for one in served.ask("POST", "automations/filter") if not one["enabled"]]
            assert [one["name"] for one in off] == ["on-data-change__automation_1"]
            served.ask("PATCH", f"automations/{off[0]['id']}", enabled=True)
            served.ask("PATCH", schedule, active=False)
            served.wait_until(lambda: "resuming at step 5" in served.log(run_id), what="the training")
            served.kill()
            served.assert_nothing_runs()
            second = served.up(**env)
        served.completed(run_id)
    run = served.run(run_id)
    for page in (first, second):
        assert f"Run        {run['name']}: it was interrupted and goes on from its last state" in page
    assert run["run_count"] == 3
    (again,) = served.deployments()["nightly"]["schedules"]
    assert (again["schedule"]["cron"], again["active"]) == ("0 2 * * *", False)
    assert found == set()
    assert outside[1] == []
    served.assert_sound()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project for which nothing runs."""
    return quick_project(tmp_path_factory.mktemp("project"))


@pytest.mark.parametrize("option", ["--prefect-port", "--mlflow-port"])
def test_a_busy_port_is_one_line_and_leaves_nothing_running(project, option):
    ports = {"--prefect-port": free_port(), "--mlflow-port": free_port()}
    asked = [str(word) for pair in ports.items() for word in pair]
    with socket.create_server(("127.0.0.1", ports[option])):
        said = call(project, *PYTHON, "pipelines", "up", *asked, code=1)
        port = ports.pop(option)
        assert (
            said == f"error: port {port} is in use; stop what listens there, or choose another: {option} {port + 1}\n"
        )
        assert find_marked(project) == []
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", *ports.values()))


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("0.0.0.0", "error: --host is '0.0.0.0', which is no address to call"),
        ("192.0.2.77", "error: cannot listen on 192.0.2.77:"),
    ],
)
def test_a_host_that_cannot_be(project, host, said):
    ports = ("--prefect-port", str(free_port()), "--mlflow-port", str(free_port()))
    assert call(project, *PYTHON, "pipelines", "up", *ports, "--host", host, code=1).startswith(said)
    assert find_marked(project) == []


def test_down_stops_what_is_of_its_own_project(served, project):
    assert call(project, *PYTHON, "pipelines", "down") == "0 processes stopped\n"
    assert served.ask("GET", "health") is True


def test_a_signal_leaves_nothing_running(project):
    ports = ("--prefect-port", str(free_port()), "--mlflow-port", str(free_port()))
    with subprocess.Popen([*PYTHON, "pipelines", "up", *ports], cwd=project, env=environment()) as half:
        while len(find_marked(project)) < 2:
            assert half.poll() is None
            time.sleep(0.1)
        half.terminate()
    assert half.returncode == 128 + signal.SIGTERM
    assert find_marked(project) == []


def test_of_a_server_that_does_not_start_the_end_of_its_log_is_told(tmp_path):
    with start(tmp_path, "mlflow", ["this"]) as process:
        log, url = find_log(tmp_path, "mlflow"), f"http://127.0.0.1:{free_port()}/health"
        with pytest.raises(RuntimeError, match=re.escape(f"{url} does not answer; the end of {log}: ")) as caught:
            wait_for(url, process, log)
    assert str(caught.value).endswith("let's do more of those!")
