"""Champion, challenger and the champion before; and whose turn it is to change them."""

import contextlib
import json
import os
import platform
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from pipelines.registry import tracking
from pipelines.registry.tracking import MODEL

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CLASS_AP = "class_AP/"  # the prefix of the metrics of a run, by category
TURNS = "detr-registrations"  # the experiment whose one run holds whose turn it was
BEAT_SECONDS = 10.0
STALE_SECONDS = 120.0  # without a beat, after which a process on another host counts as dead
POLL_SECONDS = 0.5


def champion(client: "MlflowClient") -> "ModelVersion | None":
    """The version that serves, or None before the first registration."""
    return with_alias(client, "champion")


def rival(alias: str | None) -> str:
    """What the champion that a version was judged against is called once the version has its alias."""
    return "champion before" if alias == "champion" else "champion"


def with_alias(client: "MlflowClient", alias: str) -> "ModelVersion | None":
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(MODEL, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def champions_file(path: str) -> Any:
    """What a JSON file among the champion's artifacts holds, None before the first champion.

    Raises ValueError where MLflow does not answer or has no such file.
    """
    if not tracking.is_there():
        return None
    client = tracking.connect()
    best = champion(client)
    if best is None:
        return None
    try:
        return json.loads(run_file(client, best.run_id, path))
    except ValueError as error:
        raise ValueError(f"{path} of version {best.version}, the champion, cannot be read: {error}") from error


def run_file(client: "MlflowClient", run_id: str, path: str) -> bytes:
    """A file among a run's artifacts. Raises ValueError where it has none, or it cannot be had."""
    with tempfile.TemporaryDirectory() as folder:
        found = tracking.fetch_artifact(client, run_id, path, Path(folder))
        if found is None:
            raise ValueError(f"MLflow's run {run_id} has no {path}")
        return found.read_bytes()


def has_files(client: "MlflowClient", version: "ModelVersion") -> bool:
    """Whether the model is still in the artifact store."""
    import mlflow

    place = client.get_model_version_download_uri(MODEL, str(version.version))
    return any(file.path.endswith("MLmodel") for file in mlflow.artifacts.list_artifacts(artifact_uri=place))


def class_aps(client: "MlflowClient", version: "ModelVersion") -> dict[str, float]:
    """AP by the name in metrics of each category with objects, none where the run is gone or of an older release."""
    from mlflow.exceptions import MlflowException

    try:
        metrics = client.get_run(version.run_id).data.metrics
    except MlflowException:
        return {}
    return {name.removeprefix(CLASS_AP): ap for name, ap in metrics.items() if name.startswith(CLASS_AP) and ap >= 0}


def version_with(client: "MlflowClient", weights_sha256: str) -> "ModelVersion | None":
    """The ready version that has these weights, if one was registered before and its files are there still."""
    found = client.search_model_versions(f"name = '{MODEL}' and tags.weights_sha256 = '{weights_sha256}'")
    ready = sorted((v for v in found if v.status == "READY"), key=lambda v: int(v.version))
    return next((client.get_model_version(MODEL, str(v.version)) for v in ready if has_files(client, v)), None)


def place(client: "MlflowClient", version: "ModelVersion", alias: str, check: Callable[[], None]) -> None:
    """Gives the alias to the version; the champion that it follows stays as `previous_champion`.

    `check` is that of the turn. Killed anywhere and repeated it ends the same.
    """
    before = champion(client)
    if alias == "champion" and before is not None and int(before.version) != int(version.version):
        check()
        client.set_registered_model_alias(MODEL, "previous_champion", str(before.version))
    check()
    client.set_registered_model_alias(MODEL, alias, str(version.version))


def rollback() -> str:
    """Champion and previous champion change places; the line that says so.

    One that was killed is completed by the next registration or rollback. Raises ValueError without a previous one.
    """
    client = tracking.connect_to_models()
    with plainly("the rollback"), turn(client) as check:
        if finished := finish_rollback(client, check):
            return finished
        best, before = champion(client), with_alias(client, "previous_champion")
        if best is None or before is None or best.version == before.version:
            now = f"version {best.version}" if best else "none"
            raise ValueError(f"there is no previous champion to go back to; the champion is {now}")
        check()
        client.set_registered_model_tag(MODEL, "rollback", f"{best.version} {before.version}")
        return finish_rollback(client, check)


def finish_rollback(client: "MlflowClient", check: Callable[[], None]) -> str:
    """Completes the rollback that was begun, if any; the line that says so."""
    from mlflow.exceptions import MlflowException

    try:
        tag = client.get_registered_model(MODEL).tags.get("rollback")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return ""
        raise
    if not tag:
        return ""
    worse, better = tag.split()
    check()
    client.set_registered_model_alias(MODEL, "champion", better)
    client.set_registered_model_alias(MODEL, "previous_champion", worse)
    client.delete_registered_model_tag(MODEL, "rollback")
    return f"{MODEL} version {better} is the champion again, version {worse} the previous one"


@contextlib.contextmanager
def plainly(what: str) -> Iterator[None]:
    """Turns what MLflow raises into a ValueError of one line."""
    import requests
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, requests.RequestException) as error:
        reason = " ".join(str(error).partition("[SQL")[0].split())[:300]
        raise ValueError(
            f"{what} stopped, MLflow at {tracking.tracking_uri()} failed: {reason}; see to its server, its "
            "database and the space of its artifact store, and run again: it goes on from there"
        ) from error


@contextlib.contextmanager
def turn(client: "MlflowClient") -> Iterator[Callable[[], None]]:
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
