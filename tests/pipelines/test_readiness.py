"""What is known before a run begins: the registry, places, proxies, what launchers left."""

import contextlib
import json
import os
import sqlite3
import sys
import tempfile
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from detr.distributed import join_process_group, read_num_threads
from detr.loader import Loader
from pipelines import surroundings
from pipelines.data import looks
from pipelines.params import merge_parameters
from pipelines.registry import access
from pipelines.registry.tracking import connect, find_run, get_tracking_uri
from pipelines.retraining import readiness
from tests.running import ROOT, call, free_port


@pytest.fixture
def here(empty_registry, tmp_path, monkeypatch):
    """The root of a project without a registry, in an environment that says nothing of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("PREFECT_HOME", raising=False)
    return tmp_path


RELATIVE = ["", "sqlite:///mlflow.db", "sqlite:///./mlflow.db", "sqlite+pysqlite:///mlflow.db", "SQLITE:///mlflow.db"]


@pytest.mark.parametrize("uri", [*RELATIVE, "sqlite:///{here}/mlflow.db"])
def test_a_relative_database_is_that_of_the_project_in_every_folder(here, monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(here=here))
    readiness.check(here)
    (here / "worktree").mkdir()
    monkeypatch.chdir(here / "worktree")
    assert get_tracking_uri() == f"sqlite:///{here}/mlflow.db"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("./mlruns", "MLFLOW_TRACKING_URI is './mlruns', a folder, which MLflow takes no more; expected sqlite:///"),
        ("file:///tmp/mlruns", "a folder, which MLflow takes no more"),
        ("127.0.0.1:5000", "MLFLOW_TRACKING_URI is '127.0.0.1:5000'; expected sqlite:///mlflow.db or http://HOST:PORT"),
        ("http://[::1", r"MLFLOW_TRACKING_URI is 'http://\[::1'; expected"),
        ("http://", "MLFLOW_TRACKING_URI is 'http://'; expected"),
        ("sqlite:///.", "MLFLOW_TRACKING_URI is 'sqlite:///.*'; expected"),
        ("sqlite:///a%2Fb/mlflow.db", "in which '%2F' means something else to MLflow; rename the folder, or set"),
        ("sqlite:///a?b/mlflow.db", r"in which '\?' means something else to MLflow"),
        ("sqlite:///:memory:", "in which ':memory:' means something else to MLflow"),
        ("sqlite:///nowhere/mlflow.db", "in a folder that does not exist; make it: mkdir "),
        ("http://127.0.0.1:{port}", "MLflow at http://127.0.0.1:.* is unreachable"),
        ("postgresql://u:hush@127.0.0.1:{port}/x", "MLflow at postgresql://127.0.0.1:.* is unreachable"),
    ],
)
def test_a_registry_that_cannot_be_used_is_told_in_one_line(here, monkeypatch, uri, said):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(port=free_port()))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ValueError, match=said) as caught:
        readiness.check(here)
    assert "\n" not in str(caught.value)
    assert "hush" not in str(caught.value)


def test_a_folder_whose_name_mlflow_cannot_write_is_told_at_once(tmp_path, monkeypatch):
    for name in ("a?b", "a%20b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for look in (lambda: readiness.check(Path.cwd()), connect):
            with pytest.raises(ValueError, match="means something else to MLflow; rename the folder"):
                look()
        said = call(tmp_path / name, "python", "-m", "pipelines.train", code=1, PYTHONPATH=str(ROOT))
        assert said.startswith("error: MLflow's database is ")  # before anything else is looked for


def test_a_folder_whose_name_dvc_cannot_show_is_told_at_once(tmp_path, monkeypatch):
    place = tmp_path / "a{b}"
    place.mkdir()
    with pytest.raises(ValueError, match="a{b} has a brace in its name, at which DVC fails; rename the folder"):
        readiness.check(place)
    asked = ("python", "-c", "from pipelines.stage import command; command(lambda: print('made'))")
    said = call(place, *asked, code=1, DVC_STAGE="download", PYTHONPATH=str(ROOT))
    assert said == f"error: {place} has a brace in its name, at which DVC fails; rename the folder\n"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            "[cache]\ndir = /proc/cache\n",
            "the DVC cache is /proc/cache, expected a folder to write in .*; mend that, or",
        ),
        (
            "[cache]\ndir = {shm}\ntype = hardlink\n",
            "gives .* nothing by hardlink, which cache.type allows alone; let it",
        ),
        ("[cach", "the settings of DVC, of .*/.dvc or of this user, cannot be read: "),
        ("[cache]\ntype = any\n", "the settings of DVC, of .*/.dvc or of this user, cannot be read: "),
    ],
)
def test_a_cache_that_takes_or_gives_nothing_is_told_at_once(here, settings, said):
    (here / ".dvc").mkdir()
    disks = [place for place in ("/dev/shm", "/var/tmp") if os.stat(place).st_dev != os.stat(here).st_dev]
    with tempfile.TemporaryDirectory(dir=disks[0]) as shm:
        (here / ".dvc/config.local").write_text(settings.format(shm=shm), encoding="utf-8")
        with pytest.raises(ValueError, match=said) as caught:
            readiness.check(here)
    assert "\n" not in str(caught.value)


def test_a_database_that_is_none_is_held_or_has_lost_its_files_is_told(local):
    with closing(sqlite3.connect(local / "mlflow.db")) as store:
        store.execute("update experiments set artifact_location = 'file:///proc/store' where name = 'detr'")
        store.commit()
    with pytest.raises(ValueError, match="the folder of MLflow's files is /proc, expected a folder to write in"):
        readiness.check(local)
    (local / "mlflow.db").write_text("no database " * 100, encoding="utf-8")
    with pytest.raises(ValueError, match="mlflow.db cannot be read, or, .*: file is not a database"):
        readiness.check(local)


def test_a_database_that_may_only_be_read_is_told(local):
    """As a user without rights: root may write anything."""
    (local / "mlflow.db").chmod(0o444)
    prefix = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    code = (
        "from pathlib import Path; from pipelines.stage import command; from pipelines.retraining import readiness; "
        "command(lambda: readiness.check(Path.cwd()))"
    )
    said = call(local, *prefix, sys.executable, "-c", code, code=1, cold=True, PYTHONPATH=str(ROOT))
    assert f"{local}/mlflow.db cannot be written (attempt to write a readonly database); make it writable" in said


def test_a_store_without_credentials_is_told(local, monkeypatch):
    find_run(connect(), "abc", "train abc")
    with closing(sqlite3.connect(local / "mlflow.db")) as store:
        store.execute("update experiments set artifact_location = 's3://bucket/x' where name = 'detr'")
        store.commit()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ValueError, match="MLflow's files at s3://bucket/x cannot be written .*credentials"):
        readiness.check(local)


class Refusing(BaseHTTPRequestHandler):
    """Answers as a tracking server, or what stands before it, that refuses; `server.refusal` says what."""

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        refusal, status, body = self.server.refusal, 200, '{"experiments": []}'
        if refusal == "login":
            body = "<html>Log in</html>"
        elif refusal == "401" or "/search" not in self.path:
            status, body = int(refusal), "no"
        if "get-by-name" in self.path:
            status, body = 404, '{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"}'
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    do_POST = do_GET

    def log_message(self, *parts):
        pass


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ("login", "wants a login .*; set MLFLOW_TRACKING_USERNAME and .* or unset MLFLOW_TRACKING_URI"),
        ("401", "wants a login .*error code 401"),
        ("403", "answers, but refuses what a run writes .*; set MLFLOW_TRACKING_USERNAME .* of one who may write"),
        ("500", "answers, but refuses what a run writes .*500.*, see to its database, or unset"),
    ],
)
def test_a_registry_that_answers_and_takes_nothing_is_told(here, monkeypatch, refusal, said):
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        server.refusal = refusal
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with pytest.raises(ValueError, match=f"MLflow at http://127.0.0.1:.* {said}"):
            readiness.check(here)
        server.shutdown()


def test_a_registry_that_takes_all_keeps_nothing_of_the_trial_but_a_tag(client, tmp_path):
    access.require_writable(client)
    access.require_writable(client)
    assert client.get_experiment_by_name("detr").tags["project"] == "detr"
    assert client.get_registered_model("detr").tags == {"project": "detr"}
    assert not list((tmp_path / "mlartifacts").rglob("*"))


def test_a_full_disk_and_a_home_of_prefect_that_is_no_folder_are_told(local, monkeypatch):
    (local / "file").touch()
    monkeypatch.chdir(local)
    monkeypatch.setenv("PREFECT_HOME", "file")
    with pytest.raises(ValueError, match="PREFECT_HOME is .*/file, expected a folder to write in .File exists.; mend"):
        readiness.check(local)
    monkeypatch.setenv("PREFECT_HOME", "home")
    readiness.check(local)
    assert os.environ["PREFECT_HOME"] == str(local / "home")
    monkeypatch.setattr(readiness, "ROOM", 2**60)
    with pytest.raises(ValueError, match="MB of disk left, expected .* MB at least; make room there"):
        readiness.check(local)


def test_data_that_is_a_link_to_another_disk_is_told_before_it_is_downloaded(local, tmp_path_factory):
    (local / "data").mkdir()
    (local / "data/coco").symlink_to(tmp_path_factory.mktemp("disk"))
    with pytest.raises(ValueError, match="data/coco leads to .*, and DVC tracks nothing outside .* dvc cache dir"):
        readiness.check(local)


def test_a_source_that_cannot_be_taken_is_told_at_once(source, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    document = merge_parameters(ROOT, None, ["download.source=source"])
    readiness.require_source(tmp_path, document)
    (source / "val.zip").rename(tmp_path / "away")
    with pytest.raises(ValueError, match=r"source has neither val.zip nor a folder val/ with pictures"):
        readiness.require_source(tmp_path, document)
    (tmp_path / "dvc.lock").write_text(
        json.dumps({"stages": {"download": {"params": {"params.yaml": {"download": document["download"]}}}}}),
        encoding="utf-8",
    )
    readiness.require_source(tmp_path, document)  # DVC has what was taken of it
    (tmp_path / "dvc.lock").unlink()
    looks.keep_taken(looks.find_record(tmp_path, document), {}, {})
    readiness.require_source(tmp_path, document)
    with pytest.raises(ValueError, match="has neither val.zip"):
        readiness.require_source(tmp_path, document, refresh=True)
    (tmp_path / "file").touch()
    for place, said in (
        ("file", "'file': a file; give"),
        ("gone", "no such folder"),
        ("http://h/x", "one URL; give"),
    ):
        with pytest.raises(ValueError, match=f"download.source is .*{said}"):
            readiness.require_source(tmp_path, merge_parameters(ROOT, None, [f"download.source={place}"]))


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (("http://127.0.0.1:1/x",), ""),
        ((f"http://{'a' * 64}.x/x", "http://127.0.0.1:1/x"), ""),
        ((f"http://u:hush@{'a' * 64}.x/x?hush",), "http://a+.x/x cannot be fetched: a+.x is no known server .*; check"),
        (("http:///x",), "http:///x cannot be fetched: http:///x names no server; check the address"),
        (("http://h.invalid/x",), "http://h.invalid/x cannot be fetched: h.invalid is no known server .*; check the"),
    ],
)
def test_a_server_without_a_known_name_is_told_at_once_but_behind_a_proxy(monkeypatch, places, said):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with pytest.raises(ValueError, match=said) if said else contextlib.nullcontext() as caught:
        readiness.require_host(places)
    assert "hush" not in str(caught)
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:1")
    if "names no server" not in said:
        readiness.require_host(places)


@pytest.mark.parametrize(
    ("given", "passed", "said"),
    [
        ({"HTTP_PROXY": "http://127.0.0.1:9"}, "127.0.0.1,localhost", ""),
        ({"https_proxy": "127.0.0.1:9", "NO_PROXY": "a, b"}, "a,b,127.0.0.1,localhost", ""),
        ({"http_proxy": "http://h", "NO_PROXY": "*"}, "*", ""),
        ({"ALL_PROXY": "socks5://u:hush@h:9"}, None, "warning: ALL_PROXY is a proxy of socks5://"),
        ({}, None, ""),
    ],
)
def test_what_is_here_is_asked_past_proxies(monkeypatch, capsys, given, passed, said):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name in ("NO_PROXY", "no_proxy"):  # which monkeypatch takes away again
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    surroundings.settle()
    assert os.environ.get("NO_PROXY") == passed
    shown = capsys.readouterr().err
    assert shown.startswith(said)
    assert "hush" not in shown
    assert ("ALL_PROXY" in os.environ) == ("ALL_PROXY" in given and not said)


@pytest.mark.parametrize(
    ("left", "launched"),
    [
        ({"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "gone"}, False),
        ({"RANK": "1", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}, True),
        ({"RANK": "1", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none", "DVC_STAGE": "evaluate"}, False),
    ],
)
def test_what_a_launcher_has_left_in_a_shell_starts_no_wait_for_peers(monkeypatch, left, launched):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    surroundings.settle()
    assert ("WORLD_SIZE" in os.environ) is launched
    if not launched:
        with join_process_group() as process:
            assert (process.rank, process.num_processes) == (0, 1)


@pytest.mark.parametrize(("text", "number"), [("4,2", 4), ("1", 1), (" 3 , 2", 3), ("", 1)])
def test_a_list_of_threads_is_legal(monkeypatch, text, number):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert read_num_threads() == number


def test_numbers_that_are_none_are_named(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "all")
    with pytest.raises(ValueError, match="OMP_NUM_THREADS is 'all', expected a number of threads, 1 or more"):
        read_num_threads()
    monkeypatch.setenv("DETR_WORKERS", "-1")
    with pytest.raises(ValueError, match="DETR_WORKERS is '-1', expected a number of loader processes, 0 or more"):
        Loader(None, None, 32, torch.device("cpu"))


def test_a_locale_of_one_byte_per_letter_changes_nothing(tmp_path):
    (tmp_path / "K\u00e4se \u884c\u4eba").mkdir()
    code = (
        "import os, sys; from pipelines.stage import command\n"
        "command(lambda: print(sys.argv[1], os.listdir(), sys.getfilesystemencoding(), open('x', 'w').encoding))\n"
    )
    (tmp_path / "show.py").write_text(code, encoding="utf-8")
    locale = {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONPATH": str(ROOT)}
    name = "K\u00e4se \u884c\u4eba"
    said = call(tmp_path, sys.executable, "show.py", name, cold=True, **locale)
    assert said.startswith(f"{name} [")
    assert said.count(name) == 2
    assert said.lower().endswith(" utf-8 utf-8\n")
