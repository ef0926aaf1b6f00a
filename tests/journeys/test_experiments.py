"""DVC's experiments: where they register, and how long what they hold stays."""

import shutil

import pytest

from pipelines.params import to_yaml
from pipelines.registry import tracking
from tests.collecting import OLD, collectable, collected, parameters, train, weights_in_cache
from tests.projects import quick_project
from tests.running import call


@pytest.fixture
def project(empty_registry, tmp_path, monkeypatch):
    return collectable(tmp_path / "project", empty_registry, monkeypatch)


def test_experiments_and_stashes_stay_as_long_as_the_rest(project):
    """They are named by no commit of a branch."""
    call(project, "dvc", "repro")
    train(project)
    call(project, "git", "add", "--all")
    call(project, "git", "commit", "--quiet", "-m", "results")
    call(project, "dvc", "exp", "run", "--temp", "--name", "today", "-S", "train.seed=5")
    (today,) = call(project, "git", "for-each-ref", "--format=%(refname)", "refs/exps/??/*/today").split()
    files = {"today": weights_in_cache(project, today)}
    running = project / ".dvc/tmp/exps/standalone/tmpabc/dvc.lock"
    running.parent.mkdir(parents=True, exist_ok=True)
    for seed in (6, 7):
        (project / "params.yaml").write_text(to_yaml(parameters(seed, project)), encoding="utf-8")
        call(project, "dvc", "repro")
        if seed == 6:
            call(project, "git", "stash", "--quiet", GIT_COMMITTER_DATE=f"{OLD:.0f} +0000")
            call(project, "git", "update-ref", today.replace("today", "old"), "refs/stash")
            call(project, "git", "stash", "drop", "--quiet")
            files["old"] = weights_in_cache(project, today.replace("today", "old"))
    train(project)
    shutil.copy(project / "dvc.lock", running)
    call(project, "git", "stash", "--quiet")
    files["stashed or running"] = weights_in_cache(project, "refs/stash")
    assert collected(project, days=14, dry_run=True).went["experiments"] == [("old", 0)]
    assert set(call(project, "dvc", "exp", "list", "--name-only").split()) == {"today", "old"}
    assert all(path.exists() for path in files.values())
    done = collected(project, days=14)
    assert (done.went["experiments"], len(done.went["DVC cache"])) == ([("old", 0)], 1)
    assert {name for name, path in files.items() if path.exists()} == {"today", "stashed or running"}
    call(project, "git", "stash", "drop", "--quiet")
    assert collected(project, days=14).bytes == 0
    assert call(project, "dvc", "exp", "list", "--name-only").split() == ["today"]
    call(project, "dvc", "exp", "apply", "today")
    assert tracking.sha256(project / "artifacts/train/model.safetensors") == tracking.sha256(files["today"])


def test_an_experiment_in_a_folder_of_its_own_registers_in_the_clone(tmp_path, monkeypatch):
    root = quick_project(tmp_path)
    said = call(root, "dvc", "exp", "run", "--temp", "--name", "mine", "-S", "train.epochs=1")
    assert "registered detr version 1 as champion" in said
    assert not list((root / ".dvc/tmp/exps").rglob("tmp*"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    (version,) = tracking.list_versions(tracking.connect())
    assert version.tags["git_commit"] == call(root, "git", "rev-parse", "HEAD").strip()
    assert list((root / "mlartifacts").rglob("dvc.lock"))
    call(root, "dvc", "exp", "apply", "mine")
    assert '"version": 1' in (root / "artifacts/register/version.json").read_text(encoding="utf-8")
    changed = {line[3:] for line in call(root, "git", "status", "--porcelain").splitlines()}
    assert changed == {"dvc.lock", "params.yaml"}
