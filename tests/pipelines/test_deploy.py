"""What deploy/ submits: its manifests, its image and its template have what operators, Prefect and each other need."""

import json
import re
from operator import itemgetter

import jsonschema
import pytest
from prefect.utilities.templating import apply_values, find_placeholders
from ruamel.yaml import YAML

from tests.running import ROOT, call

DEPLOY = ROOT / "deploy"
TEMPLATE = json.loads((DEPLOY / "prefect-kubernetes.json").read_text(encoding="utf-8"))
TRAINING, CLAIM = YAML(typ="safe").load_all(DEPLOY / "pytorchjob.yaml")
REGISTER = YAML(typ="safe").load(DEPLOY / "register-job.yaml")
WORKER = TRAINING["spec"]["pytorchReplicaSpecs"]["Worker"]
DVC = "python -m dvc --wait-for-lock"
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


def test_a_slurm_job_submitted_elsewhere_says_where_to(tmp_path):
    assert f"error: no dvc.yaml in {tmp_path}; submit from the root" in call(
        tmp_path, "bash", str(DEPLOY / "slurm.sh"), code=1
    )


def test_the_training_job_is_what_the_operator_takes():
    jsonschema.validate(TRAINING, PYTORCHJOB)
    policy, spec = TRAINING["spec"]["elasticPolicy"], WORKER["template"]["spec"]
    assert policy["minReplicas"] <= WORKER["replicas"] <= policy["maxReplicas"]
    assert [container["name"] for container in spec["containers"]] == ["pytorch"]  # the one that it gives PET_* to
    assert WORKER["restartPolicy"] == "OnFailure"  # under ExitCode the codes 1 to 127 are final, 75 with them
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_pods_make_the_data_and_train_and_a_job_commits_evaluates_and_registers():
    """The real ones: tests/slow/test_deploy.py."""
    spec = WORKER["template"]["spec"]
    (data,), (training,) = spec["initContainers"], spec["containers"]
    assert data["args"][0].splitlines()[-2:] == [
        f"{DVC} repro --single-item {stage}" for stage in ("download", "validate")
    ]
    assert training["command"] == ["python", "-m", "pipelines.train"]
    _, *rest = REGISTER["spec"]["template"]["spec"]["containers"][0]["args"][0].splitlines()
    assert rest == [f"{DVC} repro --single-item {stage}" for stage in ("evaluate", "register")]


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
    assert images == {re.search(r"--tag (\S+)", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"))[1]}


def defaults():
    return {name: one["default"] for name, one in TEMPLATE["variables"]["properties"].items() if "default" in one}


def test_prefect_makes_a_job_of_the_templates_variables():
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


def test_the_image_has_the_locked_environment():
    lines = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert {step for step, _ in steps} <= {"FROM", "RUN", "COPY", "ENV", "WORKDIR"}
    assert ["FROM", "python:3.11-slim"] in steps
    assert ["COPY", "requirements.lock /"] in steps
    assert any("pip install --no-cache-dir --requirement /requirements.lock" in text for _, text in steps)
    assert any(step == "ENV" and {"USER=detr", "HOME=/tmp"} <= set(text.split()) for step, text in steps)
    assert ["WORKDIR", WORKER["template"]["spec"]["containers"][0]["workingDir"]] in steps


@pytest.mark.parametrize(
    "deployment", YAML(typ="safe").load(ROOT / "prefect.yaml")["deployments"], ids=itemgetter("name")
)
def test_a_deployment_has_variables_of_the_work_pool(deployment):
    variables = deployment["work_pool"]["job_variables"]
    jsonschema.validate(defaults() | variables, TEMPLATE["variables"])
    filled = apply_values(TEMPLATE["job_configuration"], defaults() | variables)
    assert filled["env"] == variables["env"]
    assert deployment["work_pool"]["name"] == "detr"
