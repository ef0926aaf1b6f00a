"""What runs after `up`: the servers, the deployments, the automations, and who is told of failures."""

import contextlib
import json
import os
import sqlite3

import pytest
import requests

from pipelines.params import read_yaml
from pipelines.retraining.services import SERVICE, bypass_proxies, find_marked
from pipelines.surroundings import QUIET
from pipelines.workspace.processes import read_environment
from tests.orchestra import answers_page, listeners
from tests.running import ROOT, call

pytestmark = pytest.mark.xdist_group("servers")
PYTHON = "python", "-m"


def told(hook):
    return [json.loads(body) for _, _, body in hook[1]]


def test_it_listens_on_loopback_only_and_runs_what_is_needed(served):
    found = listeners(served.project)
    assert {ip for ip, _ in found} == {"127.0.0.1"}
    assert set(served.ports) <= {port for _, port in found}
    processes = find_marked(served.project)
    assert {read_environment(process)[SERVICE] for process in processes} == {"prefect", "mlflow", "worker"}
    lines = [" ".join(process.cmdline()) for process in processes]
    assert not [line for line in lines if "huey" in line or "mlflow.server.jobs" in line]


def test_telemetry_is_off_in_every_process(served):
    for process in find_marked(served.project):
        held = {name: value.lower() for name, value in read_environment(process).items()}  # Prefect may write "False"
        assert QUIET.items() <= held.items(), process.cmdline()


def test_a_page_that_a_person_visits_cannot_call_the_server(served):
    deployment = served.deployments()["on-demand"]["id"]
    start = f"{served.prefect}/api/deployments/{deployment}/create_flow_run"
    port = served.prefect.rpartition(":")[2]
    for origin, expected in ((served.prefect, True), (f"http://localhost:{port}", True), ("http://elsewhere", False)):
        assert answers_page(start, origin) is expected, origin
    before = served.runs()
    simple = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "")  # not asked for first
    for kind in simple:
        headers = {"Origin": "http://elsewhere", "Content-Type": kind}
        assert requests.post(start, data='{"parameters": {}}', headers=headers, timeout=300).status_code >= 400, kind
    assert served.runs() == before


def test_the_deployments_are_those_of_prefect_yaml_and_stay_one_each(served, env):
    before, automated = served.deployments(), served.automations()
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
        module, _, function = one["entrypoint"].rpartition(".")
        assert f"def {function}(" in ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
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
    assert {name: one["id"] for name, one in served.deployments().items()} == {
        name: one["id"] for name, one in before.items()
    }
    assert [name for name, _ in served.automations()] == [name for name, _ in automated]
    queues = served.ask("POST", "work_pools/detr/queues/filter")
    assert {one["name"]: one["concurrency_limit"] for one in queues} == {"default": None, "training": 1}


def test_a_run_that_is_silent_for_three_minutes_is_to_crash(served):
    """That it does, after fewer: tests/slow/test_up_and_down.py."""
    (silent,) = [one for one in served.ask("POST", "automations/filter") if one["name"] == "A silent run has crashed"]
    assert silent["enabled"]
    assert (silent["trigger"]["posture"], silent["trigger"]["within"]) == ("Proactive", 180)
    assert silent["trigger"]["after"] == ["prefect.flow-run.heartbeat"]
    (action,) = silent["actions"]
    assert (action["type"], action["state"]) == ("change-flow-run-state", "CRASHED")
    assert action["message"].startswith("no sign of life for 180 seconds; retry it")


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
    schema = served.deployments()["on-demand"]["parameter_openapi_schema"]["properties"]
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
    before = len(told(hook))
    run_id = served.start("retrain/on-demand", overrides=["train.epochz=1"])
    completed = served.start("collect/collect", keep_days=365)
    ended = served.wait(run_id)
    assert ended["state_type"] == "FAILED"
    assert served.wait(completed)["state_type"] == "COMPLETED"
    message, urls = 'He said "no"\nand left \\ <b>', {}
    others = (("watch-data/watch-data", "FAILED"), ("collect/collect", "CRASHED"), ("retrain/nightly", "FAILED"))
    for name, state in others:
        url = told_of(served, name, state, message)
        served.wait_until(lambda url=url: url in [one["url"] for one in told(hook)], what=f"a message of {name}")
        urls[name] = url
    new = told(hook)[before:]  # the last one came after all that could be one too many
    found = {one["url"]: one for one in new}
    url = f"{served.prefect}/runs/flow-run/{run_id}"
    assert len(new) == len(found) == 4
    assert found.keys() == {url, *urls.values()}
    assert found[url] == {
        "flow": "retrain",
        "run": "train.epochz=1",
        "state": "Failed",
        "message": ended["state"]["message"],
        "url": url,
        "text": f"retrain, train.epochz=1: Failed: {ended['state']['message']} {url}",
    }
    assert "epochz" in found[url]["message"]
    assert requests.get(url, headers={"Accept": "text/html"}, timeout=300).ok
    looked, collected = (found[urls[name]] for name in ("watch-data/watch-data", "collect/collect"))
    assert (looked["flow"], looked["message"], looked["state"]) == ("watch-data", message, "TimedOut")
    assert (collected["flow"], collected["message"], collected["state"]) == ("collect", message, "Crashed")


def told_of(served, name, state, message):
    """The address of a new run that has failed or crashed, and that no worker has taken."""
    never = {"scheduled_time": "2100-01-01T00:00:00Z"}
    create = f"deployments/{served.ask('GET', f'deployments/name/{name}')['id']}/create_flow_run"
    run_id = served.ask("POST", create, state={"type": "SCHEDULED", "state_details": never})["id"]
    state = {"type": state, "name": "TimedOut" if state == "FAILED" else "Crashed", "message": message}
    served.ask("POST", f"flow_runs/{run_id}/set_state", state=state, force=True)
    return f"{served.prefect}/runs/flow-run/{run_id}"


def test_a_parameter_that_is_none_fails_the_run(served):
    """Prefect's server takes it, for schemas that Prefect makes are open."""
    run_id = served.start("retrain/on-demand", epochs=3)
    assert served.wait(run_id)["state_type"] in ("FAILED", "CRASHED")
    assert "epochs" in served.log(run_id)


def test_the_address_that_is_told_stays_a_secret(served, hook):
    secret = hook[0].rpartition("/")[2]
    for process in find_marked(served.project):
        assert secret not in "".join([*process.cmdline(), *read_environment(process).values()])
    for folder in (".prefect", "scratch"):
        for path in (served.project / folder).rglob("*"):
            assert not path.is_file() or secret.encode() not in path.read_bytes(), path
    for what in ("block_documents", "automations", "events", "logs"):
        assert secret not in json.dumps(served.ask("POST", f"{what}/filter"))
    with contextlib.closing(sqlite3.connect(served.project / ".prefect/prefect.db")) as database:
        assert secret not in "\n".join(database.iterdump())


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
    assert bypass_proxies("name") == ({"NO_PROXY": passed, "no_proxy": passed} if passed else {})


def test_every_schedule_and_trigger_is_as_the_file_says():
    declared = {one["name"]: one for one in read_yaml(ROOT / "prefect.yaml")["deployments"]}
    crons = {name: one["schedules"][0]["cron"] for name, one in declared.items() if "schedules" in one}
    assert crons == {"nightly": "0 2 * * *", "watch-data": "*/15 * * * *", "collect": "0 5 * * 0"}
    assert os.environ["DO_NOT_TRACK"] == "true"
