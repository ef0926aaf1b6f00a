"""What a run will need, looked at before it begins: the source of its data, the registry, its files, room."""

import os
import shutil
import socket
import sqlite3
import tempfile
import threading
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from requests.utils import get_environ_proxies

from pipelines.data import looks
from pipelines.data.sources import FileSources, addresses, is_url, require_files, split_place
from pipelines.params import read_yaml
from pipelines.redaction import redact_url
from pipelines.registry import access, tracking
from pipelines.registry.database import prepare_database
from pipelines.stage import require_inside, require_name
from pipelines.workspace.cache import require_cache

ROOM = 256 * 2**20  # bytes of disk, below which not even the state of a small training fits
RESOLVE_SECONDS = 5.0


def check(root: Path) -> None:
    """Raises ValueError, one line with the remedy, where a run in `root` would fail after its training or before.

    From here on MLFLOW_TRACKING_URI and PREFECT_HOME are the same in every folder that a stage runs in.
    """
    require_room(root)
    require_inside(root)
    require_name(root)
    require_cache(root)
    if home := os.environ.get("PREFECT_HOME"):
        os.environ["PREFECT_HOME"] = str(require_folder("PREFECT_HOME", Path(home).expanduser().absolute()))
    uri = os.environ["MLFLOW_TRACKING_URI"] = tracking.get_tracking_uri()
    tracking.require_known(uri)
    if database := tracking.find_database(uri):
        require_database(database)
        return
    access.require_writable(tracking.connect())


def require_source(root: Path, document: Any, refresh: bool = False) -> None:
    """Raises ValueError where the data of these parameters cannot be taken, and were not before or are to be anew."""
    source, mirrors = (document["download"][key] for key in ("source", "mirrors"))
    if source == "shapes" or (not refresh and is_taken(root, document)):
        return
    places = looks.find_places(root, source)
    require_files(FileSources(**places), root)
    for place in places.values():
        if is_url(place):
            require_host(addresses(split_place(place)[0], mirrors))


def is_taken(root: Path, document: Any) -> bool:
    """Whether the data of these parameters was taken here before, or dvc.lock has it: DVC may do without a source."""
    lock = read_yaml(root / "dvc.lock") if (root / "dvc.lock").exists() else {}
    kept = lock.get("stages", {}).get("download", {}).get("params", {}).get("params.yaml", {}).get("download")
    return kept == document["download"] or looks.find_record(root, document).exists()


def require_host(places: tuple[str, ...]) -> None:
    """Raises ValueError where no server of a file's addresses has a known name; a slow answer is not waited for.

    What goes through a proxy is looked up there.
    """
    failures: dict[str, str] = {}

    def resolve(place: str, host: str) -> None:
        try:
            socket.getaddrinfo(host, None)
        except (OSError, UnicodeError) as error:  # a label of more than 63 letters
            failures[place] = f"{host} is no known server ({getattr(error, 'strerror', None) or error})"

    for place in places:
        host = urlparse(place).hostname
        if host and not get_environ_proxies(place):
            asking = threading.Thread(target=resolve, args=(place, host), daemon=True)
            asking.start()
            asking.join(RESOLVE_SECONDS)
        if host and place not in failures:
            return
    told = "; ".join(failures.get(place, f"{redact_url(place)} names no server") for place in places)
    raise ValueError(
        f"download.source: {redact_url(places[0])} cannot be fetched: {told}; check the address and the network"
    )


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
    location = tracking.find_artifacts(database)
    if database.exists():
        prepare_database(database)
        try:
            with closing(sqlite3.connect(database, timeout=30)) as store:
                store.execute("begin immediate")
                store.execute("update experiments set name = name where 0")  # refused of a file that is only read
                wanted = "select artifact_location from experiments where name = ?"
                location = (store.execute(wanted, [tracking.EXPERIMENT]).fetchone() or [location])[0]
                store.rollback()
        except sqlite3.Error as error:
            raise ValueError(
                f"MLflow's {database} cannot be written ({error}); make it writable, or wait for who uses it"
            ) from error
    require_store(location)


def require_store(location: str) -> None:
    """Raises ValueError where MLflow's files cannot be written there."""
    if location.startswith("file://") or "://" not in location:
        folder = Path(unquote(urlparse(location).path) if "://" in location else location)
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        require_folder("the folder of MLflow's files", existing)
        return
    access.require_store(location)
