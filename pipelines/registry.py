"""Champion and challenger."""

from typing import TYPE_CHECKING

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


def version_with(client: "MlflowClient", weights_sha256: str) -> "ModelVersion | None":
    """The ready version that has these weights, if one was registered before."""
    found = client.search_model_versions(f"name = '{MODEL}' and tags.weights_sha256 = '{weights_sha256}'")
    return min((v for v in found if v.status == "READY"), key=lambda v: int(v.version), default=None)


def decide(candidate_ap: float, champion_ap: float | None, min_ap_gain: float) -> tuple[str, str]:
    """The alias of a candidate, and why: champion when there is none, or when it gains at least `min_ap_gain` AP."""
    if champion_ap is None:
        return "champion", "there was no champion"
    gain = candidate_ap - champion_ap
    if gain > 0 and gain >= min_ap_gain:
        return "champion", f"AP {candidate_ap:.4f} beats the champion's {champion_ap:.4f} by {gain:.4f}"
    return "challenger", f"AP {candidate_ap:.4f} does not beat the champion's {champion_ap:.4f} by {min_ap_gain:g}"
