"""What a Prefect server needs besides the deployments: the work pool, its queue of one, the automations."""

import os
from datetime import timedelta
from typing import Any

from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import StateType
from prefect.events.actions import CallWebhook, ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.states import AwaitingRetry, Cancelled, Crashed
from pydantic import SecretStr

POOL, QUEUE = "detr", "training"
WEBHOOK = "DETR_WEBHOOK_URL"  # in the environment: the address that failures are told
HEARTBEAT = "prefect.flow-run.heartbeat"
SILENT_SECONDS = 180  # without a heartbeat, which come every 30 seconds, after which a run counts as dead
MOST_ATTEMPTS = 5  # after which a run that died each time is not resumed by itself
ANY_RUN = ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]})
TOLD = '{"text": {{ (flow_run.name ~ ": " ~ flow_run.state.name ~ ": " ~ flow_run.state.message)|tojson }}}'


def prepare() -> None:
    """Makes on the server of PREFECT_API_URL what is missing there; to run it again is safe."""
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
            match=ANY_RUN,
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=SILENT_SECONDS),
        )
        crashed = ChangeFlowRunState(
            name="Crashed",
            state=StateType.CRASHED,
            force=False,
            message=f"no sign of life for {SILENT_SECONDS} seconds; retry it: it goes on from its last state",
        )
        automate(client, "A silent run has crashed", silent, crashed)
        if url := os.environ.get(WEBHOOK):
            block: Any = Webhook(url=SecretStr(url)).save("detr-failures", overwrite=True)
            failed = EventTrigger(
                expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
                match=ANY_RUN,
                posture=Posture.Reactive,
                threshold=1,
            )
            automate(client, "Failures are told", failed, CallWebhook(block_document_id=block, payload=TOLD))


def automate(client: SyncPrefectClient, name: str, trigger: EventTrigger, action: Any) -> None:
    """Makes an automation, in the place of one of the same name."""
    for other in client.read_automations_by_name(name):
        client.delete_automation(other.id)
    client.create_automation(AutomationCore(name=name, trigger=trigger, actions=[action]))


def resume_interrupted() -> list[str]:
    """Has the runs that died with their machine run again, from their last state; their names.

    Nothing of the pool may be alive.
    """
    states = FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.CANCELLING])
    found = []
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=states)),
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL])),
        )
        for run in runs:
            if run.state_type == StateType.CANCELLING:
                client.set_flow_run_state(
                    run.id, Cancelled(message="it was being cancelled when all stopped"), force=True
                )
            elif run.run_count >= MOST_ATTEMPTS:
                said = f"it died in {run.run_count} attempts; retry it by hand when the cause is found"
                client.set_flow_run_state(run.id, Crashed(message=said), force=True)
            else:
                said = "it was interrupted and goes on from its last state"
                client.set_flow_run_state(run.id, AwaitingRetry(message=said), force=True)
                found.append(run.name)
    return found
