"""What a retraining survives: a cancellation, its machine's stop, each server and the worker killed."""

import psutil
import pytest

from tests.orchestra import branch, connections, listening, services
from tests.projects import quick_project
from tests.running import ROOT, call


@pytest.fixture(scope="module")
def outside():
    """Where every request to an address that is not loopback goes, by the variables of a proxy."""
    with listening() as found:
        yield found


@pytest.fixture(scope="module")
def env(outside):
    return dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), outside[0])


@pytest.fixture(scope="module")
def served(tmp_path_factory, env):
    """A project with quick stages, and the real ones on the branch `real`, its servers and its worker."""
    project = quick_project(tmp_path_factory.mktemp("served"))
    branch(
        project,
        "real",
        lambda: (project / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text(encoding="utf-8"), encoding="utf-8"),
    )
    with services(project, **env) as found:
        yield found


@pytest.fixture(autouse=True)
def sound(served):
    yield
    served.assert_sound()


def test_cancelled_in_the_middle_all_ends_in_30_seconds_and_the_next_run_resumes(served, outside):
    """With the real stages, which ask nobody elsewhere."""
    asked = {"overrides": ["train.epochs=30", "train.evaluate_epochs=0"], "ref": "real"}
    with connections(served.project) as found:
        run_id = served.training(*asked["overrides"], ref="real")
        served.wait_until(lambda: served.percent(run_id) > 10, what="progress")
        stage = served.processes("DETR_WORKTREE")
        trainers = [one for one in stage if "pipelines.train" in " ".join(one.cmdline())]
        assert len(trainers) >= 3  # torchrun and its children
        served.ask("POST", f"flow_runs/{run_id}/set_state", state={"type": "CANCELLING"})
        _, alive = psutil.wait_procs(stage, timeout=30)
        assert not alive
        assert served.wait(run_id)["state_name"] == "Cancelled"
        assert served.states()
        served.assert_sound()
        again = served.start("retrain/on-demand", **asked)
        served.wait_until(lambda: served.percent(again), what="progress of what goes on")
        assert served.percent(again) >= served.percent(run_id) > 10
        served.completed(again)
    assert "resuming at step" in served.log(again)
    assert served.percent(again) == 100
    assert not served.states()
    assert found == set()
    assert outside[1] == []


def test_the_run_outlives_its_worker(served):
    with served.held("train.epochs=2", "train.seed=1") as run_id:
        again = served.stop("prefect worker")
    try:
        served.completed(run_id)
    finally:
        again()


def test_prefects_server_may_be_away_while_a_run_goes_on(served):
    with served.held("train.epochs=2", "train.seed=2") as run_id:
        again = served.stop("prefect server")
    served.end_of("train")  # which the server is to be told
    again()
    served.completed(run_id)
    assert served.tasks(run_id)["register"] == "Ran"


def test_prefects_server_may_be_away_when_a_result_is_to_be_shown(served):
    before = served.versions().keys()
    with served.held("train.seed=3", after="register") as run_id:
        assert served.versions().keys() - before
        again = served.stop("prefect server")
    served.end_of("register")
    again()
    served.completed(run_id)
    assert served.tasks(run_id)["register"] == "Ran"


def test_mlflow_may_be_away_when_a_model_is_to_be_registered(served):
    with served.held("train.epochs=2", "train.seed=4") as run_id:
        again = served.stop("mlflow server")
    served.wait_until(lambda: served.tasks(run_id).get("register") == "AwaitingRetry", what="the first attempt")
    again()
    served.completed(run_id)
    assert "MLflow" in served.log(run_id)


def test_killed_in_the_middle_of_training_with_its_machine(served, env):
    with served.held("train.epochs=2", "train.seed=5", refresh=True) as run_id:
        served.kill()
        assert not served.processes("DETR_WORKTREE")
    served.up(**env)
    served.completed(run_id)
    assert "resuming at step" in served.log(run_id)
    assert served.tasks(run_id)["download"] == "Unchanged"  # it was downloaded again by the first attempt


def test_killed_between_the_registration_and_the_last_commit(served, env):
    before = served.versions()
    with served.held("train.seed=6", after="register") as run_id:
        newest = ("git", "branch", "--list", "runs/*", "--sort=-committerdate", "--format=%(refname:short)")
        made = call(served.project, *newest).split()[0]
        served.kill()
    served.up(**env)
    assert served.completed(run_id) == made
    assert len(served.versions()) == len(before) + 1


def test_worker_and_run_are_killed_but_not_the_servers(served, env):
    with served.held("train.epochs=2", "train.seed=7") as run_id:
        for words in ("prefect worker", "prefect."):
            served.kill(words=words)
    served.up(**env)
    served.completed(run_id)
    assert "resuming at step" in served.log(run_id)
