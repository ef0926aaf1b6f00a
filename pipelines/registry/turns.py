"""Whose turn it is to change the registry, among all processes that use the tracking server."""

import contextlib
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from mlflow import MlflowClient

TURNS = "detr-registrations"  # the experiment whose one run holds whose turn it was
BEAT_SECONDS = 10.0
STALE_SECONDS = 120.0  # without a beat, after which a process on another host counts as dead
POLL_SECONDS = 0.5


@contextlib.contextmanager
def take_turn(client: "MlflowClient") -> Iterator[Callable[[], None]]:
    """One's turn to change the registry: of all processes that use the tracking server one has it, the others wait.

    A run's parameters are what MLflow lets nobody write twice, so whoever logs `turn-N` first has turn N, until it logs
    `end-N` or is dead: its process is gone from this host, or it gave no beat from another for STALE_SECONDS. Yields a
    function that raises RuntimeError if it is somebody else's turn by now, to call before what must not come late.
    """
    run_id, owner = _turns(client), f"{_host()} {os.getpid()} {_started(os.getpid())} {uuid.uuid4().hex[:8]}"
    number = _take(client, run_id, owner)
    over = threading.Event()

    def beat() -> None:
        count = 0
        while not over.wait(BEAT_SECONDS):
            count += 1
            with contextlib.suppress(Exception):
                client.set_tag(run_id, "beat", f"{number} {count}")

    def check() -> None:
        if _last(client.get_run(run_id).data.params) != number:
            raise RuntimeError(
                f"this process gave no sign for {STALE_SECONDS:.0f} seconds, another registers now; run again"
            )

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield check
    finally:
        over.set()
        with contextlib.suppress(Exception):  # the next one finds this process dead
            client.log_param(run_id, f"end-{number}", owner)


def _take(client: "MlflowClient", run_id: str, owner: str) -> int:
    seen, since, said = ("", ""), time.monotonic(), False
    while True:
        data = client.get_run(run_id).data
        number = _last(data.params)
        holder = data.params.get(f"turn-{number}", "")
        if holder == owner:
            return number
        if (holder, data.tags.get("beat", "")) != seen:
            seen, since = (holder, data.tags.get("beat", "")), time.monotonic()
        silent = time.monotonic() - since > STALE_SECONDS
        if not holder or f"end-{number}" in data.params or silent or _is_gone(holder):
            try:
                client.log_param(run_id, f"turn-{number + 1}", owner)
            except Exception:
                if _last(client.get_run(run_id).data.params) == number:
                    raise
            continue
        if not said:
            host, _, process, *_ = holder.split()
            print(f"waiting for process {process} on {host}, which changes the registry", flush=True)
            said = True
        time.sleep(POLL_SECONDS)


def _last(params: dict[str, str]) -> int:
    return max((int(name.removeprefix("turn-")) for name in params if name.startswith("turn-")), default=0)


def _turns(client: "MlflowClient") -> str:
    """The id of the run that holds the turns. It is made under another name, since others may be faster."""
    experiment = client.get_experiment_by_name(TURNS)
    if experiment is None:
        made = client.create_experiment(f"{TURNS}-{uuid.uuid4().hex}")
        client.set_terminated(client.create_run(made, run_name="turns").info.run_id)
        try:
            client.rename_experiment(made, TURNS)
        except Exception:
            client.delete_experiment(made)
        experiment = client.get_experiment_by_name(TURNS)
    if experiment is not None and experiment.lifecycle_stage != "active":
        client.restore_experiment(experiment.experiment_id)
    runs = client.search_runs([experiment.experiment_id], max_results=1) if experiment is not None else []
    if not runs:
        raise ValueError(f"MLflow's experiment {TURNS}, which orders registrations, has lost its run: restore it")
    return str(runs[0].info.run_id)


def _host() -> str:
    """Where process ids mean the same: a host's name and, on Linux, its namespace of processes."""
    space = Path("/proc/self/ns/pid")
    return f"{platform.node() or '?'} {os.readlink(space) if space.exists() else '-'}"


def _started(pid: int) -> str:
    return f"{psutil.Process(pid).create_time():.1f}"


def _is_gone(owner: str) -> bool:
    """Whether a process of this host has ended; false for other hosts."""
    host, space, pid, started, _ = owner.split()
    if f"{host} {space}" != _host():
        return False
    try:
        process = psutil.Process(int(pid))
        return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - float(started)) > 1
    except psutil.NoSuchProcess:
        return True
