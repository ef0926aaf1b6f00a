"""The Prefect flow: one task run per DVC stage. The only module that imports prefect."""

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
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
    return Completed(name=outcome.capitalize(), message=outcome, data=outcome)


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
