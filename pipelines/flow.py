"""The Prefect flow: one task run per DVC stage. The only module that imports prefect."""

import json
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from pipelines import repro


@task(task_run_name="{stage}")
def run_stage(stage: str, root: Path, force: bool) -> Any:
    """Reproduces one stage; the state says `ran`, `restored` or `unchanged`, or why it failed."""
    try:
        outcome = repro.reproduce(stage, root, get_run_logger().info, force)
    except repro.StageFailed as failure:
        return Failed(message=str(failure))
    if stage == "validate":
        create_markdown_artifact(dataset_summary(root / "artifacts" / "validate"), key="dataset")
    return Completed(name=outcome.capitalize(), message=outcome, data=outcome)


def dataset_summary(validated: Path) -> str:
    """Markdown of what the validation of the data found: numbers, warnings, and where the dataset's page is."""
    counts = json.loads((validated / "statistics.json").read_text())
    report = json.loads((validated / "report.json").read_text())
    lines = ["| | " + " | ".join(counts) + " |", "|---" * (1 + len(counts)) + "|"]
    for name in ("images", "annotations", "crowds", "images_without_objects"):
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(str(of[name]) for of in counts.values()) + " |")
    broken = [row for row in report if row["outcome"] != "holds"]
    lines += ["", f"{len(report) - len(broken)} of {len(report)} expectations hold."]
    for row in broken:
        ids = ", ".join(map(str, row["ids"]))
        lines.append(f"- {row['table']}: {row['meaning']}: {row['unexpected']} of {row['rows']} break it ({ids})")
    lines += ["", "[The dataset's page](http://127.0.0.1:8001), served by `python -m pipelines ui dataset`, and in the"]
    return "\n".join([*lines, "MLflow run of the training under `validate/dataset`."])


@flow(name="detr-pipeline", flow_run_name="{title}")
def pipeline(title: str, root: Path, force_download: bool = False) -> Any:
    """Reproduces every stage of `root`/dvc.yaml in order and stops at the first failure."""
    for stage in repro.stages(root):
        state: State = run_stage(stage, root, force_download and stage == "download", return_state=True)
        if not state.is_completed():
            return Failed(message=state.message)
    return Completed(message="all stages are up to date")


def run(title: str, root: Path, force_download: bool = False) -> None:
    """Runs the flow here, with Prefect's server or an embedded one. Raises StageFailed with the stage's message."""
    state: State = pipeline(title, root, force_download, return_state=True)  # type: ignore[assignment]
    if not state.is_completed():
        raise repro.StageFailed(state.message or "the flow did not complete")
