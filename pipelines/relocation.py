"""MLflow's SQLite file keeps absolute places: after its folder was moved, renamed or copied they are set right."""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

ARTIFACTS = "mlartifacts"  # the folder beside the file
WAIT_SECONDS = 60  # for another process to end what it writes
PLACES = (  # where the file has places
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
    ("model_versions", "source"),
)


def relocate(database: Path) -> str:
    """Has a SQLite file of MLflow name the folder that it is in now, and says so; nothing where it does already.

    A copy gets the artifacts that were copied with it, never those of the original. Raises ValueError where they were
    not, or where the file cannot be written.
    """
    here = database.resolve().parent
    try:
        with closing(sqlite3.connect(database, WAIT_SECONDS)) as store, store:
            old = made_in(store)
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
        raise ValueError(f"{database} cannot be read, or written where its folder has moved: {error}") from error
    return f"{database} was made in {old}: {changed} places in it are in {here} now"


def made_in(store: sqlite3.Connection) -> Path | None:
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
