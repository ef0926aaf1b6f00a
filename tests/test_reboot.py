"""What a retraining survives: its machine stops, and `up` starts everything again; the run goes on by itself."""

from tests.conftest import call

LONG = ("train.epochs=30", "train.evaluate_epochs=0")


def test_killed_in_the_middle_of_training_with_its_machine(served):
    run_id = served.training(*LONG, refresh=True)
    served.kill()
    assert not served.processes("DETR_WORKTREE")
    served.up()
    served.completed(run_id)
    assert "resuming at step" in served.log(run_id)
    assert served.tasks(run_id)["download"] == "Unchanged"  # it was downloaded again by the first attempt
    served.assert_sound()


def test_killed_between_the_registration_and_the_last_commit(served):
    before = served.versions()
    run_id = served.training(*LONG, "train.seed=1")
    registered = "scratch/worktrees/*/artifacts/register/version.json"
    served.wait_until(lambda: list(served.project.glob(registered)), 200, "the registration")
    (branch,) = call(
        served.project, "git", "branch", "--list", "runs/*", "--sort=-committerdate", "--format=%(refname:short)"
    ).split()[:1]
    served.kill()
    served.up()
    assert served.completed(run_id) == branch
    assert len(served.versions()) == len(before) + 1
    served.assert_sound()


def test_worker_and_run_are_killed_but_not_the_servers(served):
    run_id = served.training(*LONG, "train.seed=2")
    for words in ("prefect worker", "prefect."):
        served.kill(words=words)
    served.up()
    served.completed(run_id)
    assert "resuming at step" in served.log(run_id)
    served.assert_sound()
