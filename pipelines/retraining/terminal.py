"""A run of a flow in a person's terminal: its server, what is shown of its log, how it is stopped."""

import contextvars
import logging
import os
import re
import signal
import threading
from typing import Any

from prefect.client.schemas.objects import State
from prefect.settings import get_current_settings

from pipelines.workspace.dvc import StageFailed


def is_progress(record: logging.LogRecord) -> bool:
    """Whether a line of the log is for a person in a terminal, to whom how it ended is said last, in one line."""
    ended = re.match(r"Finished in state (Failed|Crashed|Cancelled)|Stopping temporary server", record.getMessage())
    return record.levelno < logging.ERROR and ended is None


def run(of: Any, *arguments: Any, **options: Any) -> Any:
    """Runs a flow here, with Prefect's server or an embedded one; what it gives.

    Raises StageFailed, and KeyboardInterrupt once Prefect has the run as cancelled.
    """
    if not os.environ.get("DETR_TRACEBACK"):
        for handler in logging.getLogger().handlers:
            handler.addFilter(is_progress)
    start_server()
    state: State = of(*arguments, **options, return_state=True)
    if state.is_cancelled():
        raise KeyboardInterrupt(state.message)
    if not state.is_completed():
        raise StageFailed(state.message or "the flow did not complete")
    return state.result()


def start_server() -> None:
    """Starts Prefect's temporary server where no other is named.

    It does not hear what ends us from a terminal, Ctrl-C or its closing: it is to be told how the run ended.
    """
    if get_current_settings().api.url:
        return
    from prefect.server.api.server import SubprocessASGIServer

    server, done = SubprocessASGIServer(), threading.Event()
    failed: list[Exception] = []

    def start() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))  # of this thread, and so of its child
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
