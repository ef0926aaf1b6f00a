"""Stage 5: the model in the registry, with its lineage. `python -m pipelines.register`"""

import base64
import hashlib
import json
import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from pipelines import params, tracking
from pipelines.packaging import log_version
from pipelines.registry import champion, current_alias, decide, version_with
from pipelines.stage import DATA, DOCS_DIGEST, command, write_json

VALIDATED = Path("artifacts/validate")
TRAINED = Path("artifacts/train")
EVALUATED = Path("artifacts/evaluate")
OUTPUT = Path("artifacts/register")
SCRATCH = Path("scratch")


@dataclass(frozen=True)
class RegisterParams:
    """The `register` section of params.yaml."""

    min_ap_gain: float  # over the champion's AP, to take its place


def register(config: RegisterParams, output: Path) -> None:
    """Publishes the run's files to MLflow, registers the model once, and writes `version.json`.

    Weights that are registered already give the version that has them. The training's resume state, kept until its
    results are safe, is removed. Raises ValueError when lineage is incomplete or MLflow does not answer.
    """
    lineage = collect_lineage()
    client = tracking.connect()
    mark = json.loads((TRAINED / "config.json").read_text())["fingerprint"]
    run_id = tracking.find_run(client, mark, f"train {mark}")
    metrics = json.loads((EVALUATED / "metrics.json").read_text())
    publish(client, run_id, mark, metrics, lineage)
    version = version_with(client, lineage["weights_sha256"])
    if version is None:
        best = champion(client)
        alias, reason = decide(metrics["AP"], float(best.tags["AP"]) if best else None, config.min_ap_gain)
        tags = lineage | {name: str(value) for name, value in metrics.items()}
        tags |= {"fingerprint": mark, "decision": alias, "decision_reason": reason}
        version = log_version(run_id, TRAINED, example_image(), tags)
        client.set_registered_model_alias(tracking.MODEL, alias, version.version)
    else:
        alias, reason = current_alias(client, version), "these weights were registered before"
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "version.json", {"name": tracking.MODEL, "version": int(version.version), "fingerprint": mark})
    for path in (SCRATCH / mark).glob("*state*"):
        path.unlink(missing_ok=True)
    print(f"registered {tracking.MODEL} version {version.version} as {alias}: {reason}", flush=True)


def collect_lineage() -> dict[str, str]:
    """What leads from a model version back to data, code, parameters and machine, as tags."""
    for path in (
        VALIDATED / "passed.json",
        TRAINED / "model.safetensors",
        EVALUATED / "metrics.json",
        Path("dvc.lock"),
    ):
        if not path.exists():
            raise ValueError(f"lineage is incomplete: {path} does not exist; run dvc repro")

    def git(*arguments: str) -> str:
        answer = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return answer.stdout.strip() if answer.returncode == 0 else ""

    return {
        "git_commit": git("rev-parse", "HEAD") or "none",
        "git_branch": git("branch", "--show-current") or "none",
        "git_dirty": str(bool(git("status", "--porcelain", "--", ".", ":!dvc.lock"))).lower(),
        "data_digest": json.loads((VALIDATED / "passed.json").read_text())["data"],
        "weights_sha256": tracking.sha256(TRAINED / "model.safetensors"),
        "dvc_lock_sha256": tracking.sha256(Path("dvc.lock")),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: installed(name) for name in ("torch", "torchvision")},
    }


def publish(client: Any, run_id: str, mark: str, metrics: dict[str, float], lineage: dict[str, str]) -> None:
    """Fills the run in from the files: parameters, curves, metrics, pictures, Data Docs, dvc.lock, git commit."""
    document = params.read_yaml(Path("params.yaml"))
    tracking.log_params(client, run_id, {name: document[name] for name in params.SECTIONS})
    tracking.fill_in(client, run_id, tracking.read_rows(TRAINED / "history.jsonl"))
    tracking.fill_in(client, run_id, tracking.read_rows(SCRATCH / mark / "timings.jsonl"))
    tracking.fill_in_pictures(client, run_id, SCRATCH / mark / "pictures")
    results = hashlib.sha256(lineage["weights_sha256"].encode())
    for path in sorted(path for path in EVALUATED.rglob("*") if path.is_file()):
        results.update(tracking.sha256(path).encode())
    if client.get_run(run_id).data.tags.get("published") == results.hexdigest():
        return
    for name, value in metrics.items():
        client.log_metric(run_id, name, value)
    for key, tag in lineage.items():
        client.set_tag(run_id, key, tag)
    client.log_artifact(run_id, "dvc.lock")
    client.log_artifact(run_id, "params.yaml")
    for name in ("report.json", "statistics.json", "dataset"):
        client.log_artifact(run_id, str(VALIDATED / name), "validate")
    client.log_artifact(run_id, str(TRAINED / "history.jsonl"), "train")
    for name in ("metrics.json", "per_class.csv", "detections.json", "plots"):
        client.log_artifact(run_id, str(EVALUATED / name), "evaluate")
    docs_of = SCRATCH / "data_docs" / DOCS_DIGEST
    if docs_of.exists() and docs_of.read_text() == lineage["data_digest"]:
        client.log_artifacts(run_id, str(SCRATCH / "data_docs"), "data_docs")
    client.set_tag(run_id, "published", results.hexdigest())
    client.set_terminated(run_id, "FINISHED")


def example_image() -> str:
    """The first validation image as base64."""
    from detr.coco import ImageArchive, load_annotations

    name = load_annotations(DATA / "instances_val.json").file_names[0]
    return base64.b64encode(ImageArchive(DATA / "val.zip").read(str(name))).decode()


def main() -> None:
    register(params.load("register", RegisterParams), OUTPUT)


if __name__ == "__main__":
    command(main)
