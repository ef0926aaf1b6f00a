"""MLflow as a view of the files: the only module that writes runs to it; `registry.py` writes versions.

Training mirrors its rows from a thread of its own; whatever a slow or dead server missed is filled in
from the files when the model is registered.
"""

import hashlib
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "detr"
MODEL = "detr"
VALIDATION_METRICS = ("AP", "AR")  # prefixes of what is measured on the validation images


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or the SQLite file in the root of the project."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


def is_there() -> bool:
    """Whether there can be anything yet: a server, or a database file that was made before."""
    uri = tracking_uri()
    return not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).exists()


def connect() -> "MlflowClient":
    """A client whose server has answered. Raises ValueError that names the server when it does not."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    import logging

    import mlflow

    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = tracking_uri()
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    client = mlflow.MlflowClient(uri, uri)
    try:
        client.search_experiments(max_results=1)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"MLflow at {uri} is unreachable ({reason}); start it or unset MLFLOW_TRACKING_URI") from error
    return client


def find_run(client: "MlflowClient", fingerprint: str, name: str) -> str:
    """The id of the run tagged with the fingerprint of a training, made if there is none."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        uri = tracking_uri()
        store = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" if uri.startswith("sqlite:///") else None
        try:
            experiment_id = client.create_experiment(EXPERIMENT, store.as_uri() if store else None)
        except Exception:  # another process may have been faster
            experiment = client.get_experiment_by_name(EXPERIMENT)
            if experiment is None:
                raise
            experiment_id = experiment.experiment_id
    else:
        experiment_id = experiment.experiment_id
    found = client.search_runs([experiment_id], f"tags.fingerprint = '{fingerprint}'", max_results=1)
    if found:
        return str(found[0].info.run_id)
    return str(client.create_run(experiment_id, tags={"fingerprint": fingerprint}, run_name=name).info.run_id)


def flatten(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def log_params(client: "MlflowClient", run_id: str, document: dict[str, Any]) -> None:
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params
    params = [Param(key, str(value)[:6000]) for key, value in flatten(document).items() if key not in known]
    for start in range(0, len(params), 100):
        client.log_batch(run_id, params=params[start : start + 100])


def log_rows(client: "MlflowClient", run_id: str, rows: Iterable[dict[str, float]]) -> None:
    """Logs rows {"step": ..., name: value} in batches of at most 1,000 values."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = [
        Metric(f"{'val' if name.startswith(VALIDATION_METRICS) else 'train'}/{name}", value, now, int(row["step"]))
        for row in rows
        for name, value in row.items()
        if name != "step"
    ]
    for start in range(0, len(metrics), 1000):
        client.log_batch(run_id, metrics=metrics[start : start + 1000])


def logged_steps(client: "MlflowClient", run_id: str, name: str) -> set[int]:
    """The steps at which the run has the training metric `name`."""
    return {metric.step for metric in client.get_metric_history(run_id, f"train/{name}")}


def fill_in(client: "MlflowClient", run_id: str, rows: list[dict[str, float]]) -> int:
    """Logs what the run lacks of `rows`, and says how many rows that were."""
    missing = rows
    for name in ("loss", "images_per_second"):
        if rows and name in rows[0]:
            known = logged_steps(client, run_id, name)
            missing = [row for row in rows if row["step"] not in known]
    log_rows(client, run_id, missing)
    return len(missing)


class Mirror:
    """Sends rows to MLflow from a daemon thread; no failure there reaches the caller, who never waits.

    A row that cannot be sent is kept and tried again; one warning says so. Steps that the run has already,
    from a training that was killed or repeated, are not sent again.
    """

    def __init__(self, fingerprint: str, name: str, document: dict[str, Any]) -> None:
        self._rows: queue.SimpleQueue[dict[str, float] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(fingerprint, name, document), daemon=True)
        self._thread.start()

    def put(self, row: dict[str, float]) -> None:
        self._rows.put(row)

    def close(self, timeout_seconds: float = 10.0) -> None:
        """Waits for what is under way, at most `timeout_seconds`."""
        self._rows.put(None)
        self._thread.join(timeout_seconds)

    def _work(self, fingerprint: str, name: str, document: dict[str, Any]) -> None:
        client, run_id, known, warned = None, "", set[int](), False
        pending: list[dict[str, float]] = []
        while True:
            row = self._rows.get()
            while row is not None:
                pending.append(row)
                if self._rows.empty():
                    break
                row = self._rows.get()
            try:
                if client is None:
                    client = connect()
                    run_id = find_run(client, fingerprint, name)
                    log_params(client, run_id, document)
                    known = logged_steps(client, run_id, "loss")
                log_rows(client, run_id, [row for row in pending if row["step"] not in known])
                pending = []
            except Exception as error:
                if not warned:
                    print(f"warning: MLflow misses rows, they are filled in at registration: {error}", file=sys.stderr)
                    warned = True
            if row is None:
                return


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a JSON-lines file, none where it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
