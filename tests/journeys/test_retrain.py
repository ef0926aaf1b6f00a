"""Retraining through Prefect's server: what a deployment's run does to the clone, and shows."""

import json
import shutil

import psutil
import pytest

from tests.orchestra import branch
from tests.running import ROOT, call

pytestmark = pytest.mark.xdist_group("servers")
STAGES = ("download", "validate", "train", "evaluate", "register")


def test_a_run_is_a_commit_and_the_clone_stays_as_it_was(served, real):
    """With the real stages."""
    project = served.project
    assert real.run["name"] == "train.epochs=1 @loud"
    assert served.tasks(real.id) == dict.fromkeys(STAGES, "Ran")
    assert real.branch in call(project, "git", "branch", "--list", "runs/*", "--format=%(refname:short)").split()
    assert "A first try" in call(project, "git", "log", "--format=%B", f"loud..{real.branch}")
    call(project, "git", "diff", "--quiet", "loud", real.branch, "--", ".", ":!params.yaml", ":!dvc.lock")
    before, after = real.clone
    assert after == before
    assert {"result", "metrics", "dataset", "training"} <= served.artifacts(real.id).keys()


def test_what_was_held_back_may_be_promoted_later_without_a_training(served, real):
    """With the real stages."""
    assert real.tags["decision"] == "held back"
    assert "challenger" in real.tags["aliases"]
    before = served.versions().keys()
    run_id = served.start("retrain/on-demand", **real.asked)
    served.completed(run_id)
    tasks = served.tasks(run_id)
    assert tasks.pop("register") == "Ran"
    assert tasks.keys() == set(STAGES[:-1])
    assert set(tasks.values()) <= {"Restored", "Unchanged"}
    assert served.versions()[real.number]["decision"] in ("champion", "challenger")
    assert served.versions().keys() == before
    served.assert_sound()


def test_what_was_registered_with_a_server_can_be_used_without(served, real):
    options = ("--model", str(real.number), "--threshold", "0")
    call(served.project, "python", "-m", "pipelines", "predict", str(ROOT / "docs"), *options)
    assert (served.project / "scratch/predictions/detections.json").exists()


def test_two_at_once_take_turns_and_each_is_a_branch_of_its_own(served, tmp_path):
    with served.held("train.epochs=1", "train.seed=1") as first:
        second = served.start("retrain/on-demand", overrides=["train.epochs=1", "train.seed=2"])
        served.wait_until(lambda: served.run(second)["state_name"] == "Late", what="the second run's wait")
        assert served.run(first)["state_type"] == "RUNNING"
        assert served.tasks(second) == {}
    branches = [served.completed(run_id) for run_id in (first, second)]
    assert len(set(branches)) == 2
    assert served.run(first)["end_time"] <= served.run(second)["start_time"]
    served.assert_sound()
    for number, name in enumerate(branches):
        served.assert_reproduces(name, tmp_path / str(number))


def test_data_that_fail_validation_stop_it_before_training_and_say_why(served, drawn):
    """With the real stages."""
    annotations = shutil.copytree(drawn, served.project / "scratch/bad") / "instances_train.json"
    document = json.loads(annotations.read_text(encoding="utf-8"))
    document["annotations"][0]["bbox"] = [90, 90, 50, 50]
    annotations.write_text(json.dumps(document), encoding="utf-8")
    number = 84 if served.versions() else 83  # with a champion, how far the data are from its own is one more
    run_id = served.start("retrain/on-demand", overrides=["download.source=scratch/bad"], ref="real")
    run = served.wait(run_id)
    assert run["state_type"] == "FAILED"
    assert run["state"]["message"].startswith(f"validate: 1 of {number} expectations on data/coco are broken")
    assert served.tasks(run_id).keys() == {"download", "validate"}
    assert served.tasks(run_id)["validate"] == "Failed"
    assert run["state"]["message"].removeprefix("validate: ") in served.artifacts(run_id)["failure"]["data"]
    served.assert_sound()


def test_the_code_of_a_ref_runs_and_what_is_not_committed_stays(served):
    project = served.project
    code = (project / "quick.py").read_text(encoding="utf-8")
    head = "def download(params: dict) -> None:\n"
    changed = code.replace(head, f"{head}    print('of the other branch')\n")
    branch(project, "other", lambda: (project / "quick.py").write_text(changed, encoding="utf-8"))
    readme = (project / "README.md").read_text(encoding="utf-8")
    try:
        (project / "README.md").write_text("not committed\n", encoding="utf-8")
        asked = {"overrides": ["train.epochs=1", "train.seed=3"], "ref": "other"}
        run_id = served.start("retrain/on-demand", **asked)
        unknown = served.start("retrain/on-demand", ref="nowhere")
        served.completed(run_id)
        assert served.run(run_id)["name"] == "train.epochs=1 train.seed=3 @other"
        assert "of the other branch" in served.log(run_id)
        failed = served.wait(unknown)
        assert failed["state_type"] == "FAILED"
        assert failed["state"]["message"].startswith("'nowhere' is no commit, branch or tag here")
        assert call(project, "git", "status", "--short") == " M README.md\n"
    finally:
        (project / "README.md").write_text(readme, encoding="utf-8")
    served.assert_sound()


def test_cancelled_in_the_middle_all_ends_in_30_seconds_and_the_next_run_resumes(served):
    """With the real stages: tests/slow/test_retrain_faults.py."""
    with served.held("train.epochs=2", "train.seed=4") as run_id:
        served.wait_until(lambda: served.percent(run_id), what="progress")
        stage = served.processes("DETR_WORKTREE")
        assert stage
        served.ask("POST", f"flow_runs/{run_id}/set_state", state={"type": "CANCELLING"})
        _, alive = psutil.wait_procs(stage, timeout=30)
        assert not alive
        assert served.wait(run_id)["state_name"] == "Cancelled"
        assert served.states()
        served.assert_sound()
    again = served.start("retrain/on-demand", overrides=["train.epochs=2", "train.seed=4"])
    served.completed(again)
    assert "resuming at step 5" in served.log(again)
    assert served.percent(again) == 100
    assert not served.states()
    served.assert_sound()
