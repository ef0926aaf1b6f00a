"""MLflow as a view of the files: its runs, filled from them, and its versions, read. `aliases.py` writes versions."""

import contextlib
import hashlib
import json
import os
import posixpath
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipelines.labels import ABSENT
from pipelines.redaction import hide_users
from pipelines.registry.database import EXPERIMENT, find_artifacts, prepare_database, quieten_mlflow
from pipelines.stage import find_project, quote_error

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment
    from mlflow.entities.model_registry import ModelVersion

SQLITE = "sqlite:///"  # and the path of a file
MODEL = "detr"
LOGIN = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN,"
VALIDATION_METRICS = ("AP", "AR")  # prefixes of what is measured on the validation images
SYSTEM = "system/"  # the prefix of what MLflow shows as system metrics
PICTURES = "pictures"  # the folder of a run's examples, among its artifacts


def get_tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or the SQLite file in the root of the project, where a relative one lies too."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    uri = re.sub(r"^sqlite(\+\w+)?:///", SQLITE, uri, flags=re.IGNORECASE)  # a driver changes no file
    return f"{SQLITE}{(find_project() / uri.removeprefix(SQLITE)).resolve()}" if uri.startswith(SQLITE) else uri


def find_database(uri: str) -> Path | None:
    """MLflow's SQLite file, None where a server has it."""
    return Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None


def require_known(uri: str) -> None:
    """Raises ValueError for an address that MLflow would take for another, or not at all after minutes."""
    place = uri.removeprefix(SQLITE)
    if place != uri and (odd := re.search(r"\?|%[0-9A-Fa-f]{2}|:memory:", place)):
        raise ValueError(
            f"MLflow's database is {place}, in which {odd[0]!r} means something else to MLflow; rename the folder, or "
            f"set MLFLOW_TRACKING_URI to {SQLITE}/ANOTHER/FOLDER/mlflow.db"
        )
    try:
        is_known = not Path(place).is_dir() if place != uri else "://" in uri and bool(urlsplit(uri).netloc)
    except ValueError:  # half an IPv6 address
        is_known = False
    if not is_known:
        is_folder = uri.startswith(("file:", ".", "/", "~")) or Path(uri).is_dir()
        what = ", a folder, which MLflow takes no more" if is_folder else ""
        raise ValueError(
            f"MLFLOW_TRACKING_URI is {uri!r}{what}; expected {SQLITE}mlflow.db or http://HOST:PORT; unset it for the "
            "first"
        )


def is_there() -> bool:
    """Whether there can be anything yet: a server, or a database file that was made before."""
    return (database := find_database(get_tracking_uri())) is None or database.exists()


def connect() -> "MlflowClient":
    """A client whose server has answered. Raises ValueError that names the server when it does not."""
    uri = get_tracking_uri()
    require_known(uri)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    import mlflow

    quieten_mlflow()
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        if database := find_database(uri):
            prepare_database(database)
        (client := mlflow.MlflowClient(uri, uri)).search_experiments(max_results=1)
    except ValueError:
        raise
    except Exception as error:
        reason = quote_error(error)
        is_refused = re.search(r"error code 40[137]|UNAUTHENTICATED|PERMISSION_DENIED|not in a valid JSON", reason)
        said = f"MLflow at {uri} is unreachable ({reason}); start it"
        said = f"MLflow at {uri} wants a login ({reason}); {LOGIN}" if is_refused else said
        raise ValueError(f"{hide_users(said)} or unset MLFLOW_TRACKING_URI") from error
    return client


def has_run(client: "MlflowClient", fingerprint: str) -> bool:
    """Whether there is a run of the training with this fingerprint, or was before somebody deleted it."""
    from mlflow.entities import ViewType

    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return False
    wanted = f"tags.fingerprint = '{fingerprint}'"
    return bool(client.search_runs([experiment.experiment_id], wanted, ViewType.ALL, max_results=1))


def find_experiment(client: "MlflowClient") -> "Experiment":
    """The experiment of the trainings, made if there is none."""
    if found := client.get_experiment_by_name(EXPERIMENT):
        return found
    store = find_artifacts(database) if (database := find_database(get_tracking_uri())) else None
    try:
        return client.get_experiment(client.create_experiment(EXPERIMENT, store))
    except Exception:
        if found := client.get_experiment_by_name(EXPERIMENT):  # another process was faster
            return found
        raise


def find_run(client: "MlflowClient", fingerprint: str, name: str) -> str:
    """The id of the run tagged with the fingerprint of a training, made if there is none."""
    experiment_id = find_experiment(client).experiment_id
    found = client.search_runs([experiment_id], f"tags.fingerprint = '{fingerprint}'", max_results=1)
    run = found[0] if found else client.create_run(experiment_id, tags={"fingerprint": fingerprint}, run_name=name)
    return str(run.info.run_id)


def flatten(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; a mapping by names that are no keys of MLflow's is one value, as JSON."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if not isinstance(value, dict):
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
        elif all(is_key(f"{prefix}{key}.{name}") for name in value):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, ensure_ascii=False)
    return flat


def is_key(name: str) -> bool:
    """Whether MLflow takes a name for a parameter, and for no path to another."""
    return bool(re.fullmatch(r"[/\w.\- :]{1,250}", name)) and posixpath.normpath(name) == name


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
    metrics = [Metric(_key(name), value, now, int(row["step"])) for row in rows for name, value in _values(row)]
    for start in range(0, len(metrics), 1000):
        client.log_batch(run_id, metrics=metrics[start : start + 1000])


def fill_in(
    client: "MlflowClient", run_id: str, rows: Iterable[dict[str, float]], known: dict[str, set[int]] | None = None
) -> int:
    """Logs the values of `rows` that the run lacks, and says of how many steps those were.

    Of several rows of one step the last value of a name counts. `known` holds steps that the run has by name: a name
    in it is not asked for, any other costs one request; it learns what is asked and logged.
    """
    known = {} if known is None else known
    by_step: dict[int, dict[str, float]] = {}
    for row in rows:
        by_step.setdefault(int(row["step"]), {}).update(row)
    there = None
    for name in dict.fromkeys(name for row in by_step.values() for name, _ in _values(row)):
        if name not in known:
            there = client.get_run(run_id).data.metrics if there is None else there
            history = client.get_metric_history(run_id, _key(name)) if _key(name) in there else ()
            known[name] = {metric.step for metric in history}
    missing = []
    for step, row in by_step.items():
        if lacking := {name: value for name, value in _values(row) if step not in known[name]}:
            missing.append({"step": step, **lacking})
    log_rows(client, run_id, missing)
    for row in missing:
        for name, _ in _values(row):
            known[name].add(int(row["step"]))
    return len(missing)


def fill_in_pictures(client: "MlflowClient", run_id: str, folder: Path) -> int:
    """Logs the pictures of `folder` that the run lacks or has in part, and says how many those were."""
    there = {Path(file.path).name: file.file_size for file in client.list_artifacts(run_id, PICTURES)}
    missing = [path for path in sorted(folder.glob("*.png")) if there.get(path.name) != path.stat().st_size]
    for path in missing:
        client.log_artifact(run_id, str(path), PICTURES)
    return len(missing)


def _key(name: str) -> str:
    if name.startswith(SYSTEM):
        return name
    return f"{'val' if name.startswith(VALIDATION_METRICS) else 'train'}/{name}"


def _values(row: dict[str, float]) -> list[tuple[str, float]]:
    return [(name, value) for name, value in row.items() if name != "step" and value != ABSENT]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a JSON-lines file, none where it does not exist; half a last line, of a killed process, is dropped.

    Raises ValueError that names the file and the line when any other line is damaged.
    """
    if not path.exists():
        return []
    *lines, torn = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path} is damaged at line {number} ({error}); remove the line and run again") from error
    with contextlib.suppress(ValueError):
        rows.append(json.loads(torn))
    return rows


def connect_to_models() -> "MlflowClient":
    """`connect`, for those who need a model. Raises ValueError where none can have been registered yet."""
    if not is_there():
        raise ValueError(f"nothing is registered yet: {get_tracking_uri()} does not exist; python -m pipelines run")
    return connect()


def find_version(client: "MlflowClient", model: str) -> "ModelVersion":
    """The version that `models:/detr/3`, `models:/detr@champion`, `3` or `champion` names.

    Raises ValueError that lists those there are.
    """
    from mlflow.exceptions import MlflowException

    name, separator, which = model.removeprefix("models:/").replace("@", "/").rpartition("/")
    if separator and name != MODEL:
        raise ValueError(
            f"{model} is of the model {name!r}; expected models:/{MODEL}/VERSION, or a version, or an alias"
        )
    try:
        if which.isdecimal():
            return client.get_model_version(MODEL, which)
        return client.get_model_version_by_alias(MODEL, which)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            said = " ".join(str(error).split())
            raise ValueError(f"{model} cannot be had from {get_tracking_uri()}: {said}") from error
    found = client.search_model_versions(f"name = '{MODEL}'")
    versions = ", ".join(map(str, sorted(int(version.version) for version in found))) or "none"
    aliases = client.get_registered_model(MODEL).aliases if found else {}
    named = ", ".join(f"{alias} ({number})" for alias, number in sorted(aliases.items())) or "none"
    raise ValueError(f"{get_tracking_uri()} has no {model}; versions of {MODEL}: {versions}; aliases: {named}")


def fetch_model_file(version: str, path: str, folder: Path) -> Path:
    """A file of a registered version, by its number, fetched into `folder`. Raises ValueError."""
    import mlflow

    uri = f"models:/{MODEL}/{version}/{path}"
    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder)))
    except Exception as error:  # of the artifact store's own library too
        raise ValueError(f"{uri} cannot be had: {quote_error(error)}") from error


def list_versions(client: "MlflowClient") -> list["ModelVersion"]:
    """Every version of the registered model, newest first."""
    return sorted(client.search_model_versions(f"name = '{MODEL}'"), key=lambda version: -int(version.version))


def fetch_artifact(client: "MlflowClient", run_id: str, path: str, folder: Path) -> Path | None:
    """The local file or folder of an artifact, fetched into `folder`; None where the run has none of that path.

    Raises ValueError where the run lists it but its content cannot be had.
    """
    try:
        parent = path.rpartition("/")[0] or None
        if path not in {entry.path for entry in client.list_artifacts(run_id, parent)}:
            return None
        return Path(client.download_artifacts(run_id, path, str(folder)))
    except Exception as error:
        reason = quote_error(error)
        raise ValueError(f"{path} of MLflow's run {run_id} cannot be read: {reason}") from error
