"""The register stage with real MLflow: lineage, the gate, and what is left after kills, faults and company."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from pipelines.registry import aliases, gate
from pipelines.registry.tracking import MODEL, sha256
from tests.projects import commit, detections_like, trained_project
from tests.registering import assert_nothing_is_lost, at, at_uri, look, run, the_error, together
from tests.running import call


def test_a_version_carries_its_lineage_and_no_secret(projects, tmp_path):
    folder = Path(shutil.copytree(projects["strong"], tmp_path / "project"))
    (folder / ".gitignore").write_text(
        "/mlflow.db\n/mlartifacts\n/artifacts\n/data\n/scratch\n*.pyc\n", encoding="utf-8"
    )
    (folder / "pipelines").mkdir()
    (folder / "pipelines/known.py").write_text("old = 1\n", encoding="utf-8")
    call(folder, "git", "init", "--quiet", "--initial-branch=main")
    commit(folder, "start", "--all")
    (folder / "pipelines/known.py").write_text("new = 1\n", encoding="utf-8")
    (folder / "pipelines/unknown.py").write_text("unknown = 1\n", encoding="utf-8")
    (folder / "private.env").write_text("PASSWORD=hunter2-file\n", encoding="utf-8")
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
    numbers = json.loads((folder / "artifacts/evaluate/metrics.json").read_text(encoding="utf-8"))
    assert {name: float(tags[name]) for name in numbers} == numbers
    assert {name: metrics.get(name) for name in numbers} == {n: None if v == -1 else v for n, v in numbers.items()}
    assert {"AP", "AP_low", "AP_high"} <= set(numbers)
    assert {name: value for name, value in metrics.items() if name.startswith("class_AP/")} == {
        f"class_AP/{name}": 0.25 for name in gate.read_names(folder / "data/coco/instances_val.json")
    }
    assert metrics["training_seconds"] == pytest.approx(2 * 2 * 8 / 4.0)
    for name in ("dvc.lock", "params.yaml", "evaluate/detections.json", "train/history.jsonl", "validate/report.json"):
        assert (run_folder / name).exists()
    decision = json.loads((run_folder / "register/decision.json").read_text(encoding="utf-8"))
    assert (decision["alias"], decision["sentence"]) == ("champion", tags["decision_reason"])
    assert decision["candidate"]["ap"] == pytest.approx(numbers["AP"], abs=1e-9)
    assert decision["sentence"] in (run_folder / "register/decision.md").read_text(encoding="utf-8")
    there = [path for path in [*artifacts.rglob("*"), folder / "mlflow.db"] if path.is_file()]
    assert not [path for path in there if b"hunter2" in path.read_bytes()]
    clean = tmp_path / "clean"
    call(tmp_path, "git", "clone", "--quiet", str(folder), str(clean))
    call(clean, "git", "apply", str(run_folder / "git.diff"))
    assert (clean / "pipelines/known.py").read_text(encoding="utf-8") == "new = 1\n"
    assert (clean / "pipelines/unknown.py").read_text(encoding="utf-8") == "unknown = 1\n"
    assert not (clean / "private.env").exists()
    assert call(folder, "git", "status", "--porcelain").split("\n")[:2] == [
        " M pipelines/known.py",
        "?? pipelines/unknown.py",
    ]
    assert "registered detr version 1 as champion: these weights were registered before" in run(folder, uri)
    assert look(uri) == ({"champion": 1}, {1: "champion"})


def test_where_git_refuses_the_version_says_so_and_never_that_the_code_was_clean(projects, tmp_path):
    folder = Path(shutil.copytree(projects["strong"], tmp_path / "project"))
    call(folder, "git", "init", "--quiet", "--initial-branch=main")
    call(folder, "git", "add", "params.yaml")
    call(folder, "git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "-m", "start")
    uri = f"sqlite:///{folder}/mlflow.db"
    said = run(folder, uri, GIT_TEST_ASSUME_DIFFERENT_OWNER="1")  # as in a container that mounts another user's clone
    remedy = f"git config --global --add safe.directory {folder}"
    (warning,) = (line for line in said.splitlines() if line.startswith("warning: "))
    assert warning.startswith("warning: the version's lineage says unknown, until dvc repro runs where git does not ")
    assert warning.endswith(remedy)
    assert "registered detr version 1 as champion" in said
    tags = at_uri(uri).get_model_version(MODEL, "1").tags
    assert [tags[f"git_{name}"] for name in ("commit", "branch", "dirty")] == ["unknown"] * 3
    said = run(folder, uri, ("python", "-m", "pipelines", "reproduce", "1"), code=1)
    assert the_error(said).startswith("error: models:/detr/1 was registered outside of git: ")
    assert remedy in said
    run(folder, uri)
    version = at_uri(uri).get_model_version(MODEL, "1")
    commit = call(folder, "git", "rev-parse", "HEAD").strip()
    assert [version.tags[f"git_{name}"] for name in ("commit", "branch", "dirty")] == [commit, "main", "true"]
    assert "git_failure" not in version.tags
    assert at_uri(uri).get_run(version.run_id).data.tags["git_commit"] == commit


def test_the_better_takes_the_place_an_equal_does_not_and_protection_holds(projects, uri, tmp_path, drawn):
    said = run(projects["strong"], uri)
    assert "registered detr version 2 as champion: AP" in said
    assert "better in 100.0% of 1000 resamples" in said
    said = run(projects["equal"], uri)
    assert "registered detr version 3 as challenger: AP" in said
    assert "+0.0000 [-0.2646, +0.2646], better in 0.0% of 1000 resamples: it is not certain enough" in said
    assert look(uri)[0] == {"champion": 2, "previous_champion": 1, "challenger": 3}
    (name, *_) = gate.read_names(drawn / "instances_val.json")
    better = detections_like(drawn / "instances_val.json", 0.0, lost=name)
    other = trained_project(tmp_path / "other", drawn, "other", better, protected={name: 0.05, "no": 0.1})
    assert the_error(run(other, uri, code=1)).startswith("error: register.protected names 'no', no category")
    text = (other / "params.yaml").read_text(encoding="utf-8")
    assert "    no: 0.1\n" in text
    (other / "params.yaml").write_text(text.replace("    no: 0.1\n", ""), encoding="utf-8")
    said = run(other, uri)
    assert "registered detr version 4 as challenger" in said
    assert f"{name} loses " in said
    client = at_uri(uri)
    page = aliases.read_run_file(client, client.get_model_version(MODEL, "4").run_id, "register/decision.md").decode()
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


def test_three_at_once_lose_no_update(projects, tmp_path):
    folders = [projects["weak"], projects["strong"], shutil.copytree(projects["strong"], tmp_path / "twin")]
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert_nothing_is_lost(uri, together(folders, uri))


def test_weights_whose_files_are_gone_are_registered_anew(projects, uri, tmp_path):
    shutil.rmtree(tmp_path / "mlartifacts/models")
    said = run(projects["weak"], uri)
    assert (
        "registered detr version 2 as champion: version 1, the champion, has the same weights and lost its files"
        in said
    )
    assert look(uri)[0] == {"champion": 2, "previous_champion": 1}


def test_weights_of_renamed_categories_are_another_version(projects, uri, tmp_path):
    folder = Path(shutil.copytree(projects["weak"], tmp_path / "renamed"))
    for name in ("artifacts/train/config.json", "data/coco/instances_val.json"):
        document = json.loads((folder / name).read_text(encoding="utf-8"))
        for category in document["categories"]:
            category["name"] = f"the {category['name']}"
        (folder / name).write_text(json.dumps(document), encoding="utf-8")
    said = "version 1, the champion, has the same weights and other names for what they find"
    assert f"registered detr version 2 as champion: {said}" in run(folder, uri)
    assert "version 1 as previous_champion: these weights were registered before" in run(projects["weak"], uri)
    assert look(uri)[0] == {"champion": 2, "previous_champion": 1}


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
    limited = ("bash", "-c", f"ulimit -f {size // 2048}; exec python -m pipelines.register")
    assert "File too large" in the_error(run(projects["weak"], uri, limited, code=1))
    assert "registered detr version 1 as champion" in run(projects["weak"], uri)
