"""Tiers of tests by their folder, the order in which two processes take them, and the data that many of them need."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: models are small, and threads would wait for each other

from pipelines.data.shapes import write_shapes
from pipelines.registry.database import make_database, relocate
from pipelines.surroundings import QUIET

pytest.register_assert_rewrite("tests.orchestra", "tests.registering", "tests.running")

from tests import warm  # noqa: E402
from tests.projects import SHAPES, detections_like, trained_project  # noqa: E402
from tests.registering import run  # noqa: E402

os.environ.update(QUIET)
MEMORY = Path("/dev/shm")
TIERS = ("slow", "journeys", "stages", "pipelines", "detr")  # the longest first, so that both processes end at once


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Makes the folder of this session, in memory where there is room: SQLite and git wait for a disk thousands of times."""
    if warm.FOLDER in os.environ:  # this is one of its processes
        return
    for old in MEMORY.glob("tests-*-*"):
        if not psutil.pid_exists(int(old.name.split("-")[1])):  # its session was killed
            shutil.rmtree(old, ignore_errors=True)
    room = MEMORY.is_dir() and min(shutil.disk_usage(MEMORY).free, psutil.virtual_memory().available) > 8 * 2**30
    folder = tempfile.TemporaryDirectory(
        prefix=f"tests-{os.getpid()}-", dir=MEMORY if room else None, ignore_cleanup_errors=True
    )
    os.environ |= {warm.FOLDER: folder.name, f"{warm.FOLDER}_PID": str(os.getpid())}
    config.add_cleanup(folder.cleanup)
    if config.option.basetemp is None:
        config.option.basetemp = f"{folder.name}/tmp"


def pytest_itemcollected(item: pytest.Item) -> None:
    """The folder is the marker; a file is the work of one process, and so is all that shares a group's servers."""
    item.add_marker(tier(item))
    if item.get_closest_marker("xdist_group") is None:
        item.add_marker(pytest.mark.xdist_group(item.location[0]))


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Long texts and bytes are called by the name of their argument."""
    return argname if isinstance(val, str | bytes) and len(val) > 80 else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: TIERS.index(tier(item)))


def tier(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).parts[0]


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """A folder with the four files of a small drawn dataset. Read only."""
    folder = tmp_path_factory.mktemp("drawn")
    write_shapes(SHAPES, folder)
    return folder


@pytest.fixture
def source(drawn, tmp_path):
    """A copy of the drawn dataset to break."""
    return Path(shutil.copytree(drawn, tmp_path / "source"))


@pytest.fixture(scope="session")
def empty_registry(tmp_path_factory):
    """A folder with MLflow's database as the first command makes it, which takes dozens of migrations. Copy it."""
    folder = tmp_path_factory.mktemp("registry")
    make_database(folder / "mlflow.db")
    return folder


@pytest.fixture
def local(empty_registry, tmp_path, monkeypatch):
    """The folder of a test, in which MLflow's database is that of the environment, and empty."""
    shutil.copy(empty_registry / "mlflow.db", tmp_path)
    relocate(tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path


@pytest.fixture
def warm_python(monkeypatch):
    """The interpreter that this process starts others by is the warm one, too."""
    monkeypatch.setattr(sys, "executable", f"{warm.folder()}/python")


@pytest.fixture(scope="module")
def projects(drawn, tmp_path_factory):
    """Three trained projects, by name: `equal` has the detections of `strong`, of other weights."""
    folder, truth = tmp_path_factory.mktemp("projects"), drawn / "instances_val.json"
    shifts = {"weak": 6.0, "strong": 1.0, "equal": 1.0}
    return {name: trained_project(folder / name, drawn, name, detections_like(truth, s)) for name, s in shifts.items()}


@pytest.fixture(scope="module")
def registered(projects, tmp_path_factory):
    """A folder with a registry in which `weak` is the champion."""
    folder = tmp_path_factory.mktemp("registered")
    said = run(projects["weak"], f"sqlite:///{folder}/mlflow.db")
    assert "registered detr version 1 as champion: there was no champion" in said
    return folder


@pytest.fixture
def uri(registered, tmp_path, monkeypatch):
    """A copy of that registry; the artifacts are copied too."""
    shutil.copytree(registered / "mlartifacts", tmp_path / "mlartifacts")
    shutil.copy(registered / "mlflow.db", tmp_path / "mlflow.db")
    relocate(tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"
