"""A run of a flow in a person's terminal: its server, what is shown of its log, how it is stopped, that it has died."""

import contextvars
import logging
import os
import re
import signal
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State
from prefect.settings import get_current_settings
from prefect.states import Crashed

from pipelines.locks import hold_lock, is_held
from pipelines.surroundings import HOST
from pipelines.workspace import interruption
from pipelines.workspace.dvc import StageFailed
from pipelines.workspace.processes import start_tied


def is_progress(record: logging.LogRecord) -> bool:
    """Whether a line of the log is for a person in a terminal, to whom how it ended is said last, in one line."""
    ended = r"Finished in state (Failed|Crashed|Cancelled)|Stopping temporary server|Still processing items"
    ours = r"(Running h|H)ook 'take_over'"
    return record.levelno < logging.ERROR and not re.match(f"{ended}|{ours}", record.getMessage())


def run(of: Any, *arguments: Any, **options: Any) -> Any:
    """Runs a flow here, with Prefect's server or an embedded one; what it gives.

    Raises StageFailed, and KeyboardInterrupt once Prefect has the run as cancelled.
    """
    if not os.environ.get("DETR_TRACEBACK"):
        for handler in logging.getLogger().handlers:
            handler.addFilter(is_progress)
    start_server()
    report_dead()
    with ExitStack() as held:

        def take_over(flow: Any, run: Any, state: State) -> None:
            interruption.listen(signal.SIGTERM)  # which Prefect has taken for itself
            held.enter_context(hold_lock(find_locks() / str(run.id)))

        state: State = of.with_options(on_running=[take_over])(*arguments, **options, return_state=True)
    if state.is_cancelled():
        raise KeyboardInterrupt(state.message)
    if not state.is_completed():
        raise StageFailed(state.message or "the flow did not complete")
    return state.result()


def start_server() -> None:
    """Starts Prefect's temporary server where no other is named.

    It does not hear what ends us, such as Ctrl-C or the closing of a terminal: it is to be told how the run ended.
    """
    if get_current_settings().api.url:
        return
    from prefect.server.api.server import SubprocessASGIServer

    server, done = SubprocessASGIServer(), threading.Event()
    server._run_uvicorn_command = lambda: start_server_at(server.port)  # type: ignore[method-assign]
    failed: list[Exception] = []

    def start() -> None:
        try:
            server.start()
        except Exception as error:
            failed.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=contextvars.copy_context().run, args=(start,), daemon=True)
    try:
        thread.start()
        done.wait()
    except KeyboardInterrupt:
        while server.server_process is None and not done.wait(0.01):  # it is just being started
            pass
        server.stop()
        raise
    if failed:
        raise RuntimeError(f"Prefect's temporary server does not start: {failed[0]}")


def start_server_at(port: int | None) -> Any:
    """Prefect's own command, but for where it runs."""
    own = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    asked = ("--host", HOST, "--port", str(port), "--log-level", "error", "--lifespan", "on")
    command = ["uvicorn", "--factory", "prefect.server.api.server:create_app", *asked]
    return start_tied(command, os.environ | own | get_current_settings().to_environment_variables(exclude_unset=True))


def find_locks() -> Path:
    """A file for each run in a terminal, locked as long as its process lives."""
    return get_current_settings().home / "terminals"


def report_dead() -> None:
    """Tells Prefect of the runs whose process was killed before it could."""
    for path in find_locks().glob("*"):
        with suppress(Exception):  # of another server than the run had, or none: nobody waits for this
            if not is_held(path):
                report_dead_run(path)


def report_dead_run(path: Path) -> None:
    run_id = UUID(path.name)
    dead: State = Crashed(message="its process was killed; the same command goes on from the last state")
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(run_id)
        if is_held(path):  # it was just being locked
            return
        if run.state and not run.state.is_final():
            client.set_flow_run_state(run_id, dead, force=True)
        for task in client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id]))):
            if task.state and not task.state.is_final():
                client.set_task_run_state(task.id, dead, force=True)
    path.unlink()
