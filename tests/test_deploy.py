"""What deploy/ submits, run here: its commands are real, small executables stand in for Slurm and the operator."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from contextlib import closing
from operator import itemgetter

import jsonschema
import pytest
from prefect.utilities.templating import apply_values, find_placeholders
from prefect.workers.base import BaseJobConfiguration
from ruamel.yaml import YAML

from tests.conftest import ROOT, call, environment, small_project

DEPLOY = ROOT / "deploy"
DVC = "python -m dvc --wait-for-lock"
TEMPLATE = json.loads((DEPLOY / "prefect-kubernetes.json").read_text())
TRAINING, CLAIM = YAML(typ="safe").load_all(DEPLOY / "pytorchjob.yaml")
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
    call(project, "python", "-c", "from pipelines.tracking import connect; connect()")
    return project


@pytest.fixture
def project(validated, tmp_path):
    return shutil.copytree(validated, tmp_path / "project", symlinks=True)


def command(container):
    return [*container["command"], *container.get("args", [])]


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def wait_for(condition, process):
    while not (found := condition()):
        assert process.poll() is None, f"ended with {process.returncode}"
        time.sleep(0.05)
    return found


def test_a_slurm_job_that_is_stopped_queues_again_and_goes_on_to_a_registered_model(project, tmp_path):
    for name, body in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash{body}\n")
        path.chmod(0o755)
    tasks, seen = tmp_path / "tasks", tmp_path / "seen"
    env = environment(
        PET_NPROC_PER_NODE="1",
        SLURM_JOB_ID=str(free_port() - 20000),
        SLURM_JOB_NODELIST="node[1-2]",
        SLURM_NNODES="2",
        TASKS=str(tasks),
        SEEN=str(seen),
    )
    env["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{env['PATH']}"
    job = ["bash", str(DEPLOY / "slurm.sh")]

    with subprocess.Popen(
        job, cwd=project, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as first:
        wait_for(lambda: list(project.glob("scratch/*/state")), first)
        for task in tasks.read_text().split():  # as Slurm does: the tasks, not what they started
            os.kill(int(task), signal.SIGTERM)
        said = first.communicate()[0]
    assert first.returncode == 75, said
    assert seen.read_text() == f"requeue {env['SLURM_JOB_ID']}\n"

    again = subprocess.run(job, cwd=project, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert again.returncode == 0, again.stdout
    assert "resuming at step" in again.stdout
    assert "2 processes on" in again.stdout
    assert (project / "artifacts/train/model.safetensors").stat().st_size > 0
    assert json.loads((project / "artifacts/register/version.json").read_text())["version"]
    assert call(project, "python", "-m", "dvc", "status", "train", "evaluate") == "Data and pipelines are up to date.\n"


def test_a_slurm_job_submitted_elsewhere_says_where_to(tmp_path):
    assert f"error: no dvc.yaml in {tmp_path}; submit from the root" in call(
        tmp_path, "bash", str(DEPLOY / "slurm.sh"), code=1
    )


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


CONTAINER = {
    "type": "object",
    "required": ["name", "image", "command"],
    "properties": {
        "command": {"type": "array", "items": {"type": "string"}},
        "args": {"type": "array", "items": {"type": "string"}},
        "env": {"type": "array", "items": {"required": ["name", "value"], "additionalProperties": {"type": "string"}}},
        "resources": {"properties": {"requests": {}, "limits": {}}, "additionalProperties": False},
    },
}
PYTORCHJOB = {  # names and types of Kubeflow's CustomResourceDefinition, those that stand in the manifest
    "properties": {
        "apiVersion": {"const": "kubeflow.org/v1"},
        "kind": {"const": "PyTorchJob"},
        "spec": {
            "required": ["pytorchReplicaSpecs"],
            "additionalProperties": False,
            "properties": {
                "elasticPolicy": {
                    "additionalProperties": False,
                    "properties": {
                        "rdzvBackend": {"enum": ["c10d", "etcd", "etcd-v2"]},
                        **{name: {"type": "integer"} for name in ("minReplicas", "maxReplicas", "maxRestarts")},
                    },
                },
                "runPolicy": {
                    "additionalProperties": False,
                    "properties": {
                        "backoffLimit": {"type": "integer"},
                        "cleanPodPolicy": {"enum": ["All", "Running", "None"]},
                    },
                },
                "pytorchReplicaSpecs": {
                    "propertyNames": {"enum": ["Master", "Worker"]},
                    "additionalProperties": {
                        "additionalProperties": False,
                        "properties": {
                            "replicas": {"type": "integer"},
                            "restartPolicy": {"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
                            "template": {
                                "properties": {
                                    "spec": {
                                        "properties": {
                                            "containers": {"items": CONTAINER},
                                            "initContainers": {"items": CONTAINER},
                                        }
                                    }
                                }
                            },
                        },
                    },
                },
            },
        },
    },
}


def test_the_training_job_is_what_the_operator_takes():
    jsonschema.validate(TRAINING, PYTORCHJOB)
    policy, spec = TRAINING["spec"]["elasticPolicy"], WORKER["template"]["spec"]
    assert policy["minReplicas"] <= WORKER["replicas"] <= policy["maxReplicas"]
    assert [container["name"] for container in spec["containers"]] == ["pytorch"]  # the one that it gives PET_* to
    assert WORKER["restartPolicy"] == "OnFailure"  # under ExitCode the codes 1 to 127 are final, 75 with them
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteMany"]


def test_every_pod_has_the_project_and_shared_memory_under_one_claim_and_one_image():
    filled = apply_values(TEMPLATE["job_configuration"], defaults())
    pods = [WORKER["template"], REGISTER["spec"]["template"], filled["job_manifest"]["spec"]["template"]]
    images = set()
    for spec in (pod["spec"] for pod in pods):
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert volumes["project"]["persistentVolumeClaim"] == {"claimName": CLAIM["metadata"]["name"]}
        assert volumes["shared-memory"]["emptyDir"]["medium"] == "Memory"
        for container in spec["containers"] + spec.get("initContainers", []):
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounts == {"project": container["workingDir"], "shared-memory": "/dev/shm"}
            images.add(container["image"])
    assert images == {re.search(r"--tag (\S+)", (DEPLOY / "Dockerfile").read_text())[1]}


def defaults():
    return {name: one["default"] for name, one in TEMPLATE["variables"]["properties"].items() if "default" in one}


def test_prefect_makes_a_work_pool_of_the_template_and_a_job_of_its_variables(tmp_path):
    jsonschema.Draft202012Validator.check_schema(TEMPLATE["variables"])
    jsonschema.validate(defaults(), TEMPLATE["variables"])
    used = {placeholder.name for placeholder in find_placeholders(TEMPLATE["job_configuration"])}
    assert used == set(TEMPLATE["variables"]["properties"])
    filled = apply_values(
        TEMPLATE["job_configuration"], defaults() | {"gpus": 4, "volume_claim": "mine", "name": "run"}
    )
    assert not find_placeholders(filled) - find_placeholders(apply_values(TEMPLATE["job_configuration"], {}))
    spec = filled["job_manifest"]["spec"]["template"]["spec"]
    assert spec["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 4}
    assert spec["volumes"][0]["persistentVolumeClaim"] == {"claimName": "mine"}
    assert filled["job_manifest"]["metadata"]["generateName"] == "run-"

    prefect = ("python", "-m", "prefect", "work-pool")
    here = {
        "PREFECT_HOME": str(tmp_path),
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    }
    create = ("create", "detr", "--type", "kubernetes", "--base-job-template", str(DEPLOY / "prefect-kubernetes.json"))
    assert "Created work pool 'detr'" in call(tmp_path, *prefect, *create, **here)
    with closing(sqlite3.connect(tmp_path / "prefect.db")) as database:
        (stored,) = database.execute("SELECT base_job_template FROM work_pool WHERE name = 'detr'").fetchone()
    assert json.loads(stored) == TEMPLATE


def test_the_image_has_the_locked_environment():
    lines = (DEPLOY / "Dockerfile").read_text().replace("\\\n", "").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert {step for step, _ in steps} <= {"FROM", "RUN", "COPY", "ENV", "WORKDIR"}
    assert ["FROM", "python:3.11-slim"] in steps
    assert ["COPY", "requirements.lock /"] in steps
    assert any("pip install --no-cache-dir --requirement /requirements.lock" in text for _, text in steps)
    assert ["WORKDIR", WORKER["template"]["spec"]["containers"][0]["workingDir"]] in steps


@pytest.mark.parametrize(
    "deployment", YAML(typ="safe").load(ROOT / "prefect.yaml")["deployments"], ids=itemgetter("name")
)
def test_a_deployment_runs_in_the_pods_of_the_work_pool(deployment):
    variables = deployment["work_pool"]["job_variables"]
    jsonschema.validate(defaults() | variables, TEMPLATE["variables"])
    job = asyncio.run(BaseJobConfiguration.from_template_and_values(TEMPLATE, variables))
    assert job.env == TEMPLATE["variables"]["properties"]["env"]["default"] | variables["env"]
    assert deployment["work_pool"]["name"] == "detr"
