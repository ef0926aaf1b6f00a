"""What a Prefect server needs besides the deployments: the work pool, its queue of one, the automations."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import State, StateType
from prefect.events.actions import CallWebhook, ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from prefect.states import AwaitingRetry, Cancelled, Crashed
from pydantic import SecretStr
from ruamel.yaml import YAML

from pipelines.files import write_json

POOL, QUEUE = "detr", "training"
SILENT = "DETR_SILENT_SECONDS"  # in the environment: without a heartbeat, after which a run counts as dead
HEARTBEAT = "prefect.flow-run.heartbeat"  # every 30 seconds by prefect.yaml, the least that Prefect takes
SILENCE = "no sign of life"  # begins why a silent run has crashed
RESUMED = timedelta(hours=1)  # since its crash by silence, in which a run is taken for one that its machine interrupted
MOST_ATTEMPTS = 5  # within a day, after which a run that may be what kills its machine waits for a person
RUN: dict[str, str | list[str]] = {"prefect.resource.id": "prefect.flow-run.*"}
OURS = ResourceSpecification({"prefect.resource.id": "prefect.tag.detr"})  # the tag of all deployments of prefect.yaml
TOLD = """
{%- set state, message = event.resource["prefect.state-name"], event.resource["prefect.state-message"] -%}
{%- set url = (flow_run|ui_url) or "" -%}
{{ {"text": flow.name ~ ", " ~ flow_run.name ~ ": " ~ state ~ ": " ~ message ~ " " ~ url, "flow": flow.name,
    "run": flow_run.name, "state": state, "message": message, "url": url}|tojson }}"""


def prepare(webhook: str | None = None) -> None:
    """Makes pool, queue and automations on the server of PREFECT_API_URL; to run it again is safe.

    Failures are told to the address `webhook`; without one it stays as it is there. Raises ValueError.
    """
    said = os.environ.get(SILENT, "180")
    seconds = int(said) if said.isdecimal() else 0
    if seconds <= 30:
        raise ValueError(f"{SILENT} is {said!r}; heartbeats come every 30 seconds, so take 60 or more")
    if not get_current_settings().api.url:
        raise ValueError("PREFECT_API_URL is not set: which server? `make up` prints its own")
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(POOL)
        except ObjectNotFound:
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        try:
            queue = client.read_work_queue_by_name(QUEUE, work_pool_name=POOL)
            client.update_work_queue(queue.id, concurrency_limit=1)
        except ObjectNotFound:
            client.create_work_queue(QUEUE, concurrency_limit=1, work_pool_name=POOL)
        silent = EventTrigger(
            after={HEARTBEAT},
            expect={
                HEARTBEAT,
                *(f"prefect.flow-run.{name}" for name in ("Completed", "Failed", "Cancelled", "Crashed")),
            },
            match=ResourceSpecification(RUN),
            match_related=OURS,
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=seconds),
        )
        crashed = ChangeFlowRunState(
            name="Crashed",
            state=StateType.CRASHED,
            force=False,
            message=f"{SILENCE} for {seconds} seconds; retry it: it goes on from its last state",
        )
        automate(client, "A silent run has crashed", silent, crashed)
        if webhook:
            block: Any = Webhook(url=SecretStr(webhook)).save("detr-failures", overwrite=True)
            failed = EventTrigger(
                expect={"prefect.flow-run.*"},
                match=ResourceSpecification(RUN | {"prefect.state-type": ["FAILED", "CRASHED"]}),
                match_related=OURS,
                posture=Posture.Reactive,
                threshold=1,
            )
            automate(client, "Failures are told", failed, CallWebhook(block_document_id=block, payload=TOLD))


def automate(client: SyncPrefectClient, name: str, trigger: EventTrigger, action: Any) -> None:
    """Makes an automation, in the place of one of the same name; one that is off stays off."""
    others = client.read_automations_by_name(name)
    for other in others:  # not updated: it would go on to count the silence of runs from before
        client.delete_automation(other.id)
    enabled = all(other.enabled for other in others)
    client.create_automation(AutomationCore(name=name, enabled=enabled, trigger=trigger, actions=[action]))


def deploy_command(root: Path) -> list[str]:
    """The Python module, and its arguments, that deploys prefect.yaml but for what a person has chosen otherwise.

    Where a schedule of a deployment is on, or has a slug, which only a person gives, its schedules stay as they are on
    the server; automations that are off stay off.
    """
    document = YAML(typ="safe", pure=True).load(root / "prefect.yaml")
    pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL]))
    with get_client(sync_client=True) as client:
        deployments = client.read_deployments(work_pool_filter=pool)
        chosen = {one.name for one in deployments if any(each.active or each.slug for each in one.schedules)}
        off = {automation.name for automation in client.read_automations() if not automation.enabled}
    for deployment in document["deployments"]:
        name = deployment["name"]
        if name in chosen:
            deployment.pop("schedules", None)
        for number, trigger in enumerate(deployment.get("triggers", []), start=1):
            if trigger.get("name", f"{name}__automation_{number}") in off:
                trigger["enabled"] = False
    file = root / "scratch" / "services" / "prefect.json"  # which YAML reads
    write_json(file, document)
    return ["prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]


def count_attempts(client: SyncPrefectClient, run_id: UUID) -> int:
    """How often a run began within the last day."""
    since = datetime.now(UTC) - timedelta(days=1)
    return sum(state.is_running() and state.timestamp > since for state in client.read_flow_run_states(run_id))


def resume_interrupted(most_attempts: int | None = None) -> list[str]:
    """Has the runs that died with their machine run again, from their last state; a line on each.

    Nothing of the pool may be alive. Of crashed runs those go on that fell silent within the last hour: while the
    machine was away, the server told them apart from the living before this did. One that began as often as
    `most_attempts` within a day stays crashed.
    """
    alive = FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.CANCELLING])
    crashed = FlowRunFilterStateType(any_=[StateType.CRASHED])
    lately = FlowRunFilterEndTime.model_validate({"after_": datetime.now(UTC) - RESUMED})
    pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL]))
    found = []
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=alive)), work_pool_filter=pool
        )
        silent = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=crashed), end_time=lately),
            work_pool_filter=pool,
        )
        runs += [run for run in silent if run.state and (run.state.message or "").startswith(SILENCE)]
        for run in runs:
            if run.state_type == StateType.CANCELLING:
                state: State = Cancelled(message="it was being cancelled when all stopped")
            elif most_attempts and (number := count_attempts(client, run.id)) >= most_attempts:
                said = f"it began {number} times within a day and never ended; find the cause, then retry it"
                state = Crashed(message=said)
            else:
                state = AwaitingRetry(message="it was interrupted and goes on from its last state")
            client.set_flow_run_state(run.id, state, force=True)
            found.append(f"{run.name}: {state.message}")
    return found
