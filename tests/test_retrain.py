"""Retraining through Prefect's server: what a deployment's run does to the clone, and shows."""

import json
import shutil

from tests.conftest import call


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


def test_two_at_once_take_turns_and_each_is_a_branch_of_its_own(served, tmp_path):
    first = served.training("train.epochs=20", "train.evaluate_epochs=0", "train.seed=1")
    second = served.start("retrain/on-demand", overrides=["train.epochs=1", "train.seed=2"])
    served.wait_until(lambda: served.run(second)["state_name"] == "Late", 120, "the second run's wait")
    assert served.run(first)["state_type"] == "RUNNING"
    assert served.tasks(second) == {}
    branches = [served.completed(run_id) for run_id in (first, second)]
    assert served.run(first)["end_time"] <= served.run(second)["start_time"]
    served.assert_sound()
    for number, branch in enumerate(branches):
        served.assert_reproduces(branch, tmp_path / str(number))


def test_data_that_fail_validation_stop_it_before_training_and_say_why(served, drawn):
    annotations = shutil.copytree(drawn, served.project / "scratch/bad") / "instances_train.json"
    document = json.loads(annotations.read_text())
    document["annotations"][0]["bbox"] = [90, 90, 50, 50]
    annotations.write_text(json.dumps(document))
    number = 76 if served.versions() else 75  # with a champion, how far the data are from its own is one more
    run_id = served.start("retrain/on-demand", overrides=["download.source=scratch/bad"])
    run = served.wait(run_id)
    assert run["state_type"] == "FAILED"
    assert run["state"]["message"].startswith(f"validate: 1 of {number} expectations on data/coco are broken")
    assert served.tasks(run_id).keys() == {"download", "validate"}
    assert served.tasks(run_id)["validate"] == "Failed"
    assert run["state"]["message"].removeprefix("validate: ") in served.artifacts(run_id)["failure"]["data"]
    served.assert_sound()


def test_what_was_held_back_may_be_promoted_later_without_a_training(served):
    overrides, before = ["train.epochs=1", "train.seed=3"], served.versions()
    served.completed(served.start("retrain/on-demand", overrides=overrides, promote=False))
    (number,) = served.versions().keys() - before
    assert served.versions()[number]["decision"] == "held back"
    assert "challenger" in served.versions()[number]["aliases"]
    run_id = served.start("retrain/on-demand", overrides=overrides)
    served.completed(run_id)
    assert served.tasks(run_id).pop("register") == "Ran"
    assert {state for name, state in served.tasks(run_id).items() if name != "register"} <= {"Restored", "Unchanged"}
    assert served.versions()[number]["decision"] in ("champion", "challenger")
    assert len(served.versions()) == len(before) + 1
    served.assert_sound()


def test_the_code_of_a_ref_runs_and_what_is_not_committed_stays(served):
    project = served.project
    call(project, "git", "switch", "--quiet", "--create", "other")
    with (project / "pipelines/download.py").open("a") as code:
        code.write("    print('of the other branch')\n")
    identity = ("-c", "user.name=t", "-c", "user.email=t@localhost")
    call(project, "git", *identity, "commit", "--quiet", "--all", "-m", "other")
    call(project, "git", "switch", "--quiet", "main")
    (project / "README.md").write_text("not committed\n")
    run_id = served.start("retrain/on-demand", overrides=["train.epochs=1"], ref="other")
    served.completed(run_id)
    assert served.run(run_id)["name"] == "train.epochs=1 @other"
    assert "of the other branch" in served.log(run_id)
    assert call(project, "git", "status", "--short") == " M README.md\n"
    unknown = served.wait(served.start("retrain/on-demand", ref="nowhere"))
    assert unknown["state_type"] == "FAILED"
    assert unknown["state"]["message"].startswith("'nowhere' is no commit, branch or tag here")
    served.assert_sound()
