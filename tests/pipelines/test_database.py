"""The registry of a clone that was moved, renamed or copied: real MLflow on SQLite."""

import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest

from pipelines.registry import tracking
from pipelines.registry.database import make_database, relocate


@pytest.fixture
def clone(empty_registry, tmp_path, monkeypatch):
    """A folder with a registry, a run in it, and an artifact of that. The name wants quoting in an address."""
    folder = tmp_path / "a clone #1"
    folder.mkdir()
    shutil.copy(empty_registry / "mlflow.db", folder)
    use(folder, monkeypatch)
    log("first")
    return folder


def use(folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")


def log(name):
    """A run with an artifact."""
    client = tracking.connect()
    client.log_text(tracking.find_run(client, name, name), name, f"{name}.txt")


def kept(folder):
    """The artifacts that the registry finds, and the files in `folder`."""
    client = tracking.connect()
    runs = client.search_runs([client.get_experiment_by_name(tracking.EXPERIMENT).experiment_id])
    places = [Path(url2pathname(urlsplit(run.info.artifact_uri).path)) for run in runs]
    return {path.stem for place in places for path in place.glob("*.txt")}, {
        path.stem for path in folder.rglob("*.txt")
    }


def test_a_clone_that_was_moved_finds_its_artifacts_and_makes_the_old_folder_no_more(clone, monkeypatch, capsys):
    moved = clone.rename(clone.with_name("renamed"))
    use(moved, monkeypatch)
    capsys.readouterr()
    assert kept(moved) == ({"first"}, {"first"})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{moved}/mlflow.db was made in {clone}: ")
    log("second")
    assert kept(moved) == ({"first", "second"}, {"first", "second"})
    assert not clone.exists()
    assert capsys.readouterr().err == ""


def test_a_copy_writes_beside_itself_and_the_original_stays_as_it_is(clone, monkeypatch):
    copy = Path(shutil.copytree(clone, clone.with_name("copy")))
    use(copy, monkeypatch)
    log("second")
    assert kept(copy) == ({"first", "second"}, {"first", "second"})
    use(clone, monkeypatch)
    assert kept(clone) == ({"first"}, {"first"})


def test_a_copy_without_the_artifacts_is_refused_in_a_line(clone, monkeypatch):
    copy = clone.with_name("copy")
    copy.mkdir()
    shutil.copy(clone / "mlflow.db", copy)
    use(copy, monkeypatch)
    with pytest.raises(ValueError, match=f"copy these too: cp -r {clone}/mlartifacts {copy}/$"):
        tracking.connect()
    shutil.copytree(clone / "mlartifacts", copy / "mlartifacts")
    assert kept(copy) == ({"first"}, {"first"})


def test_artifacts_in_a_place_of_their_own_and_a_file_behind_a_link_stay(clone, tmp_path, monkeypatch):
    (tmp_path / "linked").symlink_to(clone)
    (tmp_path / "mlflow.db").symlink_to(clone / "mlflow.db")
    for folder in (tmp_path / "linked", tmp_path):
        assert relocate(folder / "mlflow.db") == ""
    shutil.move(clone / "mlflow.db", tmp_path / "moved.db")
    assert relocate(tmp_path / "moved.db") == ""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/moved.db")
    assert kept(clone) == ({"first"}, {"first"})


def test_what_a_killed_process_has_half_made_goes(tmp_path):
    for number in (4194305, os.getpid()):  # beyond the numbers of processes; that of one before us
        (tmp_path / f"mlflow.db.{number}.partial").touch()
        (tmp_path / f"mlflow.db.{number}.partial-journal").write_bytes(b"half a page")
    make_database(tmp_path / "mlflow.db")
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db"}


def test_what_is_no_database_is_said(tmp_path):
    (tmp_path / "mlflow.db").write_text("no database, but long enough to be read as one" * 10, encoding="utf-8")
    with pytest.raises(ValueError, match=r"MLflow's .*mlflow\.db cannot be read.*: file is not a database"):
        relocate(tmp_path / "mlflow.db")
    (tmp_path / "empty.db").touch()
    assert relocate(tmp_path / "empty.db") == ""


def test_an_experiment_of_dvc_registers_in_the_clone_that_it_is_of(tmp_path, monkeypatch):
    place = tmp_path / ".dvc/tmp/exps/standalone/tmpabc"
    place.mkdir(parents=True)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(place)
    assert tracking.get_tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path / ".dvc/tmp")
    assert tracking.get_tracking_uri() == f"sqlite:///{tmp_path}/.dvc/tmp/mlflow.db"
