"""What a run will need at its end, looked at before it begins: the registry, its files, room on the disk."""

import os
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlparse

from pipelines.data.layout import DATA
from pipelines.data.sources import require_inside
from pipelines.registry import tracking
from pipelines.registry.database import prepare_database
from pipelines.stage import require_name
from pipelines.workspace.cache import require_cache

ROOM = 256 * 2**20  # bytes of disk, below which not even the state of a small training fits


def check(root: Path) -> None:
    """Raises ValueError, one line with the remedy, where a run in `root` would fail after its training or before.

    From here on MLFLOW_TRACKING_URI and PREFECT_HOME are the same in every folder that a stage runs in.
    """
    require_room(root)
    require_name(root)
    require_cache(root)
    for folder in (DATA, Path("artifacts")):
        require_inside(root, folder)
    if home := os.environ.get("PREFECT_HOME"):
        os.environ["PREFECT_HOME"] = str(require_folder("PREFECT_HOME", Path(home).expanduser().absolute()))
    uri = os.environ["MLFLOW_TRACKING_URI"] = tracking.tracking_uri()
    tracking.require_known(uri)
    if database := tracking.database_of(uri):
        require_database(database)
        return
    client = tracking.connect()
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    if experiment is not None:
        require_store(experiment.artifact_location)


def require_room(place: Path) -> None:
    free = shutil.disk_usage(place).free
    if free < ROOM:
        raise ValueError(
            f"{place} has {free >> 20} MB of disk left, expected {ROOM >> 20} MB at least; make room there"
        )


def require_folder(name: str, folder: Path) -> Path:
    """The folder, which is made where it is missing. Raises ValueError where nothing can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{name} is {folder}, expected a folder to write in ({error.strerror}); mend that, or choose another"
        ) from error
    return folder


def require_database(database: Path) -> None:
    """Raises ValueError where MLflow could not write its SQLite file, or the files of its experiment."""
    name = "MLFLOW_TRACKING_URI" if os.environ.get("MLFLOW_TRACKING_URI") else "the folder of MLflow's mlflow.db"
    if not database.parent.is_dir():
        raise ValueError(f"{name} names {database}, in a folder that does not exist; make it: mkdir {database.parent}")
    require_folder(name, database.parent)
    location = tracking.artifacts_beside(database)
    if database.exists():
        prepare_database(database)
        try:
            with closing(sqlite3.connect(database, timeout=30)) as store:
                store.execute("begin immediate")
                wanted = "select artifact_location from experiments where name = ?"
                location = (store.execute(wanted, [tracking.EXPERIMENT]).fetchone() or [location])[0]
                store.rollback()
        except sqlite3.Error as error:
            raise ValueError(
                f"MLflow's {database} cannot be written ({error}); make it writable, or wait for who uses it"
            ) from error
    require_store(location)


def require_store(location: str) -> None:
    """Raises ValueError where MLflow's files cannot be written there, or, of what is no folder here, not be listed."""
    if location.startswith("file://") or "://" not in location:
        folder = Path(unquote(urlparse(location).path) if "://" in location else location)
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        require_folder("the folder of MLflow's files", existing)
        return
    tracking.list_store(location)
