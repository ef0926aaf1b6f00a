import socket
import threading

import pytest

from pipelines.tracking import Mirror, connect, fill_in, find_run, flatten, log_params, log_rows

ROWS = [{"epoch": k // 4, "step": 2 * k, "loss": 9.0 - k, "lr": 0.1, "AP": 0.01 * k} for k in range(1, 9)]


@pytest.fixture
def local(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path


def history(client, run_id, name):
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]


def test_a_run_is_found_by_its_fingerprint(local):
    client = connect()
    run_id = find_run(client, "abc", "train abc")
    assert find_run(client, "abc", "other") == run_id
    assert find_run(client, "abd", "train abd") != run_id
    assert client.get_run(run_id).info.artifact_uri.startswith(f"file://{local}/mlartifacts/")


def test_what_a_run_lacks_is_filled_in_once(local):
    client = connect()
    run_id = find_run(client, "abc", "train abc")
    log_rows(client, run_id, ROWS[:3])
    assert fill_in(client, run_id, ROWS) == 5
    assert fill_in(client, run_id, ROWS) == 0
    assert history(client, run_id, "train/loss") == [(row["step"], row["loss"]) for row in ROWS]
    assert history(client, run_id, "val/AP") == [(row["step"], row["AP"]) for row in ROWS]
    assert fill_in(client, run_id, []) == 0


def test_params_are_flat_and_logged_once(local):
    client = connect()
    run_id = find_run(client, "abc", "train abc")
    for _ in range(2):
        log_params(client, run_id, {"train": {"lr": 1e-4, "loss": {"auxiliary": True}}})
    assert client.get_run(run_id).data.params == {"train.lr": "0.0001", "train.loss.auxiliary": "True"}


def test_flatten():
    assert flatten({}) == {}
    assert flatten({"a": {"b": {"c": 1}}, "d": [2]}) == {"a.b.c": 1, "d": [2]}


def test_the_mirror_sends_every_row(local):
    mirror = Mirror("abc", "train abc", {"train": {"lr": 1.0}})
    for row in ROWS:
        mirror.put(row)
    mirror.close(timeout_seconds=120)
    client = connect()
    run_id = find_run(client, "abc", "train abc")
    assert history(client, run_id, "train/loss") == [(row["step"], row["loss"]) for row in ROWS]


def test_the_mirror_sends_no_step_twice(local):
    for rows in (ROWS[:5], ROWS[3:]):
        mirror = Mirror("abc", "train abc", {})
        for row in rows:
            mirror.put(row)
        mirror.close(timeout_seconds=120)
    client = connect()
    logged = history(client, find_run(client, "abc", "train abc"), "train/loss")
    assert logged == [(row["step"], row["loss"]) for row in ROWS]


def test_the_mirror_survives_a_server_that_is_not_there(monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        mirror = Mirror("abc", "train abc", {})
        for row in ROWS:
            mirror.put(row)
        mirror.close(timeout_seconds=120)
    assert "warning: MLflow misses rows" in capsys.readouterr().err


def test_the_mirror_does_not_wait_for_a_server_that_hangs(monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        mirror = Mirror("abc", "train abc", {})
        for row in ROWS:
            mirror.put(row)
        mirror.close(timeout_seconds=0.1)
        (thread,) = [t for t in threading.enumerate() if t is mirror._thread]
        assert thread.is_alive()
        thread.join(timeout=120)


def test_an_unreachable_server_is_named(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with pytest.raises(ValueError, match=r"MLflow at http://127.0.0.1:\d+ is unreachable .* start it or unset"):
            connect()
