"""The Prefect flows, one task run per DVC stage: here (`pipeline`), and in a worktree of its own (`retrain`)."""

import contextlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger, runtime, task
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.events import Event
from prefect.states import Completed, Failed
from pydantic import AfterValidator, Field

from pipelines import report, repro, worktree

RETRIES = {"register": 6}  # of a stage whose failure time may mend: MLflow is not there
RETRY_SECONDS = 30
UPDATE_SECONDS = 5.0  # between updates of the progress
STEPS = re.compile(r"\btrain:.*?(\d+)/(\d+) \[")  # in the lines of a training
NOTE_LENGTH = 1000
PRESETS = sorted(path.stem for path in (Path(__file__).parent.parent / "presets").glob("*.yaml"))

LINES = r"[^\x00-\x08\x0b-\x1f\x7f]*$"  # what a person types: no control characters but tabs and ends of lines
NO_PASSWORD: Any = {  # for the server, which refuses what it would store
    "not": {"pattern": r"://[^/\s?#]+@", "description": "A URL with a password is committed: put it into ~/.netrc."}
}


def without_password(text: str) -> str:
    worktree.refuse_password("a parameter", text)
    return text


Preset = Annotated[
    str,
    Field(
        title="Preset",
        description="What is merged over params.yaml of the ref first; none for params.yaml as it is.",
        pattern=r"^[A-Za-z0-9_-]+$",
        max_length=100,
        json_schema_extra={"enum": ["none", *PRESETS]},
    ),
]
Override = Annotated[
    str,
    Field(pattern=rf"^[a-z_0-9]+(\.[^.=\s\x00-\x1f\x7f]+)+={LINES}", max_length=1000, json_schema_extra=NO_PASSWORD),
    AfterValidator(without_password),
]
Overrides = Annotated[
    list[Override],
    Field(
        title="Overrides",
        description="One parameter each, as train.epochs=3; misspelt ones are refused. No passwords: it is committed.",
        max_length=100,
    ),
]
Ref = Annotated[
    str,
    Field(
        title="Git ref",
        description="Branch, tag or commit of the code and params.yaml; origin/main fetches first. HEAD: the clone's.",
        pattern=r"^[^\s\x00-\x1f\x7f:?*\[\\{}^~@/.-][^\s\x00-\x1f\x7f:?*\[\\{}]*$",
        max_length=200,
    ),
]
Promote = Annotated[
    bool,
    Field(title="Promote", description="Whether a better model becomes the champion; off: it stays a challenger."),
]
Note = Annotated[
    str,
    Field(
        title="Note",
        description="Why; stands in the commit and in the report.",
        pattern=f"^{LINES}",
        max_length=NOTE_LENGTH,
        json_schema_extra=NO_PASSWORD,
    ),
    AfterValidator(without_password),
]
Refresh = Annotated[bool, Field(title="Refresh", description="Download again: the content of the source has changed.")]

KeepDays = Annotated[int, Field(title="Keep days", description="What was touched since stays.", ge=0)]
DryRun = Annotated[bool, Field(title="Dry run", description="Only say what would go.")]
SharedCache = Annotated[
    bool,
    Field(
        title="Shared cache",
        description="Collect a DVC cache outside of the project too; what only other clones need in it is lost.",
    ),
]


@task(task_run_name="{stage}")
def run_stage(stage: str, root: Path, force: bool) -> Any:
    """Reproduces one stage; the state says `ran`, `restored` or `unchanged`, or why it failed."""
    log, progress = get_run_logger().info, Progress()

    def take(line: str) -> None:
        log(line)
        if stage == "train":
            progress.take(line)

    try:
        outcome = repro.reproduce(stage, root, take, force)
    except repro.StageFailed as failure:
        show(create_markdown_artifact, report.failure(stage, str(failure), failure.lines), key="failure")
        return Failed(message=str(failure))
    if stage == "validate":
        show(create_markdown_artifact, report.dataset(root), key="dataset")
    return Completed(name=outcome.capitalize(), message=outcome, data=outcome)


def show(create: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Makes an artifact; nothing where Prefect's server does not take it: a run never fails for what it shows."""
    with contextlib.suppress(Exception):
        return create(*arguments, **options)


class Progress:
    """A progress artifact that the lines of a training move; what the server does not take is left out."""

    def __init__(self) -> None:
        self.artifact: Any = None
        self.updated = 0.0

    def take(self, line: str) -> None:
        found = STEPS.search(line)
        if found is None or (time.monotonic() - self.updated < UPDATE_SECONDS and found[1] != found[2]):
            return
        self.updated, done = time.monotonic(), 100 * int(found[1]) / int(found[2])
        if self.artifact is None:
            self.artifact = show(create_progress_artifact, done, key="training", description="Steps of the training")
        else:
            show(update_progress_artifact, self.artifact, done)


def needs_time(task: Any, run: Any, state: State) -> bool:
    """Whether a stage failed because MLflow was not there."""
    return "MLflow" in (state.message or "")


def run_stages(root: Path, refresh: bool, before: Callable[[str], None] = lambda stage: None) -> None:
    """Reproduces every stage of `root`/dvc.yaml in order. Raises StageFailed at the first that fails."""
    for stage in repro.stages(root):
        before(stage)
        attempt = run_stage.with_options(
            retries=RETRIES.get(stage, 0), retry_delay_seconds=RETRY_SECONDS, retry_condition_fn=needs_time
        )
        state: State = attempt(stage, root, refresh and stage == "download", return_state=True)
        if not state.is_completed():
            raise repro.StageFailed(state.message or f"{stage} did not complete")


@flow(name="detr-pipeline", flow_run_name="{title}")
def pipeline(title: str, root: Path, refresh: bool = False) -> Any:
    """Reproduces every stage of `root`/dvc.yaml in order and stops at the first failure."""
    try:
        run_stages(root, refresh)
    except repro.StageFailed as failure:
        return Failed(message=str(failure))
    return Completed(message="all stages are up to date", data="")


def title() -> str:
    """What a run of `retrain` is called, from its parameters."""
    chosen = runtime.flow_run.parameters
    preset = [chosen["preset"]] if chosen["preset"] != "none" else []
    words = [*preset, *chosen["overrides"], *([] if chosen["ref"] == "HEAD" else [f"@{chosen['ref']}"])]
    return " ".join(" ".join(words).split())[:200] or "params.yaml"


@flow(name="retrain", flow_run_name=title)
def retrain(
    preset: Preset = "none",
    overrides: Overrides = [],  # noqa: B006
    ref: Ref = "HEAD",
    promote: Promote = True,
    note: Note = "",
    refresh: Refresh = False,
) -> Any:
    """Trains, evaluates and registers in a git worktree; the result is a commit on a branch `runs/...`."""
    root, log = Path.cwd(), get_run_logger().info
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    chosen = None if preset == "none" else preset
    settings = [*overrides, *([] if promote else ["register.promote=false"])]

    def parameters(place: Path) -> Any:
        document = worktree.parameters(place, chosen, settings)
        confined(document, root)
        return document

    try:
        repro.fetch(root, ref)
        with worktree.only_one(root, log):
            name = f"{chosen or 'overrides'}-{time.strftime('%Y%m%d-%H%M%S')}"
            with worktree.worktree(root, name, ref, parameters, note) as (place, branch):
                repro.check(place)
                last = repro.stages(place)[-1]
                run_stages(place, refresh, lambda stage: worktree.keep_results(place) if stage == last else None)
                with contextlib.suppress(Exception):
                    publish(report.result(place, root, branch, note))
    except (ValueError, OSError, repro.StageFailed) as error:
        return Failed(message=repro.hidden(str(error)))
    return Completed(message=f"branch {branch}", data=branch)


def publish(found: report.Result) -> None:
    """Makes Prefect's artifacts of the result of a run."""
    create_markdown_artifact(found.markdown, key="result", description=found.headline)
    create_table_artifact(found.metrics, key="metrics", description="COCO's numbers, on the validation images")
    for key, (picture, description) in found.pictures.items():
        create_image_artifact(picture, key=key, description=description)


@flow(name="watch-data", flow_run_name="watch {preset} at {ref}")
def watch_data(preset: Preset = "none", ref: Ref = "HEAD") -> Any:
    """Emits `detr.data.changed` when the source of the data, or the data in dvc.lock, changed since the last look."""
    from pipelines import watch

    root = Path.cwd()
    try:
        repro.fetch(root, ref)
        chosen = None if preset == "none" else preset
        with watch.watched(root, chosen, ref, lambda document: confined(document, root)) as changes:
            if changes:
                note = f"The data has changed: {'; '.join(changes)}"
                note = note if len(note) <= NOTE_LENGTH else f"{note[: NOTE_LENGTH - 4]} ..."
                emit("detr.data.changed", "detr.data", preset=preset, ref=ref, changes=changes, note=note)
    except (ValueError, OSError) as error:
        return Failed(message=repro.hidden(str(error)))
    if changes is None:
        return Completed(message="the first look: there is nothing to compare with yet", data=[])
    for line in changes:
        get_run_logger().info(line)
    message = f"the data has changed: {len(changes)} differences" if changes else "the data is as it was"
    return Completed(message=message, data=changes)


def confined(document: Any, root: Path) -> None:
    """Confines what a form or a schedule started, not a person in their own clone, to the project's files."""
    if runtime.deployment.id:
        worktree.confine(document, root)


def emit(name: str, resource: str, **payload: Any) -> None:
    """Has Prefect's server take an event; unlike `emit_event`, it raises where the server does not."""
    run = {"prefect.resource.id": f"prefect.flow-run.{runtime.flow_run.id}", "prefect.resource.role": "flow-run"}
    event = Event(event=name, resource={"prefect.resource.id": resource}, related=[run], payload=payload)  # type: ignore[arg-type, list-item]
    with get_client(sync_client=True) as client:
        client.request("POST", "/events", json=[event.model_dump(mode="json")])


@flow(name="collect")
def collect(keep_days: KeepDays = 14, dry_run: DryRun = False, shared_cache: SharedCache = False) -> Any:
    """Frees the disk of what no registered version needs and nobody has touched for `keep_days`."""
    from pipelines import collect as collection

    root = Path.cwd()
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    try:
        collected = collection.collect(root, keep_days, dry_run, shared_cache, get_run_logger().info)
    except (ValueError, OSError, repro.StageFailed) as error:
        return Failed(message=repro.hidden(str(error)))
    create_markdown_artifact(collected.markdown, key="collected", description=collected.headline)
    return Completed(message=collected.headline, data=collected.bytes)


def run(of: Any, *arguments: Any, **options: Any) -> Any:
    """Runs a flow here, with Prefect's server or an embedded one; what it gives. Raises StageFailed."""
    state: State = of(*arguments, **options, return_state=True)
    if not state.is_completed():
        raise repro.StageFailed(state.message or "the flow did not complete")
    return state.result()
