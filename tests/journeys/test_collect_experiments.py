"""The disk is freed, and what DVC's experiments and git's stashes hold stays as long as the rest."""

import shutil

import pytest

from pipelines import tracking
from pipelines.params import to_yaml
from tests.collecting import OLD, collectable, collected, parameters, train, weights_in_cache
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
    running = project / ".dvc/tmp/exps/tmpabc/dvc.lock"
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
