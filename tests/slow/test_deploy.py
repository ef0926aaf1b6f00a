"""What deploy/ submits, run here: its commands are real, small executables stand in for Slurm and the operator."""

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from operator import itemgetter

import pytest
from prefect.workers.base import BaseJobConfiguration
from ruamel.yaml import YAML

from tests.projects import small_project
from tests.running import ROOT, call, environment, free_port

DEPLOY = ROOT / "deploy"
DVC = "python -m dvc --wait-for-lock"
TEMPLATE = json.loads((DEPLOY / "prefect-kubernetes.json").read_text(encoding="utf-8"))
TRAINING, _ = YAML(typ="safe").load_all(DEPLOY / "pytorchjob.yaml")
REGISTER = YAML(typ="safe").load(DEPLOY / "register-job.yaml")
WORKER = TRAINING["spec"]["pytorchReplicaSpecs"]["Worker"]
STAND_INS = {
    "scontrol": """
        [[ $1 == show ]] && printf 'localhost\\nlocalhost\\n' || echo "$*" >> "$SEEN" """,
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" & tasks+=($!); done
        echo "${tasks[@]}" > "$TASKS"
        highest=0
        for task in "${tasks[@]}"; do wait "$task"; code=$?; ((code > highest)) && highest=$code; done
        exit "$highest" """,
}


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    """A small project with MLflow's database, whose data the init container of the pods has made. Copy it."""
    overrides = ("train.epochs=4", "train.evaluate_epochs=0", "evaluate.num_pictures=0")
    project = small_project(tmp_path_factory.mktemp("validated"), *overrides)
    call(project, *command(WORKER["template"]["spec"]["initContainers"][0]))
    call(project, "python", "-c", "from pipelines.registry.tracking import connect; connect()")
    return project


@pytest.fixture
def project(validated, tmp_path):
    return shutil.copytree(validated, tmp_path / "project", symlinks=True)


def command(container):
    return [*container["command"], *container.get("args", [])]


def free_job():
    """A number of a job whose port for the rendezvous, which slurm.sh makes of it, is free."""
    for number in random.sample(range(10_000), 10_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", 20_000 + number))
            return str(number)
    raise OSError("no port from 20000 to 29999 is free")


def wait_for(condition, process):
    while not (found := condition()):
        assert process.poll() is None, f"ended with {process.returncode}"
        time.sleep(0.05)
    return found


def test_a_slurm_job_that_is_stopped_queues_again_and_goes_on_to_a_registered_model(project, tmp_path):
    for name, body in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash{body}\n", encoding="utf-8")
        path.chmod(0o755)
    tasks, seen = tmp_path / "tasks", tmp_path / "seen"
    number = free_job()
    nodes = {"PET_NPROC_PER_NODE": "1", "SLURM_JOB_ID": number, "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}

    def env(cold):
        found = environment(cold, **nodes, TASKS=str(tasks), SEEN=str(seen))
        return found | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{found['PATH']}"}

    job = ["bash", str(DEPLOY / "slurm.sh")]

    with subprocess.Popen(
        job, cwd=project, env=env(cold=True), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
    ) as first:
        wait_for(lambda: list(project.glob("scratch/*/state")), first)
        for task in tasks.read_text(encoding="utf-8").split():  # as Slurm does: the tasks, not what they started
            os.kill(int(task), signal.SIGTERM)
        said = first.communicate()[0]
    assert first.returncode == 75, said
    assert seen.read_text(encoding="utf-8") == f"requeue {number}\n"

    again = subprocess.run(
        job, cwd=project, env=env(cold=False), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
    )
    assert again.returncode == 0, again.stdout
    assert "resuming at step" in again.stdout
    assert "2 processes on" in again.stdout
    assert (project / "artifacts/train/model.safetensors").stat().st_size > 0
    assert json.loads((project / "artifacts/register/version.json").read_text(encoding="utf-8"))["version"]
    assert call(project, "python", "-m", "dvc", "status", "train", "evaluate") == "Data and pipelines are up to date.\n"


def test_the_pods_train_together_and_dvc_takes_their_outputs(project):
    policy = TRAINING["spec"]["elasticPolicy"] | {"minReplicas": 2, "maxReplicas": 2}
    set_by_the_operator = {
        "PYTHONUNBUFFERED": "0",
        "PET_RDZV_ENDPOINT": f"localhost:{free_port()}",
        "PET_RDZV_BACKEND": policy["rdzvBackend"],
        "PET_NNODES": f"{policy['minReplicas']}:{policy['maxReplicas']}",
        "PET_MAX_RESTARTS": str(policy["maxRestarts"]),
    }
    env = environment(**set_by_the_operator, PET_NPROC_PER_NODE="1")  # no GPU here to count
    (container,) = WORKER["template"]["spec"]["containers"]
    pods = [subprocess.Popen(command(container), cwd=project, env=env) for _ in range(2)]
    assert [pod.wait() for pod in pods] == [0, 0]
    assert (project / "artifacts/train/model.safetensors").stat().st_size > 0
    done, rest = REGISTER["spec"]["template"]["spec"]["containers"][0]["args"][0].split("\n", maxsplit=1)
    call(project, "bash", "-euc", done)
    assert call(project, "python", "-m", "dvc", "status", "train") == "Data and pipelines are up to date.\n"
    assert rest.splitlines() == [f"{DVC} repro --single-item {stage}" for stage in ("evaluate", "register")]


def test_prefect_makes_a_work_pool_of_the_template(tmp_path):
    prefect = ("python", "-m", "prefect", "work-pool")
    here = {
        "PREFECT_HOME": str(tmp_path),
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    }
    create = ("create", "detr", "--type", "kubernetes", "--base-job-template", str(DEPLOY / "prefect-kubernetes.json"))
    assert "Created work pool 'detr'" in call(tmp_path, *prefect, *create, **here)
    with contextlib.closing(sqlite3.connect(tmp_path / "prefect.db")) as database:
        (stored,) = database.execute("SELECT base_job_template FROM work_pool WHERE name = 'detr'").fetchone()
    assert json.loads(stored) == TEMPLATE


@pytest.mark.parametrize(
    "deployment", YAML(typ="safe").load(ROOT / "prefect.yaml")["deployments"], ids=itemgetter("name")
)
def test_a_deployment_runs_in_the_pods_of_the_work_pool(deployment):
    variables = deployment["work_pool"]["job_variables"]
    job = asyncio.run(BaseJobConfiguration.from_template_and_values(TEMPLATE, variables))
    assert job.env == TEMPLATE["variables"]["properties"]["env"]["default"] | variables["env"]
