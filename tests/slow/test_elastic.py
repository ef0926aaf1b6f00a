"""Several hosts: network namespaces with addresses of their own, one of which dies and comes back."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time

import pytest

from benchmarks.kill_resume import prepare
from detr.checkpoint import load_state
from pipelines.params import read_yaml, to_yaml
from tests.running import ROOT, environment

HOSTS = {"detr-one": "10.213.0.1", "detr-two": "10.213.0.2"}
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip"),
    reason="network namespaces need root and iproute2: sudo, apt-get install iproute2",
)


def ip(*arguments, check=True):
    subprocess.run(["ip", *arguments], check=check, capture_output=not check)


@pytest.fixture
def hosts():
    """Two network namespaces that see each other and nothing else."""

    def remove():
        for name in HOSTS:
            ip("netns", "delete", name, check=False)

    remove()
    try:
        for name in HOSTS:
            ip("netns", "add", name)
        one, two = HOSTS
        ip("link", "add", "eth1", "netns", one, "type", "veth", "peer", "name", "eth1", "netns", two)
        for name, address in HOSTS.items():
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth1")
            for link in ("lo", "eth1"):
                ip("-n", name, "link", "set", link, "up")
        yield HOSTS
    finally:
        remove()


def start(folder, host):
    """The stage's command on a host, as a person types it on each; None is this machine alone."""
    env = environment(cold=True, PYTHONPATH=str(ROOT), MLFLOW_TRACKING_URI="http://127.0.0.1:9", PET_NPROC_PER_NODE="1")
    command = ["python", "-m", "pipelines.train"]
    if host:
        command = ["ip", "netns", "exec", host, *command]
        env |= {
            "PET_NNODES": "1:2",
            "PET_RDZV_ENDPOINT": f"{HOSTS['detr-one']}:29400",
            "PET_RDZV_CONF": f"is_host={int(host == 'detr-one')},last_call_timeout=3",  # there are no names to tell it by
            "PET_LOCAL_ADDR": HOSTS[host],
            "PET_MONITOR_INTERVAL": "0.5",
            "GLOO_SOCKET_IFNAME": "eth1",
        }
    with (folder / f"log-{host}").open("a", encoding="utf-8") as log:
        return subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)


def said(folder):
    """The first lines of all trainings so far, in the order in which they began, and what else the hosts said."""
    text = "".join(
        (folder / f"log-{host}").read_text(encoding="utf-8") for host in HOSTS if (folder / f"log-{host}").exists()
    )
    return [line for line in text.splitlines() if line.startswith("train ")], text


def wait_for(reached, running):
    while not reached():  # until the time of the test is over
        assert all(process.poll() is None for process in running), "a host ended"
        time.sleep(0.05)


def step_of(folder):
    for path in folder.glob("scratch/*/timings.jsonl"):
        lines = path.read_text(encoding="utf-8").splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    return 0


def history_of(folder):
    """The history in the newest state; a kill may have left it under its previous name alone."""
    (lock,) = folder.glob("scratch/*/lock")
    return load_state(lock.with_name("state"))["history"]


def test_a_host_dies_the_rest_goes_on_and_it_joins_again(hosts, tmp_path):
    prepare(tmp_path, epochs=1000)
    document = read_yaml(tmp_path / "params.yaml")
    document["train"] |= {"evaluate_epochs": 0, "keep": "last", "log_steps": 1, "checkpoint_minutes": 0.0}
    (tmp_path / "params.yaml").write_text(to_yaml(document), encoding="utf-8")
    running = {host: start(tmp_path, host) for host in hosts}

    def begun(how):
        return [line for line in said(tmp_path)[0] if how in line]

    def goes_on():
        before = step_of(tmp_path)
        wait_for(lambda: step_of(tmp_path) > before + 5, running.values())

    try:
        wait_for(lambda: begun("starting with 2 processes"), running.values())
        goes_on()
        victim = running.pop("detr-two")
        os.killpg(victim.pid, signal.SIGKILL)
        victim.wait()
        wait_for(lambda: begun("with 1 processes on cpu, not 2 as before"), running.values())
        goes_on()
        running["detr-two"] = start(tmp_path, "detr-two")
        wait_for(lambda: begun("with 2 processes on cpu, not 1 as before"), running.values())
        goes_on()
    except AssertionError as error:
        raise AssertionError(said(tmp_path)[1]) from error
    finally:
        for process in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    rows = history_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))

    alone = tmp_path / "alone"
    shutil.copytree(tmp_path, alone, ignore=shutil.ignore_patterns("scratch", "alone", "log*"))
    process = start(alone, None)
    try:
        wait_for(lambda: step_of(alone) >= len(rows), [process])
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for row, other in zip(rows, history_of(alone), strict=False):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3), row["step"]
