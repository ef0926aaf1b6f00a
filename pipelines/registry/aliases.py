"""Champion, challenger and the champion before: which versions they are, and how they change places."""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.registry import tracking
from pipelines.registry.tracking import MODEL
from pipelines.registry.turns import take_turn

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CLASS_AP = "class_AP/"  # the prefix of the metrics of a run, by category


def get_champion(client: "MlflowClient") -> "ModelVersion | None":
    """The version that serves, or None before the first registration."""
    return get_by_alias(client, "champion")


def name_rival(alias: str | None) -> str:
    """What the champion that a version was judged against is called once the version has its alias."""
    return "champion before" if alias == "champion" else "champion"


def get_by_alias(client: "MlflowClient", alias: str) -> "ModelVersion | None":
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(MODEL, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def read_champions_file(path: str) -> Any:
    """What a JSON file among the champion's artifacts holds, None before the first champion.

    Raises ValueError where MLflow does not answer or has no such file.
    """
    if not tracking.is_there():
        return None
    client = tracking.connect()
    best = get_champion(client)
    if best is None:
        return None
    try:
        return json.loads(read_run_file(client, best.run_id, path))
    except ValueError as error:
        raise ValueError(f"{path} of version {best.version}, the champion, cannot be read: {error}") from error


def read_run_file(client: "MlflowClient", run_id: str | None, path: str) -> bytes:
    """A file among a run's artifacts. Raises ValueError where it has none, or it cannot be had."""
    with tempfile.TemporaryDirectory() as folder:
        found = tracking.fetch_artifact(client, run_id, path, Path(folder)) if run_id else None
        if found is None:
            raise ValueError(f"MLflow's run {run_id} has no {path}")
        return found.read_bytes()


def has_files(client: "MlflowClient", version: "ModelVersion") -> bool:
    """Whether the model is still in the artifact store."""
    import mlflow

    place = client.get_model_version_download_uri(MODEL, str(version.version))
    return any(file.path.endswith("MLmodel") for file in mlflow.artifacts.list_artifacts(artifact_uri=place))


def read_class_aps(client: "MlflowClient", version: "ModelVersion") -> dict[str, float]:
    """AP by the name in metrics of each category with objects, none where the run is gone or of an older release."""
    from mlflow.exceptions import MlflowException

    try:
        metrics = client.get_run(version.run_id or "").data.metrics
    except MlflowException:
        return {}
    return {name.removeprefix(CLASS_AP): ap for name, ap in metrics.items() if name.startswith(CLASS_AP) and ap >= 0}


def find_version_of(client: "MlflowClient", weights_sha256: str, config: Path) -> "ModelVersion | None":
    """The ready version that has these weights and answers as `config`, a config.json, says: its categories among it.

    None where none was registered before, or its files are gone.
    """
    found = client.search_model_versions(f"name = '{MODEL}' and tags.weights_sha256 = '{weights_sha256}'")
    ready = sorted((v for v in found if v.status == "READY"), key=lambda v: int(v.version))
    wanted = read_identity(config)
    for version in ready:
        number = str(version.version)
        with tempfile.TemporaryDirectory() as folder:
            if has_files(client, version):
                found_config = tracking.fetch_model_file(number, "artifacts/config.json", Path(folder))
                if read_identity(found_config) == wanted:
                    return client.get_model_version(MODEL, number)
    return None


def read_identity(config: Path) -> dict[str, Any]:
    """What of a config.json decides how the weights answer: all but which training they are of."""
    document: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    return {key: value for key, value in document.items() if key != "fingerprint"}


def place(client: "MlflowClient", version: "ModelVersion", alias: str, check: Callable[[], None]) -> None:
    """Gives the alias to the version; the champion that it follows stays as `previous_champion`.

    `check` is that of the turn. Killed anywhere and repeated it ends the same.
    """
    before = get_champion(client)
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
    with explain_errors("the rollback"), take_turn(client) as check:
        if finished := finish_rollback(client, check):
            return finished
        best, before = get_champion(client), get_by_alias(client, "previous_champion")
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
def explain_errors(what: str) -> Iterator[None]:
    """Turns what MLflow raises into a ValueError of one line."""
    import requests
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, requests.RequestException) as error:
        reason = " ".join(str(error).partition("[SQL")[0].split())[:300]
        raise ValueError(
            f"{what} stopped, MLflow at {tracking.get_tracking_uri()} failed: {reason}; see to its server, its "
            "database and the space of its artifact store, and run again: it goes on from there"
        ) from error
