"""Turns at the registry, with a real MLflow and real processes."""

import os
import signal
import subprocess
import time

import pytest

from pipelines.registry import turns
from pipelines.registry.aliases import get_by_alias
from pipelines.registry.turns import take_turn
from tests.running import ROOT, environment

COUNT = """
import sys, time
from pathlib import Path
from pipelines.registry.tracking import connect
from pipelines.registry.turns import take_turn
client, file = connect(), Path(sys.argv[1])
for _ in range(int(sys.argv[2])):
    with take_turn(client) as check:
        count = int(file.read_text())
        time.sleep(0.05)
        check()
        file.with_suffix(".new").write_text(str(count + 1))
        file.with_suffix(".new").replace(file)
"""


def counting(tmp_path, times):
    env = environment(cold=True, PYTHONPATH=str(ROOT), MLFLOW_TRACKING_URI=os.environ["MLFLOW_TRACKING_URI"])
    command = ["python", "-c", COUNT, str(tmp_path / "count"), str(times)]
    return subprocess.Popen(command, cwd=tmp_path, env=env, start_new_session=True, stdout=subprocess.DEVNULL)


def test_processes_take_turns_from_the_first_on_and_a_killed_one_is_passed_over(client, tmp_path):
    """Three that begin at once, of which one is killed in the middle of its turn."""
    (tmp_path / "count").write_text("0", encoding="utf-8")
    one, two, three = (counting(tmp_path, times) for times in (4, 4, 10**6))
    try:
        while True:
            assert three.poll() is None
            experiment = client.get_experiment_by_name(turns.TURNS)
            params = client.search_runs([experiment.experiment_id])[0].data.params if experiment else {}
            if f" {three.pid} " in params.get(f"turn-{turns._last(params)}", "") and len(params) > 4:
                break
            time.sleep(0.01)
        os.kill(three.pid, signal.SIGKILL)
        assert (one.wait(), two.wait()) == (0, 0)
    finally:
        for process in (one, two, three):
            process.kill()
            process.wait()
    params = client.search_runs([client.get_experiment_by_name(turns.TURNS).experiment_id])[0].data.params
    taken = [params[f"turn-{k}"].split()[2] for k in range(1, turns._last(params) + 1)]
    assert (taken.count(str(one.pid)), taken.count(str(two.pid))) == (4, 4)
    ended = sum(name.startswith("end-") for name in params)
    assert len(taken) - 1 <= ended <= len(taken)
    assert int((tmp_path / "count").read_text(encoding="utf-8")) in (ended, ended + 1), "no update is lost"
    assert len(client.search_experiments(filter_string="name LIKE 'detr-registrations%'")) == 1


def test_a_silent_process_on_another_host_loses_its_turn(client, monkeypatch):
    monkeypatch.setattr(turns, "STALE_SECONDS", 2.0)
    run_id = turns._turns(client)
    with take_turn(client) as check:
        client.log_param(run_id, "turn-2", "elsewhere pid:[1] 1 0.0 abc")
        with pytest.raises(RuntimeError, match="gave no sign for 2 seconds, another registers now"):
            check()
    with take_turn(client) as check:
        check()
        assert turns._last(client.get_run(run_id).data.params) == 3


def test_whoever_gives_signs_from_another_host_keeps_its_turn(client, monkeypatch, capsys):
    monkeypatch.setattr(turns, "STALE_SECONDS", 2.0)
    run_id = turns._turns(client)
    client.log_param(run_id, "turn-1", "elsewhere pid:[1] 7 0.0 abc")
    begun, beats = time.monotonic(), 0

    def sleep(seconds, really=time.sleep):
        nonlocal beats
        if time.monotonic() - begun < 5:
            beats += 1
            client.set_tag(run_id, "beat", f"1 {beats}")
        else:
            client.log_param(run_id, "end-1", "x")
        really(seconds)

    monkeypatch.setattr(turns.time, "sleep", sleep)
    with take_turn(client):
        assert "end-1" in client.get_run(run_id).data.params
    assert "waiting for process 7 on elsewhere, which changes the registry" in capsys.readouterr().out


def test_a_deleted_log_of_turns_is_restored(client):
    with take_turn(client):
        pass
    client.delete_experiment(client.get_experiment_by_name(turns.TURNS).experiment_id)
    with take_turn(client) as check:
        check()
    assert get_by_alias(client, "champion") is None
