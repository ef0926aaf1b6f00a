"""`up` and `down`, the deployments and the automations, with the real servers of a small project."""

import contextlib
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from ipaddress import ip_address

import psutil
import pytest
import requests

from pipelines.params import read_yaml
from pipelines.services import MARK, SERVICE, environment, marked, past_proxies
from pipelines.stage import QUIET
from tests.conftest import ROOT, call, free_port, small_project
from tests.conftest import environment as shell
from tests.orchestra import answers_page, listening, services

SECRET = "T0-7hf93kd8-secret"
SILENT = 45  # seconds; heartbeats come every 30
TRAINING = ["train.epochs=12"]
PYTHON = "python", "-m"


@pytest.fixture(scope="module")
def hook():
    with listening() as found:
        yield found


@pytest.fixture(scope="module")
def outside():
    """Where every request to an address that is not loopback goes, by the variables of a proxy."""
    with listening() as found:
        yield found


@pytest.fixture(scope="module")
def env(hook, outside):
    proxy = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), outside[0])
    return proxy | {"DETR_WEBHOOK_URL": f"{hook[0]}/{SECRET}", "DETR_SILENT_SECONDS": str(SILENT)}


@pytest.fixture(scope="module")
def served(tmp_path_factory, env):
    """A small project with its servers and worker. Tests in this module use it in turn."""
    project = small_project(tmp_path_factory.mktemp("services"))
    with services(project, **env) as found:
        yield found


@pytest.fixture(scope="module")
def connections(served):
    """The addresses that processes of the project have been connected to since."""
    found, stop = set(), threading.Event()

    def look():
        while not stop.wait(0.5):
            for process in marked(served.project):
                with contextlib.suppress(psutil.Error):
                    found.update(c.raddr.ip for c in process.net_connections("inet") if c.raddr)

    thread = threading.Thread(target=look)
    thread.start()
    yield found
    stop.set()
    thread.join()


def ports(served):
    return [address.rpartition(":")[2] for address in (served.prefect, served.mlflow)]


def up(project, prefect_port, mlflow_port, *options, code=0, **env):
    arguments = ("--prefect-port", str(prefect_port), "--mlflow-port", str(mlflow_port), *options)
    return call(project, *PYTHON, "pipelines", "up", *arguments, code=code, **env)


def is_open(port, host="127.0.0.1"):
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def assert_nothing_runs(served):
    assert [" ".join(process.cmdline()) for process in marked(served.project)] == []
    assert not [port for port in ports(served) if is_open(port)]


def listeners(project, *services):
    processes = (one for one in marked(project) if not services or environment(one)[SERVICE] in services)
    found = (process.net_connections("inet") for process in processes)
    return {(c.laddr.ip, str(c.laddr.port)) for of in found for c in of if c.status == psutil.CONN_LISTEN}


def kill(processes):
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=30)


def start_training(served, *more):
    """A run that has a state to go on from."""
    run_id = served.start("retrain/on-demand", overrides=[*TRAINING, *more])
    served.wait_until(lambda: list(served.project.glob("scratch/*/state")), what="a state of the training")
    return run_id


def told(hook):
    return [json.loads(body) for _, _, body in hook[1]]


def deployments(served):
    return {one["name"]: one for one in served.ask("POST", "deployments/filter")}


def automations(served):
    return sorted((one["name"], one["id"]) for one in served.ask("POST", "automations/filter"))


def test_it_listens_on_loopback_only_and_runs_what_is_needed(served):
    found = listeners(served.project)
    assert {ip for ip, _ in found} == {"127.0.0.1"}
    assert set(ports(served)) <= {port for _, port in found}
    processes = marked(served.project)
    assert {environment(process)[SERVICE] for process in processes} == {"prefect", "mlflow", "worker"}
    lines = [" ".join(process.cmdline()) for process in processes]
    assert not [line for line in lines if "huey" in line or "mlflow.server.jobs" in line]


def test_telemetry_is_off_in_every_process(served):
    for process in marked(served.project):
        assert QUIET.items() <= environment(process).items(), process.cmdline()


def test_a_page_that_a_person_visits_cannot_call_the_server(served):
    deployment = deployments(served)["on-demand"]["id"]
    start = f"{served.prefect}/api/deployments/{deployment}/create_flow_run"
    port = served.prefect.rpartition(":")[2]
    for origin, expected in ((served.prefect, True), (f"http://localhost:{port}", True), ("http://elsewhere", False)):
        assert answers_page(start, origin) is expected, origin
    before = served.runs()
    simple = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "")  # not asked for first
    for kind in simple:
        headers = {"Origin": "http://elsewhere", "Content-Type": kind}
        assert requests.post(start, data='{"parameters": {}}', headers=headers, timeout=30).status_code >= 400, kind
    assert served.runs() == before


def test_the_deployments_are_those_of_prefect_yaml_and_stay_one_each(served, env):
    before, automated = deployments(served), automations(served)
    flows = {one["id"]: one["name"] for one in served.ask("POST", "flows/filter")}
    assert {name: flows[one["flow_id"]] for name, one in before.items()} == {
        **dict.fromkeys(("on-demand", "nightly", "on-data-change", "coco"), "retrain"),
        "watch-data": "watch-data",
        "collect": "collect",
    }
    assert [name for name, _ in automated] == [
        "A silent run has crashed",
        "Failures are told",
        "on-data-change__automation_1",
    ]
    assert before["coco"]["parameters"] == {"preset": "coco-detr-r50"}
    assert (ROOT / "presets/coco-detr-r50.yaml").exists()
    for name, one in before.items():
        path, _, function = one["entrypoint"].partition(":")
        assert f"def {function}(" in (ROOT / path).read_text()
        assert one["parameters"].keys() <= one["parameter_openapi_schema"]["properties"].keys()
        assert one["enforce_parameter_schema"]
        assert not [schedule for schedule in one["schedules"] if schedule["active"]]
        assert bool(one["schedules"]) == (name in ("nightly", "watch-data", "collect"))
        assert one["pull_steps"] == [
            {"prefect.deployments.steps.set_working_directory": {"directory": str(served.project)}}
        ]
        assert one["work_queue_name"] == ("default" if name == "watch-data" else "training")

    api = {"PREFECT_API_URL": f"{served.prefect}/api", "NO_PROXY": "127.0.0.1"}  # what a team types
    call(served.project, *PYTHON, "pipelines", "automate", **env, **api)
    call(served.project, "prefect", "--no-prompt", "deploy", "--all", **api)
    assert {name: one["id"] for name, one in deployments(served).items()} == {
        name: one["id"] for name, one in before.items()
    }
    assert [name for name, _ in automations(served)] == [name for name, _ in automated]
    queues = served.ask("POST", "work_pools/detr/queues/filter")
    assert {one["name"]: one["concurrency_limit"] for one in queues} == {"default": None, "training": 1}


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"PREFECT_API_URL": ""}, "error: PREFECT_API_URL is not set: which server? `make up` prints its own\n"),
        ({"DETR_SILENT_SECONDS": "3m"}, "error: DETR_SILENT_SECONDS is '3m'; heartbeats come every 30 seconds"),
        ({"DETR_SILENT_SECONDS": "30"}, "error: DETR_SILENT_SECONDS is '30'; heartbeats come every 30 seconds"),
    ],
)
def test_what_automate_needs_is_asked_for(tmp_path, env, said):
    """Without an address Prefect would start a server of its own, and all would be gone with it."""
    assert call(
        ROOT, *PYTHON, "pipelines", "automate", "--deploy", code=1, PREFECT_HOME=str(tmp_path), **env
    ).startswith(said)
    assert not (tmp_path / "prefect.db").exists()


def test_the_form_says_what_each_parameter_is(served):
    schema = deployments(served)["on-demand"]["parameter_openapi_schema"]["properties"]
    assert sorted(schema, key=lambda name: schema[name]["position"])[:2] == ["preset", "overrides"]
    for one in schema.values():
        assert one["title"]
        assert one["description"]
        assert "default" in one
    assert schema["preset"]["enum"] == ["none", *sorted(path.stem for path in (ROOT / "presets").glob("*.yaml"))]


@pytest.mark.parametrize(
    "nonsense",
    [
        {"preset": "coco-detr-r500"},
        {"overrides": ["train.epochs"]},
        {"overrides": ["epochs=3"]},
        {"overrides": "train.epochs=3"},
        {"ref": "--upload-pack=x"},
        {"promote": "perhaps"},
        {"note": "x" * 1001},
    ],
    ids=lambda nonsense: next(iter(nonsense)),
)
def test_the_api_refuses_nonsense(served, nonsense):
    with pytest.raises(requests.HTTPError, match=r"^(409|422)"):
        served.start("retrain/on-demand", **nonsense)


def test_failures_are_told_once_as_json_and_successes_are_not(served, hook):
    run_id = served.start("retrain/on-demand", overrides=["train.epochz=1"])
    ended = served.wait(run_id)
    assert ended["state_type"] == "FAILED"
    message = 'He said "no"\nand left \\ <b>'
    others, never = {}, {"scheduled_time": "2100-01-01T00:00:00Z"}  # so that no worker takes them meanwhile
    for name, state in (("watch-data/watch-data", "FAILED"), ("collect/collect", "CRASHED")):
        create = f"deployments/{served.ask('GET', f'deployments/name/{name}')['id']}/create_flow_run"
        others[name] = served.ask("POST", create, state={"type": "SCHEDULED", "state_details": never})["id"]
        state = {"type": state, "name": "TimedOut" if state == "FAILED" else "Crashed", "message": message}
        served.ask("POST", f"flow_runs/{others[name]}/set_state", state=state, force=True)
    completed = served.start("collect/collect")
    served.wait(completed)
    served.wait_until(lambda: len(told(hook)) >= 3, what="the third message")
    time.sleep(5)  # for one too many
    found = {one["flow"]: one for one in told(hook)}
    assert len(told(hook)) == len(found) == 3
    assert found["retrain"] == {
        "flow": "retrain",
        "run": "train.epochz=1",
        "state": "Failed",
        "message": ended["state"]["message"],
        "url": f"{served.prefect}/runs/flow-run/{run_id}",
        "text": f"retrain, train.epochz=1: Failed: {ended['state']['message']} {served.prefect}/runs/flow-run/{run_id}",
    }
    assert "epochz" in found["retrain"]["message"]
    assert requests.get(found["retrain"]["url"], headers={"Accept": "text/html"}, timeout=30).ok
    assert (found["watch-data"]["message"], found["watch-data"]["state"]) == (message, "TimedOut")
    assert (found["collect"]["message"], found["collect"]["state"]) == (message, "Crashed")


def test_a_parameter_that_is_none_fails_the_run(served):
    """Prefect's server takes it, for schemas that Prefect makes are open."""
    run_id = served.start("retrain/on-demand", epochs=3)
    assert served.wait(run_id)["state_type"] in ("FAILED", "CRASHED")
    assert "epochs" in served.log(run_id)


def test_the_address_that_is_told_stays_a_secret(served):
    for process in marked(served.project):
        assert SECRET not in "".join([*process.cmdline(), *environment(process).values()])
    for folder in (".prefect", "scratch"):
        for path in (served.project / folder).rglob("*"):
            assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    for what in ("block_documents", "automations", "events", "logs"):
        assert SECRET not in json.dumps(served.ask("POST", f"{what}/filter"))
    with contextlib.closing(sqlite3.connect(served.project / ".prefect/prefect.db")) as database:
        assert SECRET not in "\n".join(database.iterdump())


def test_down_in_a_training_and_the_next_up_goes_on(served, env, connections, outside, hook):
    before = len(told(hook))
    nightly, look = (deployments(served)[name] for name in ("nightly", "watch-data"))
    own_time = {"cron": "0 4 29 2 *", "timezone": "Europe/Berlin"}
    schedule = f"deployments/{nightly['id']}/schedules/{nightly['schedules'][0]['id']}"
    served.ask("PATCH", schedule, active=True, schedule=own_time)
    own = {"schedule": {"cron": "0 5 29 2 *"}, "active": True, "parameters": {"preset": "photos"}, "slug": "mine"}
    requests.post(f"{served.prefect}/api/deployments/{look['id']}/schedules", json=[own], timeout=30).raise_for_status()
    before_up = {name: one["schedules"] for name, one in deployments(served).items()}
    trigger = dict(automations(served))["on-data-change__automation_1"]
    served.ask("PATCH", f"automations/{trigger}", enabled=False)
    run_id = start_training(served)
    started = time.monotonic()
    assert re.fullmatch(r"\d+ processes stopped\n", call(served.project, *PYTHON, "pipelines", "down"))
    assert time.monotonic() - started < 30
    assert_nothing_runs(served)
    assert list(served.project.glob("scratch/*/state"))

    time.sleep(SILENT)  # so that Prefect's server begins with a run that has been silent for too long
    page = up(served.project, *ports(served), **env)
    for part in (served.prefect, served.mlflow, "scratch/services/", "-m pipelines down", "-m pipelines ui docs"):
        assert part in page
    (line,) = re.findall(r"^export .*", page, re.MULTILINE)
    assert {f"PREFECT_API_URL={served.prefect}/api", f"MLFLOW_TRACKING_URI={served.mlflow}"} <= set(line.split())
    run = served.wait(run_id)
    assert (run["state_type"], run["run_count"]) == ("COMPLETED", 2), served.log(run_id)
    assert "resuming at step" in served.log(run_id)
    after = {name: one["schedules"] for name, one in deployments(served).items()}
    assert [after[name] == before_up[name] for name in ("nightly", "watch-data", "collect")] == [True, True, False]
    assert own_time.items() <= after["nightly"][0]["schedule"].items()
    assert [schedule["active"] for schedule in after["collect"]] == [False]
    off = [one["name"] for one in served.ask("POST", "automations/filter") if not one["enabled"]]
    assert off == ["on-data-change__automation_1"]
    assert f"Run        {run['name']}: it was interrupted and goes on from its last state" in page
    assert [one for one in told(hook)[before:] if one["state"] != "Crashed"] == []
    assert {ip for ip in connections if not ip_address(ip.removeprefix("::ffff:")).is_loopback} == set()
    assert outside[1] == []


def test_the_printed_command_runs_a_deployment(served, env):
    page = up(served.project, *ports(served), **env)
    (line,) = re.findall(r"^export (.*)", page, re.MULTILINE)
    exported = dict(pair.split("=", 1) for pair in line.split())
    (command,) = re.findall(r"^\S+ -m (prefect deployment run .*) --watch$", page, re.MULTILINE)
    said = call(
        served.project, "bash", "-c", f"python -m {command.replace('train.epochs=4', 'train.epochz=4')}", **exported
    )
    assert "train.epochz=4" in said


def test_a_silent_run_has_crashed_and_the_queue_goes_on(served, hook):
    silent = start_training(served, "train.seed=1")
    heartbeat = {"event": {"name": ["prefect.flow-run.heartbeat"]}, "resource": {"id": [f"prefect.flow-run.{silent}"]}}
    served.wait_until(lambda: served.ask("POST", "events/filter", filter=heartbeat)["events"], what="a heartbeat")
    kill([p for p in marked(served.project) if environment(p)[SERVICE] == "worker"])
    waiting = served.start("collect/collect")
    crashed = served.wait(silent)
    assert (crashed["state_type"], crashed["state_name"]) == ("CRASHED", "Crashed")
    assert crashed["state"]["message"].startswith(f"no sign of life for {SILENT} seconds; retry it")
    served.wait_until(lambda: told(hook)[-1]["run"] == crashed["name"], what="a message of the crash")

    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "detr"]
    env = shell(PREFECT_API_URL=f"{served.prefect}/api", MLFLOW_TRACKING_URI=served.mlflow)
    with subprocess.Popen(command, cwd=served.project, env=env | {MARK: str(served.project)}) as worker:
        try:
            assert served.wait(waiting)["state_type"] == "COMPLETED"
            served.ask("POST", f"flow_runs/{silent}/set_state", state={"type": "SCHEDULED", "name": "AwaitingRetry"})
            again = served.wait(silent)
            assert again["state_type"] == "COMPLETED", served.log(silent)
            assert "resuming at step" in served.log(silent)
        finally:
            worker.send_signal(signal.SIGINT)
    time.sleep(SILENT + 5)  # so that what has ended could be taken for silent
    ended = [run for run in served.runs() if run["state_type"] == "COMPLETED"]
    assert {silent, waiting} <= {run["id"] for run in ended}
    for run in ended:
        states = served.ask("GET", f"flow_run_states/?flow_run_id={run['id']}")
        assert states[-1]["type"] == "COMPLETED"


@pytest.mark.parametrize(
    ("variables", "passed"),
    [
        ({}, None),
        ({"NO_PROXY": "here"}, None),
        ({"http_proxy": "http://proxy"}, "127.0.0.1,localhost,name"),
        ({"HTTPS_PROXY": "http://proxy", "NO_PROXY": "here, there"}, "here,there,127.0.0.1,localhost,name"),
        ({"ALL_PROXY": "http://proxy", "no_proxy": "*"}, None),
    ],
)
def test_the_servers_here_are_reached_past_every_kind_of_proxy(monkeypatch, variables, passed):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert past_proxies("name") == ({"NO_PROXY": passed, "no_proxy": passed} if passed else {})


def test_two_projects_side_by_side_and_one_at_another_address(served, tmp_path):
    here, before = free_port(), {process.pid for process in marked(served.project)}
    other, url = small_project(tmp_path), f"http://127.0.0.2:{here}"
    try:
        page = up(other, free_port(), here, "--host", "127.0.0.2", MLFLOW_SERVER_ALLOWED_HOSTS="proxy.example")
        for host, code in ((f"127.0.0.2:{here}", 200), ("proxy.example", 200), ("elsewhere", 403)):
            path = f"{url}/api/2.0/mlflow/experiments/search?max_results=1"
            assert requests.get(path, headers={"Host": host}, timeout=30).status_code == code, host
        assert "Who reaches 127.0.0.2 can read everything" in page
        assert {ip for ip, _ in listeners(other, "prefect", "mlflow")} == {"127.0.0.2"}
        assert {ip for ip, _ in listeners(other, "worker")} <= {"127.0.0.1"}  # through which it tells runs to end
        search = f"{url}/ajax-api/2.0/mlflow/experiments/search"  # as MLflow's page does
        for origin, code in ((url, 200), ("http://elsewhere", 403)):
            assert (
                requests.post(search, json={"max_results": 1}, headers={"Origin": origin}, timeout=30).status_code
                == code
            )
        (prefect,) = re.findall(r"^Prefect +(\S+)", page, re.MULTILINE)
        for origin, expected in ((prefect, True), ("http://elsewhere", False)):
            assert answers_page(f"{prefect}/api/flow_runs/filter", origin) is expected
        assert requests.get(f"{prefect}/ui-settings", timeout=30).json()["api_url"] == f"{prefect}/api"
    finally:
        call(other, *PYTHON, "pipelines", "down")
    assert marked(other) == []
    assert {process.pid for process in marked(served.project)} >= before


def test_down_and_up_after_kills(served, env):
    kill([p for p in marked(served.project) if environment(p)[SERVICE] == "mlflow"])
    call(served.project, *PYTHON, "pipelines", "down")
    assert_nothing_runs(served)
    assert call(served.project, *PYTHON, "pipelines", "down") == "0 processes stopped\n"
    up(served.project, *ports(served), **env)
    kill(marked(served.project))
    up(served.project, *ports(served), **env)
    assert served.ask("GET", "health") is True
    assert len(deployments(served)) == 6
    kill(marked(served.project))
    call(served.project, *PYTHON, "pipelines", "down")
    assert_nothing_runs(served)


def test_what_was_registered_with_a_server_can_be_used_without(served):
    call(served.project, *PYTHON, "pipelines", "predict", str(ROOT / "docs"), "--threshold", "0")
    assert (served.project / "scratch/predictions/detections.json").exists()


@pytest.mark.parametrize("which", [0, 1])
def test_a_busy_port_is_one_line_and_leaves_nothing_running(served, which):
    call(served.project, *PYTHON, "pipelines", "down")
    port = int(ports(served)[which])
    with socket.create_server(("127.0.0.1", port)):
        said = up(served.project, *ports(served), code=1)
        option = ("--prefect-port", "--mlflow-port")[which]
        assert (
            said == f"error: port {port} is in use; stop what listens there, or choose another: {option} {port + 1}\n"
        )
        assert marked(served.project) == []
    assert_nothing_runs(served)


def test_a_server_that_does_not_start_and_a_signal_leave_nothing_running(served):
    store = {"MLFLOW_BACKEND_STORE_URI": "sqlite:////dev/null/mlflow.db"}
    said = up(served.project, *ports(served), code=1, **store)
    assert said.startswith(f"error: {served.mlflow}/health does not answer")
    assert "scratch/services/mlflow.log" in said
    assert_nothing_runs(served)
    command = [
        sys.executable,
        "-m",
        "pipelines",
        "up",
        "--prefect-port",
        ports(served)[0],
        "--mlflow-port",
        ports(served)[1],
    ]
    with subprocess.Popen(command, cwd=served.project, env=shell()) as half:
        served.wait_until(lambda: len(marked(served.project)) >= 2, what="a server")
        half.terminate()
    assert half.returncode == 128 + signal.SIGTERM
    assert_nothing_runs(served)


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("0.0.0.0", "error: --host is '0.0.0.0', which is no address to call"),
        ("192.0.2.77", "error: cannot listen on 192.0.2.77:"),
    ],
)
def test_a_host_that_cannot_be(served, host, said):
    assert up(served.project, *ports(served), "--host", host, code=1).startswith(said)


def test_every_schedule_and_trigger_is_as_the_file_says():
    declared = {one["name"]: one for one in read_yaml(ROOT / "prefect.yaml")["deployments"]}
    crons = {name: one["schedules"][0]["cron"] for name, one in declared.items() if "schedules" in one}
    assert crons == {"nightly": "0 2 * * *", "watch-data": "*/15 * * * *", "collect": "0 5 * * 0"}
    assert os.environ["DO_NOT_TRACK"] == "true"
