"""The Prefect flows, one task run per DVC stage: here (`pipeline`), and in a worktree of its own (`retrain`)."""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, runtime, task
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.events import Event
from prefect.states import Cancelled, Completed, Failed

from pipelines.redaction import redact
from pipelines.retraining import readiness, report
from pipelines.retraining.form import (
    NOTE_LENGTH,
    DryRun,
    KeepDays,
    Note,
    Overrides,
    Preset,
    Promote,
    Ref,
    Refresh,
    SharedCache,
)
from pipelines.retraining.progress_artifact import Progress
from pipelines.stage import EXPECTED, explain, quote_error
from pipelines.workspace import dvc, freshness, worktree
from pipelines.workspace.git import fetch
from pipelines.workspace.overrides import check_parameters, confine

RETRIES = {"register": 6}  # of a stage whose failure time may mend: MLflow is not there
RETRY_SECONDS = 30
TITLE_LENGTH = 60


@task(task_run_name="{stage}")
def run_stage(stage: str, root: Path, force: bool) -> Any:
    """Reproduces one stage; the state says `ran`, `restored` or `unchanged`, or why it failed."""
    log, progress = get_run_logger().info, Progress()

    def take(line: str) -> None:
        log(line)
        if stage == "train":
            progress.take(line)

    try:
        if stage == "download":
            outcome = freshness.reproduce_download(root, take, force)
        else:
            outcome = dvc.reproduce(stage, root, take)
    except dvc.StageFailed as failure:
        page = report.compose_failure(stage, str(failure), failure.lines)
        publish_artifact(
            "failure", lambda: create_markdown_artifact(page, key="failure", description=f"{stage} failed")
        )
        failed: State = Failed(message=str(failure))
        if runtime.task_run.run_count <= RETRIES.get(stage, 0) and needs_time(None, None, failed):
            get_run_logger().warning(f"{failure}; trying again in {RETRY_SECONDS} seconds")
        return failed
    except KeyboardInterrupt as stop:
        return Cancelled(message=str(stop) or f"stopped in {stage}")
    progress.finish()
    if stage == "validate":
        if outcome == "restored" and report.has_other_docs(root):  # of data that failed in between
            dvc.reproduce(stage, root, take, force=True)
        description = "What the validation of the data found"
        publish_artifact(
            "dataset", lambda: create_markdown_artifact(report.compose_dataset(root), "dataset", description)
        )
    return Completed(name=outcome.capitalize(), message=outcome, data=outcome)


def needs_time(task: Any, run: Any, state: State) -> bool:
    """Whether a stage failed because MLflow was not there."""
    return "MLflow" in (state.message or "")


def run_stages(root: Path, refresh: bool, before: Callable[[str], None] = lambda stage: None) -> list[report.Stage]:
    """Reproduces every stage of `root`/dvc.yaml in order; how each went.

    Raises StageFailed at the first that fails, KeyboardInterrupt that says where it was stopped.
    """
    logging.getLogger("prefect.task_runs").addFilter(is_news)
    went = []
    for stage in dvc.list_stages(root):
        before(stage)
        attempt = run_stage.with_options(
            retries=RETRIES.get(stage, 0), retry_delay_seconds=RETRY_SECONDS, retry_condition_fn=needs_time
        )
        begun = time.monotonic()
        state: State = attempt(stage, root, refresh and stage == "download", return_state=True)
        if state.is_cancelled():
            raise KeyboardInterrupt(state.message)
        if not state.is_completed():
            raise dvc.StageFailed(state.message or f"{stage} did not complete")
        went.append(report.Stage(stage, state.message or "", time.monotonic() - begun))
    return went


@flow(name="detr-pipeline", flow_run_name="{title}")
def pipeline(title: str, root: Path, refresh: bool = False) -> Any:
    """Reproduces every stage of `root`/dvc.yaml in order and stops at the first failure."""
    try:
        run_stages(root, refresh)
    except EXPECTED as error:
        return Failed(message=redact(explain(error)))
    except KeyboardInterrupt as stop:
        return make_cancelled(stop)
    return Completed(message="all stages are up to date", data="")


def make_title() -> str:
    """What a run of `retrain` is called, from its parameters, which its page has in full."""
    chosen = runtime.flow_run.parameters
    preset = [chosen["preset"]] if chosen["preset"] != "none" else []
    words = [*preset, *chosen["overrides"], *([] if chosen["ref"] == "HEAD" else [f"@{chosen['ref']}"])]
    return shorten(" ".join(words)) or "params.yaml"


def shorten(text: str) -> str:
    """The text on one line of TITLE_LENGTH letters at most."""
    return cut(" ".join(text.split()), TITLE_LENGTH)


def cut(text: str, length: int) -> str:
    """The text, with "..." in place of what is beyond `length` letters."""
    return text if len(text) <= length else f"{text[: length - 4]} ..."


@flow(name="retrain", flow_run_name=make_title)
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
    chosen = None if preset == "none" else preset
    settings = [*overrides, *([] if promote else ["register.promote=false"])]

    def asked(place: Path) -> Any:
        document = check_parameters(place, chosen, settings)
        confine_run(document, root)
        return document

    try:
        readiness.check(root)
        fetch(root, ref)
        with worktree.hold_run_lock(root, log):
            name = f"{chosen or 'overrides'}-{time.strftime('%Y%m%d-%H%M%S')}"
            with worktree.make_worktree(root, name, ref, asked, note) as (place, branch):
                dvc.check(place, log)
                done = worktree.find_refresh_mark(place)
                me = str(runtime.flow_run.id)  # which an attempt before may have been

                def before(stage: str) -> None:
                    if stage == "validate":
                        done.write_text(me, encoding="utf-8")
                    if stage == "register":
                        worktree.keep_results(place)

                went = run_stages(
                    place, refresh and not (done.exists() and done.read_text(encoding="utf-8") == me), before
                )
                publish(place, root, branch, note, went)
    except EXPECTED as error:
        return Failed(message=redact(explain(error)))
    except KeyboardInterrupt as stop:
        return make_cancelled(stop)
    return Completed(message=f"branch {branch}", data=branch)


def publish(place: Path, root: Path, branch: str, note: str, went: list[report.Stage]) -> None:
    """Makes Prefect's artifacts of the result of a run; what is missing of it is a warning in the log."""
    try:
        found = report.compose_result(place, root, branch, note, went)
    except Exception as error:
        get_run_logger().warning(f"the report is missing: {redact(str(error))}")
        return
    get_run_logger().info(found.headline)
    for one in found.missing:
        get_run_logger().warning(f"the report lacks {redact(one)}")
    description = "COCO's numbers on the validation images"
    made: dict[str, Callable[[], Any]] = {
        "result": lambda: create_markdown_artifact(found.markdown, "result", "What came out, and where it is"),
        "metrics": lambda: create_table_artifact(found.metrics, "metrics", description),
    }
    for key, (picture, said) in found.pictures.items():
        made[key] = partial(create_image_artifact, picture, key, said)
    for key, make in made.items():
        publish_artifact(key, make)


def publish_artifact(key: str, make: Callable[[], Any]) -> None:
    """Makes an artifact; one that cannot be made is a warning in the log."""
    try:
        make()
    except Exception as error:
        get_run_logger().warning(f"the artifact {key} is missing: {redact(quote_error(error))}")


@flow(name="watch-data", flow_run_name="watch {preset} at {ref}")
def watch_data(preset: Preset = "none", ref: Ref = "HEAD") -> Any:
    """Emits `detr.data.changed` when the source of the data, or the data in dvc.lock, changed since the last look."""
    from pipelines.retraining import watch

    root = Path.cwd()
    try:
        fetch(root, ref)
        chosen = None if preset == "none" else preset
        with watch.watch(root, chosen, ref, lambda document: confine_run(document, root)) as changes:
            if changes:
                note = cut(f"The data has changed: {'; '.join(changes)}", NOTE_LENGTH)
                emit("detr.data.changed", "detr.data", preset=preset, ref=ref, changes=changes, note=note)
    except EXPECTED as error:
        return Failed(message=redact(explain(error)))
    if changes is None:
        return Completed(message="the first look: there is nothing to compare with yet", data=[])
    for line in changes:
        get_run_logger().info(line)
    message = f"the data has changed: {len(changes)} differences" if changes else "the data is as it was"
    return Completed(message=message, data=changes)


def confine_run(document: Any, root: Path) -> None:
    """Confines what a form or a schedule started, not a person in their own clone, to the project's files."""
    if runtime.deployment.id:
        confine(document, root)


def emit(name: str, resource: str, **payload: Any) -> None:
    """Has Prefect's server take an event; unlike `emit_event`, it raises where the server does not."""
    run = {"prefect.resource.id": f"prefect.flow-run.{runtime.flow_run.id}", "prefect.resource.role": "flow-run"}
    event = Event(event=name, resource={"prefect.resource.id": resource}, related=[run], payload=payload)  # type: ignore[arg-type, list-item]
    with get_client(sync_client=True) as client:
        client.request("POST", "/events", json=[event.model_dump(mode="json")])


@flow(name="collect")
def collect(keep_days: KeepDays = 14, dry_run: DryRun = False, shared_cache: SharedCache = False) -> Any:
    """Frees the disk of what no registered version needs and nobody has touched for `keep_days`."""
    from pipelines.retraining import collect as collection

    root = Path.cwd()
    try:
        collected = collection.collect(root, keep_days, dry_run, shared_cache, get_run_logger().info)
    except EXPECTED as error:
        return Failed(message=redact(explain(error)))
    publish_artifact("collected", lambda: create_markdown_artifact(collected.markdown, "collected", collected.headline))
    return Completed(message=collected.headline, data=collected.bytes)


def make_cancelled(stop: KeyboardInterrupt) -> State:
    """The state of a run that a person has stopped in their terminal; what a worker is asked goes by Prefect."""
    if runtime.deployment.id:
        raise stop
    return Cancelled(message=f"{str(stop) or 'stopped'}; the same command goes on")


def is_news(record: logging.LogRecord) -> bool:
    """Whether a line of Prefect's log says what no state says, which is logged too."""
    return not record.getMessage().startswith("Task run failed with state: ")
