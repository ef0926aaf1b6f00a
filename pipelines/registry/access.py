"""Whether MLflow takes what a run writes: tried before a training relies on it."""

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.registry.tracking import LOGIN, MODEL, find_experiment, get_tracking_uri
from pipelines.stage import quote_error

if TYPE_CHECKING:
    from mlflow import MlflowClient

MARK = "project"  # the tag that is written; it says whose experiment and model it is


def require_writable(client: "MlflowClient") -> None:
    """Raises ValueError where the server answers and refuses a run's rows, its model or its files.

    Makes the experiment, as a training would, and writes a tag; of files an empty one, which it removes.
    """
    try:
        experiment = find_experiment(client)
        client.set_experiment_tag(experiment.experiment_id, MARK, MODEL)
        for model in client.search_registered_models(f"name = '{MODEL}'"):
            client.set_registered_model_tag(model.name, MARK, MODEL)
    except Exception as error:
        reason = quote_error(error)
        raise ValueError(
            f"MLflow at {get_tracking_uri()} answers, but refuses what a run writes ({reason}); {LOGIN} of one who may "
            "write there, see to its database, or unset MLFLOW_TRACKING_URI"
        ) from error
    require_store(experiment.artifact_location)


def require_store(location: str) -> None:
    """Raises ValueError where no file can be written among those of an experiment."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    try:
        with tempfile.TemporaryDirectory() as folder:
            tried = Path(folder) / "writable"
            tried.touch()
            store = get_artifact_repository(location)
            store.log_artifact(str(tried))
            with suppress(Exception):  # not every store lets files be removed
                store.delete_artifacts(tried.name)
    except Exception as error:  # of the store's own library, too
        reason = quote_error(error)
        raise ValueError(
            f"MLflow's files at {location} cannot be written ({reason}); see to the store, or to the credentials here"
        ) from error
