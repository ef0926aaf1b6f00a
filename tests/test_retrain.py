"""Retraining through Prefect's server: what a deployment's run does to the clone, and shows."""

import pytest

from tests.conftest import call, small_project
from tests.orchestra import services


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A small project with its servers and worker. Tests in this module use it in turn."""
    project = small_project(tmp_path_factory.mktemp("retrain"))
    with services(project) as found:
        yield found


def test_a_run_is_a_commit_and_the_clone_stays_as_it_was(served):
    project = served.project
    before = [call(project, "git", *a) for a in (["status", "--short"], ["rev-parse", "HEAD"], ["branch"])]
    run_id = served.start("retrain/on-demand", overrides=["train.epochs=1"], note="a first try")
    run = served.wait(run_id)
    assert run["state_type"] == "COMPLETED", served.log(run_id)
    assert run["name"] == "train.epochs=1"
    assert served.tasks(run_id) == dict.fromkeys(("download", "validate", "train", "evaluate", "register"), "Ran")
    (branch,) = call(project, "git", "branch", "--list", "runs/*", "--format=%(refname:short)").split()
    assert run["state"]["message"] == f"branch {branch}"
    assert "a first try" in call(project, "git", "log", "--format=%B", f"main..{branch}")
    call(project, "git", "diff", "--quiet", "main", branch, "--", ".", ":!params.yaml", ":!dvc.lock")
    after = [call(project, "git", *a) for a in (["status", "--short"], ["rev-parse", "HEAD"])]
    assert after == before[:2]
    assert {"result", "metrics", "dataset", "training"} <= set(served.artifacts(run_id))
