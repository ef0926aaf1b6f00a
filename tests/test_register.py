"""The register stage with real MLflow: lineage, the gate, and what is left after kills, faults and company."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import gate, registry
from pipelines.register import class_metrics, git_diff, training_seconds, val_digest, validation
from pipelines.tracking import MODEL, connect, sha256
from tests.conftest import ROOT, call, detections_like, environment, free_port, mlflow_server, trained_project

COMMAND = (sys.executable, "-m", "pipelines.register")
# Does ACTION right before or after the N-th call of a method of MLflow's client.
HOOKED = """
import os, signal, sqlite3, sys
from mlflow import MlflowClient
from pipelines.register import main
from pipelines.stage import command
method, when, number, action = sys.argv[1:]
original, calls, held = getattr(MlflowClient, method), [], []
def act():
    if action.startswith("kill"):
        os.kill(int(action.split()[1]) or os.getpid(), signal.SIGKILL)
    else:
        held.append(sqlite3.connect(action, isolation_level=None))
        held[0].execute("begin exclusive")
def hooked(*arguments, **more):
    calls.append(method)
    due = len(calls) == int(number)
    if due and when == "before":
        act()
    result = original(*arguments, **more)
    if due and when == "after":
        act()
    return result
setattr(MlflowClient, method, hooked)
command(main)
"""


def at(moment, action):
    return (sys.executable, "-c", HOOKED, *moment.split(), action)


def run(folder, uri, command=COMMAND, code=0, **extra):
    return call(folder, *command, code=code, PYTHONPATH=str(ROOT), MLFLOW_TRACKING_URI=uri, **extra)


def the_error(said):
    """The only line of error."""
    assert "Traceback" not in said, said
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    return line


def look(uri):
    """(version by alias, decision by version) of the registry."""
    client = at_uri(uri)
    versions = client.search_model_versions(f"name = '{MODEL}'")
    named = {name: int(version) for name, version in client.get_registered_model(MODEL).aliases.items()}
    return named, {int(v.version): v.tags.get("decision") for v in versions}


def at_uri(uri):
    from mlflow import MlflowClient

    return MlflowClient(uri, uri)


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
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as store, store:
        for table, column in MOVED:
            store.execute(f"update {table} set {column} = replace({column}, '{registered}/', '{tmp_path}/')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


MOVED = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)


def test_a_version_carries_its_lineage_and_no_secret(projects, tmp_path):
    folder = Path(shutil.copytree(projects["strong"], tmp_path / "project"))
    (folder / ".gitignore").write_text("/mlflow.db\n/mlartifacts\n/artifacts\n/data\n/scratch\n*.pyc\n")
    (folder / "pipelines").mkdir()
    (folder / "pipelines/known.py").write_text("old = 1\n")
    call(folder, "git", "init", "--quiet", "--initial-branch=main")
    call(folder, "git", "add", "--all")
    call(folder, "git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "-m", "start")
    (folder / "pipelines/known.py").write_text("new = 1\n")
    (folder / "pipelines/unknown.py").write_text("unknown = 1\n")
    (folder / "private.env").write_text("PASSWORD=hunter2-file\n")
    uri = f"sqlite:///{folder}/mlflow.db"
    assert "registered detr version 1 as champion" in run(folder, uri, AWS_SECRET_ACCESS_KEY="hunter2-environment")
    client = at_uri(uri)
    version = client.get_model_version(MODEL, "1")
    artifacts = folder / "mlartifacts"
    (run_folder,) = (path.parent for path in artifacts.rglob("git.diff"))
    tags, metrics = version.tags, client.get_run(version.run_id).data.metrics
    digests = {
        "params_sha256": "params.yaml",
        "dvc_lock_sha256": "dvc.lock",
        "weights_sha256": "artifacts/train/model.safetensors",
        "detections_sha256": "artifacts/evaluate/detections.json",
    }
    assert {name: tags[name] for name in digests} == {name: sha256(folder / path) for name, path in digests.items()}
    assert tags["git_commit"] == call(folder, "git", "rev-parse", "HEAD").strip()
    assert (tags["git_branch"], tags["git_dirty"], tags["data_digest"]) == ("main", "true", "0123")
    assert tags["git_diff_sha256"] == sha256(run_folder / "git.diff")
    assert (tags["run_id"], tags["fingerprint"]) == (version.run_id, "strong")
    assert tags["validation"] == "2 of 3 hold, 1 warning"
    assert tags["decision"] == "champion"
    libraries = (
        "torch",
        "torchvision",
        "numpy",
        "hotcoco",
        "pycocotools",
        "mlflow",
        "dvc",
        "prefect",
        "great-expectations",
    )
    assert all(tags[name][0].isdigit() for name in libraries)
    assert tags["cores"] == str(os.cpu_count())
    assert all(tags[name] for name in ("python", "processor", "gpus", "memory_gb", "machine"))
    numbers = json.loads((folder / "artifacts/evaluate/metrics.json").read_text())
    assert {name: float(tags[name]) for name in numbers} == numbers == {name: metrics[name] for name in numbers}
    assert {"AP", "AP_low", "AP_high"} <= set(numbers)
    assert {name: value for name, value in metrics.items() if name.startswith("class_AP/")} == {
        f"class_AP/{name}": 0.25 for name in gate.names_of(folder / "data/coco/instances_val.json")
    }
    assert metrics["training_seconds"] == pytest.approx(2 * 2 * 8 / 4.0)
    for name in ("dvc.lock", "params.yaml", "evaluate/detections.json", "train/history.jsonl", "validate/report.json"):
        assert (run_folder / name).exists()
    decision = json.loads((run_folder / "register/decision.json").read_text())
    assert (decision["alias"], decision["sentence"]) == ("champion", tags["decision_reason"])
    assert decision["candidate"]["ap"] == pytest.approx(numbers["AP"], abs=1e-9)
    assert decision["sentence"] in (run_folder / "register/decision.md").read_text()
    there = [path for path in [*artifacts.rglob("*"), folder / "mlflow.db"] if path.is_file()]
    assert not [path for path in there if b"hunter2" in path.read_bytes()]
    clean = tmp_path / "clean"
    call(tmp_path, "git", "clone", "--quiet", str(folder), str(clean))
    call(clean, "git", "apply", str(run_folder / "git.diff"))
    assert (clean / "pipelines/known.py").read_text() == "new = 1\n"
    assert (clean / "pipelines/unknown.py").read_text() == "unknown = 1\n"
    assert not (clean / "private.env").exists()
    assert call(folder, "git", "status", "--porcelain").split("\n")[:2] == [
        " M pipelines/known.py",
        "?? pipelines/unknown.py",
    ]
    assert "registered detr version 1 as champion: these weights were registered before" in run(folder, uri)
    assert look(uri) == ({"champion": 1}, {1: "champion"})


def test_the_better_takes_the_place_an_equal_does_not_and_protection_holds(projects, uri, tmp_path, drawn):
    said = run(projects["strong"], uri)
    assert "registered detr version 2 as champion: AP" in said
    assert "better in 100.0% of 1000 resamples" in said
    said = run(projects["equal"], uri)
    assert "registered detr version 3 as challenger: AP" in said
    assert "+0.0000 [+0.0000, +0.0000], better in 0.0% of 1000 resamples: it is not certain enough" in said
    assert look(uri)[0] == {"champion": 2, "previous_champion": 1, "challenger": 3}
    (name, *_) = gate.names_of(drawn / "instances_val.json")
    better = detections_like(drawn / "instances_val.json", 0.0, lost=name)
    other = trained_project(tmp_path / "other", drawn, "other", better, protected={name: 0.05, "no": 0.1})
    assert the_error(run(other, uri, code=1)).startswith("error: register.protected names 'no', no category")
    text = (other / "params.yaml").read_text()
    assert "    no: 0.1\n" in text
    (other / "params.yaml").write_text(text.replace("    no: 0.1\n", ""))
    said = run(other, uri)
    assert "registered detr version 4 as challenger" in said
    assert f"{name} loses " in said
    client = at_uri(uri)
    page = registry.run_file(client, client.get_model_version(MODEL, "4").run_id, "register/decision.md").decode()
    assert f"| {name} | 0.0000 |" in page
    assert look(uri)[0] == {"champion": 2, "previous_champion": 1, "challenger": 4}


MOMENTS = [
    "log_artifacts after 1",
    "log_model_artifacts after 1",
    "_create_model_version before 1",
    "_create_model_version after 1",
    "set_model_version_tag after 1",
    "set_registered_model_alias after 1",
    "set_registered_model_alias after 2",
    "set_model_version_tag before 2",
]


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_anywhere_a_repeat_completes_to_the_same_end(projects, uri, moment):
    run(projects["strong"], uri, at(moment, "kill 0"), code=-signal.SIGKILL)
    _, decisions = look(uri)
    assert None in decisions.values() or list(decisions) == [1]
    assert not [v for v in at_uri(uri).search_model_versions(f"name = '{MODEL}'") if "weights_sha256" not in v.tags]
    assert "registered detr version 2 as champion" in run(projects["strong"], uri)
    assert look(uri) == ({"champion": 2, "previous_champion": 1}, {1: "champion", 2: "champion"})
    assert at_uri(uri).get_model_version(MODEL, "2").tags["decision_reason"].startswith("AP ")


def together(folders, uri):
    started = [
        subprocess.Popen(
            COMMAND,
            cwd=folder,
            env=environment(PYTHONPATH=str(ROOT), MLFLOW_TRACKING_URI=uri),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for folder in folders
    ]
    said = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(folders), said
    return said


def assert_nothing_is_lost(uri, said):
    """Of `weak`, `strong` and `strong` again at once, whichever came first."""
    named, decisions = look(uri)
    assert len(decisions) == 2
    numbers = [int(text.partition("registered detr version ")[2].split()[0]) for text in said]
    assert numbers[1] == numbers[2] == named["champion"] != numbers[0]
    assert sum("these weights were registered before" in text for text in said) == 1
    if numbers[0] < numbers[1]:
        assert named == {"champion": numbers[1], "previous_champion": numbers[0]}
        assert decisions == {1: "champion", 2: "champion"}
    else:
        assert named == {"champion": numbers[1], "challenger": numbers[0]}
        assert decisions == {1: "champion", 2: "challenger"}


def test_three_at_once_lose_no_update(projects, tmp_path):
    folders = [projects["weak"], projects["strong"], shutil.copytree(projects["strong"], tmp_path / "twin")]
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert_nothing_is_lost(uri, together(folders, uri))


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


def test_a_full_artifact_store_is_told_and_registration_goes_on_when_there_is_space(projects, tmp_path):
    """A file system of its own as root, else a limit on the size of files."""
    uri, store = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "mlartifacts"
    store.mkdir()
    size = (projects["weak"] / "artifacts/train/model.safetensors").stat().st_size
    if os.geteuid() == 0:
        call(tmp_path, "mount", "-t", "tmpfs", "-o", f"size={size // 2}", "tmpfs", str(store))
        try:
            assert "the disk is full at " in the_error(run(projects["weak"], uri, code=1))
            call(tmp_path, "mount", "-o", "remount,size=64m", str(store))
            assert "registered detr version 1 as champion" in run(projects["weak"], uri)
            assert look(uri) == ({"champion": 1}, {1: "champion"})
        finally:
            call(tmp_path, "umount", str(store))
        return
    limited = ("bash", "-c", f"ulimit -f {size // 2048}; exec {sys.executable} -m pipelines.register")
    assert "File too large" in the_error(run(projects["weak"], uri, limited, code=1))
    assert "registered detr version 1 as champion" in run(projects["weak"], uri)


def candidate(uri, projects, name="strong"):
    """A version made for judgement only, of the images that the champion was evaluated on."""
    client = connect()
    tags = {"val_digest": val_digest(projects[name] / "data/coco"), "data_digest": "0123"}
    run_id = client.create_run(client.get_experiment_by_name("detr").experiment_id).info.run_id
    return client, client.create_model_version(MODEL, "file:///nowhere", run_id, tags=tags)


def judged(uri, projects, **changes):
    client, version = candidate(uri, projects)
    folder = projects["strong"]
    config = gate.RegisterParams(0.0, 0.95, 200, 0, {}, True, **changes)
    found = json.loads((folder / "artifacts/evaluate/detections.json").read_text())
    return gate.judge(client, version, found, folder / "data/coco", config)


def spoil(root, *names):
    for name in names:
        found = list((root / "mlartifacts").rglob(name))
        assert found
        for path in found:
            path.write_bytes(path.read_bytes()[:100])


def test_a_champion_without_model_files_is_compared_by_its_detections(projects, uri, tmp_path):
    shutil.rmtree(tmp_path / "mlartifacts/models")
    decision = judged(uri, projects)
    assert (decision.alias, decision.champion.source) == ("champion", "its run's detections")
    assert decision.champion.low < decision.champion.ap < decision.champion.high


def test_a_champion_without_any_files_gives_up_its_place(projects, uri, tmp_path):
    shutil.rmtree(tmp_path / "mlartifacts")
    decision = judged(uri, projects)
    assert (decision.alias, decision.champion) == ("champion", None)
    assert decision.sentence.startswith(
        "the files of version 1, the champion, are gone, so it cannot serve: its place is"
    )


def test_a_champion_whose_detections_are_damaged_detects_again_by_its_own_code(projects, uri, tmp_path):
    spoil(tmp_path, "detections.json")
    decision = judged(uri, projects)
    assert decision.alias == "champion"
    assert decision.champion.source.startswith("evaluated again by its code: the detections of its run cannot be used")
    assert decision.champion.low is not None


def test_a_champion_that_cannot_be_judged_again_is_judged_by_its_tag(projects, uri, tmp_path):
    """Also one of an older release, whose run has no detections and whose tags know less."""
    client = connect()
    spoil(tmp_path, "detections.json", "model.safetensors")
    for name in ("val_digest", "detections_sha256", "AP_low", "AP_high", "decision"):
        client.delete_model_version_tag(MODEL, "1", name)
    for name, value, alias in (("AP", "0.001", "champion"), ("AP", "0.999", "challenger")):
        client.set_model_version_tag(MODEL, "1", name, value)
        decision = judged(uri, projects)
        assert (decision.alias, decision.champion.ap) == (alias, float(value))
        assert (
            "of the champion only its tag AP counts, which may be of other data (the detections of its run cannot be used"
            in decision.sentence
        )
        assert "it cannot be evaluated again" in decision.sentence
        assert decision.champion.per_class["ellipse"] == 0.25
    client.delete_model_version_tag(MODEL, "1", "AP")
    decision = judged(uri, projects)
    assert decision.alias == "champion"
    assert "can be judged by nothing, its place is free" in decision.sentence


def test_detections_of_other_weights_are_not_taken_for_the_champions(projects, uri, tmp_path):
    spoil(tmp_path, "model.safetensors")
    (path,) = (tmp_path / "mlartifacts").rglob("detections.json")
    path.write_text("[]")
    assert "they are not those that it was registered with" in judged(uri, projects).sentence


def test_weights_whose_files_are_gone_are_registered_anew(projects, uri, tmp_path):
    shutil.rmtree(tmp_path / "mlartifacts/models")
    said = run(projects["weak"], uri)
    assert (
        "registered detr version 2 as champion: version 1, the champion, has the same weights and lost its files"
        in said
    )
    assert look(uri)[0] == {"champion": 2, "previous_champion": 1}


@pytest.mark.parametrize(
    ("outcomes", "text"),
    [
        ([], "0 of 0 hold, 0 warnings"),
        (["holds"] * 75, "75 of 75 hold, 0 warnings"),
        (["holds", "warning"], "1 of 2 hold, 1 warning"),
    ],
)
def test_the_validation_in_words(outcomes, text):
    assert validation([{"outcome": outcome} for outcome in outcomes]) == text


def test_names_of_categories_as_metrics(tmp_path):
    rows = ["1,a/b,0.1", "2,a?b,0.2", '3,"x, y",0.3', "4,..,0.4", "5,absent,-1.0", "6,stop sign,0.5", "7,ö,0.6"]
    (tmp_path / "t.csv").write_text("\n".join(["category_id,name,AP", *rows, ""]))
    found = class_metrics(tmp_path / "t.csv")
    assert found == {
        "class_AP/a_b_1": 0.1, "class_AP/a_b_2": 0.2, "class_AP/x_ y": 0.3, "class_AP/.._4": 0.4,
        "class_AP/stop sign": 0.5, "class_AP/ö": 0.6,
    }  # fmt: skip
    (tmp_path / "empty.csv").write_text("")
    assert class_metrics(tmp_path / "empty.csv") == {}
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/mlflow.db"
    try:
        client = connect()
        run_id = client.create_run("0").info.run_id
        for name, value in found.items():
            client.log_metric(run_id, name, value)
        assert client.get_run(run_id).data.metrics == found
    finally:
        del os.environ["MLFLOW_TRACKING_URI"]


def test_the_seconds_of_training():
    history = [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 0.5}]
    timings = [{"step": 10, "images_per_second": 5.0}, {"step": 20, "images_per_second": 10.0}]
    assert training_seconds(history, timings, 2) == pytest.approx(10 * 2 / 5 + 10 * 2 / 10)
    assert training_seconds(history, timings[1:], 2) is None
    assert training_seconds([], timings, 2) is None


def test_the_digest_of_the_validation_data_is_that_of_its_files(drawn, tmp_path):
    one, two = (Path(shutil.copytree(drawn, tmp_path / name)) for name in ("one", "two"))
    (two / "instances_train.json").write_text("{}")
    assert val_digest(one) == val_digest(two)
    with (two / "val.zip").open("ab") as file:
        file.write(b"x")
    assert val_digest(one) != val_digest(two)


def test_without_git_there_is_no_diff(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert git_diff() == ""
    assert hashlib.sha256(b"").hexdigest().startswith("e3b0")
