"""Champion and challenger."""

from typing import TYPE_CHECKING, Any

from pipelines import tracking
from pipelines.tracking import MODEL

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


def champion(client: "MlflowClient") -> "ModelVersion | None":
    """The version that serves, or None before the first registration."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(MODEL, "champion")
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
    import mlflow

    try:
        return mlflow.artifacts.load_dict(f"runs:/{best.run_id}/{path}")
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} of version {best.version}, the champion, cannot be read: {reason}") from error


def version_with(client: "MlflowClient", weights_sha256: str) -> "ModelVersion | None":
    """The ready version that has these weights, if one was registered before."""
    found = client.search_model_versions(f"name = '{MODEL}' and tags.weights_sha256 = '{weights_sha256}'")
    return min((v for v in found if v.status == "READY"), key=lambda v: int(v.version), default=None)


def current_alias(client: "MlflowClient", version: "ModelVersion") -> str:
    """The aliases of a version; the newest one gets what was decided if a kill came before it was set."""
    aliases = client.get_model_version(MODEL, version.version).aliases
    newest = max(int(v.version) for v in client.search_model_versions(f"name = '{MODEL}'"))
    if not aliases and int(version.version) == newest:
        client.set_registered_model_alias(MODEL, version.tags["decision"], version.version)
        return str(version.tags["decision"])
    return ", ".join(aliases) or "no alias"


def decide(candidate_ap: float, champion_ap: float | None, min_ap_gain: float) -> tuple[str, str]:
    """The alias of a candidate, and why: champion when there is none, or when it gains at least `min_ap_gain` AP."""
    if champion_ap is None:
        return "champion", "there was no champion"
    gain = candidate_ap - champion_ap
    if gain > 0 and gain >= min_ap_gain:
        return "champion", f"AP {candidate_ap:.4f} beats the champion's {champion_ap:.4f} by {gain:.4f}"
    return "challenger", f"AP {candidate_ap:.4f} does not beat the champion's {champion_ap:.4f} by {min_ap_gain:g}"
