"""Registrations with a server that dies, a database that is locked, and a store that is full."""

import contextlib
import shutil
import sqlite3

from tests.registering import assert_nothing_is_lost, at, look, run, the_error, together
from tests.running import free_port, mlflow_server


def test_a_server_takes_three_at_once_and_may_die_at_any_moment(projects, tmp_path):
    port, place = free_port(), tmp_path / "server"
    uri = f"http://127.0.0.1:{port}"
    folders = [projects["weak"], projects["strong"], shutil.copytree(projects["strong"], tmp_path / "twin")]
    with mlflow_server(place, port):
        assert_nothing_is_lost(uri, together(folders, uri))
    for moment in ("log_artifacts before 1", "_create_model_version before 1", "set_model_version_tag before 2"):
        with mlflow_server(place, port) as (_, server):
            said = run(projects["equal"], uri, at(moment, f"kill -{server.pid}"), code=1)
        assert f"MLflow at {uri} failed: " in the_error(said)
    with mlflow_server(place, port):
        before = look(uri)[1]
        run(projects["equal"], uri)
        named, decisions = look(uri)
        assert decisions == before | {3: "challenger"}
        assert named["challenger"] == 3


def test_a_locked_database_is_told_in_one_line(projects, uri):
    path = uri.removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("begin exclusive")
        assert "database is locked" in the_error(run(projects["strong"], uri, code=1))
    said = run(projects["strong"], uri, at("set_model_version_tag before 1", path), code=1)
    assert "database is locked" in the_error(said)
    assert "registered detr version 2 as champion" in run(projects["strong"], uri)
    assert look(uri) == ({"champion": 2, "previous_champion": 1}, {1: "champion", 2: "champion"})
