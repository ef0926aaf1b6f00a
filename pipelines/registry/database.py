"""MLflow's SQLite file: made, and set right after its folder was moved or copied, since it keeps absolute places."""

import logging
import os
import sqlite3
import sys
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import psutil

EXPERIMENT = "detr"
ARTIFACTS = "mlartifacts"  # the folder beside the file
WAIT_SECONDS = 20  # for another process to end what it writes
PLACES = (  # where the file has places
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
    ("model_versions", "source"),
)


def prepare_database(path: Path) -> None:
    """Makes MLflow's SQLite file; one that is there finds its artifacts where its folder has moved, which is said."""
    if not path.exists():
        make_database(path)
    elif said := relocate(path):
        print(said, file=sys.stderr, flush=True)


def make_database(path: Path) -> None:
    """Makes MLflow's SQLite file with the experiment, its artifacts in files beside it, so that they can be read
    with and without a server. Whole or not at all: a process that ends in the middle would leave one for good.
    """
    import mlflow

    quieten_mlflow()
    for left in path.parent.glob(f"{path.name}.*.partial*"):  # with SQLite's journals
        owner = left.name.removeprefix(f"{path.name}.").partition(".")[0]
        if owner.isdecimal() and int(owner) != os.getpid() and psutil.pid_exists(int(owner)):
            continue
        left.unlink(missing_ok=True)  # of a process that was killed
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        client = mlflow.MlflowClient(f"sqlite:///{partial}", f"sqlite:///{partial}")
        client.create_experiment(EXPERIMENT, find_artifacts(path))
        with suppress(FileExistsError):  # another process was faster
            os.link(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def quieten_mlflow() -> None:
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # errors are raised too, and told in one line


def find_artifacts(database: Path) -> str:
    """Where the artifacts of a SQLite file lie."""
    return (database.parent / ARTIFACTS).as_uri()


def relocate(database: Path) -> str:
    """Has a SQLite file of MLflow name the folder that it is in now, and says so; nothing where it does already.

    A copy gets the artifacts that were copied with it, never those of the original. Raises ValueError where they were
    not, or where the file cannot be written.
    """
    here = database.resolve().parent
    try:
        with closing(sqlite3.connect(database, WAIT_SECONDS)) as store, store:
            old = find_origin(store)
            if old is None or old.resolve() == here or is_same(old / database.name, database):
                return ""
            if (old / ARTIFACTS).exists() and not (here / ARTIFACTS).exists():
                if not (old / database.name).exists():
                    return ""  # a place that somebody chose for them
                raise ValueError(
                    f"{database} is a copy of {old / database.name}, whose models' files are in {old / ARTIFACTS}; "
                    f"copy these too: cp -r {old / ARTIFACTS} {here}/"
                )
            changed = sum(rewrite(store, table, column, old, here) for table, column in PLACES)
    except sqlite3.Error as error:
        said = f"MLflow's {database} cannot be read, or, where its folder has moved, be written: {error}"
        raise ValueError(said) from error
    return f"{database} was made in {old}: {changed} places in it are in {here} now"


def find_origin(store: sqlite3.Connection) -> Path | None:
    """The folder that the file was in when it was made, where its artifacts are files beside it."""
    if not columns(store, "experiments"):
        return None
    asked = "select artifact_location from experiments where artifact_location like ? order by experiment_id limit 1"
    found = store.execute(asked, (f"file:%/{ARTIFACTS}",)).fetchone()
    return Path(url2pathname(urlsplit(found[0]).path)).parent if found else None


def columns(store: sqlite3.Connection, table: str) -> set[str]:
    return {row[1] for row in store.execute(f"pragma table_info({table})")}


def rewrite(store: sqlite3.Connection, table: str, column: str, old: Path, new: Path) -> int:
    """Rewrites the places in a column that are in `old`, as addresses and as paths; how many there were."""
    if column not in columns(store, table):  # of another release of MLflow
        return 0
    asked, changed = f"update {table} set {column} = ? || substr({column}, ?) where substr({column}, 1, ?) = ?", 0
    for before, after in ((f"{old.as_uri()}/", f"{new.as_uri()}/"), (f"{old}/", f"{new}/")):
        changed += store.execute(asked, (after, len(before) + 1, len(before), before)).rowcount
    return changed


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file."""
    return one.exists() and one.samefile(other)
