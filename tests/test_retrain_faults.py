"""What a retraining survives while its machine goes on: a cancellation, and each server and the worker killed."""

import time

import psutil

LONG = ("train.epochs=30", "train.evaluate_epochs=0")


def test_cancelled_in_the_middle_all_ends_in_30_seconds_and_the_next_run_resumes(served):
    run_id = served.training(*LONG)
    served.wait_until(lambda: served.percent(run_id) > 10, 120, "progress")
    stage = served.processes("DETR_WORKTREE")
    assert len([one for one in stage if "pipelines.train" in " ".join(one.cmdline())]) >= 3  # torchrun and its children
    served.ask("POST", f"flow_runs/{run_id}/set_state", state={"type": "CANCELLING"})
    _, alive = psutil.wait_procs(stage, timeout=30)
    assert not alive
    assert served.wait(run_id, 60)["state_name"] == "Cancelled"
    assert served.states()
    served.assert_sound()
    again = served.start("retrain/on-demand", overrides=list(LONG))
    served.wait_until(lambda: served.percent(again), 200, "progress of what goes on")
    assert served.percent(again) >= served.percent(run_id) > 10
    served.completed(again)
    assert "resuming at step" in served.log(again)
    assert served.percent(again) == 100
    assert not served.states()
    served.assert_sound()


def test_the_run_outlives_its_worker(served):
    run_id = served.training(*LONG, "train.seed=1")
    again = served.stop("prefect worker")
    try:
        served.completed(run_id)
    finally:
        again()
    served.assert_sound()


def test_prefects_server_may_be_away_while_a_run_goes_on(served):
    run_id = served.training(*LONG, "train.seed=2")
    again = served.stop("prefect server")
    time.sleep(20)  # in which a state may have to be told
    again()
    served.completed(run_id)
    assert served.tasks(run_id)["register"] == "Ran"
    served.assert_sound()


def test_prefects_server_may_be_away_when_a_result_is_to_be_shown(served):
    before = served.versions().keys()
    run_id = served.training(*LONG, "train.seed=4")
    served.wait_until(lambda: served.versions().keys() - before, 200, "the registration")
    again = served.stop("prefect server")
    time.sleep(20)
    again()
    served.completed(run_id)
    assert served.tasks(run_id)["register"] == "Ran"
    served.assert_sound()


def test_mlflow_may_be_away_when_a_model_is_to_be_registered(served):
    run_id = served.training(*LONG, "train.seed=3")
    again = served.stop("mlflow server")
    stopped = time.monotonic()
    served.wait_until(lambda: served.tasks(run_id).get("register") == "AwaitingRetry", 200, "the first attempt")
    time.sleep(max(0, 60 - (time.monotonic() - stopped)))
    again()
    served.completed(run_id)
    assert "MLflow" in served.log(run_id)
    served.assert_sound()
