import json
import random
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from torchvision.io import write_png

from detr.checkpoint import Category, InputSize, build_model, save_model
from pipelines.params import merge_parameters, to_yaml
from pipelines.registry.mirror import Mirror
from pipelines.registry.tracking import (
    connect,
    fill_in,
    fill_in_pictures,
    find_run,
    flatten,
    log_params,
    log_rows,
    read_rows,
)
from tests.projects import TINY_MODEL
from tests.running import ROOT, call, environment, mlflow_server

ROWS = [{"epoch": k // 4, "step": 2 * k, "loss": 9.0 - k, "lr": 0.1, "AP": 0.01 * k} for k in range(1, 9)]


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
    assert flatten({"a": {"b": {"http://c": 1, "d": 2}}}) == {"a.b": '{"http://c": 1, "d": 2}'}


@pytest.fixture
def pictures(tmp_path):
    """Three pictures in a folder."""
    (tmp_path / "pictures").mkdir()
    for k in range(3):
        image = torch.full((3, 8 + k, 8), 50 * k, dtype=torch.uint8)
        write_png(image, str(tmp_path / "pictures" / f"{k}.png"))
    return sorted((tmp_path / "pictures").iterdir())


def mirrored(rows, pictures=(), fingerprint="abc"):
    mirror = Mirror(fingerprint, f"train {fingerprint}", {"train": {"lr": 1.0}})
    for row in rows:
        mirror.put(row)
    for picture in pictures:
        mirror.put_picture(picture)
    return mirror


def assert_all_there_once(client, run_id, rows):
    for name in {name for row in rows for name in row} - {"step"}:
        key = f"{'val' if name == 'AP' else 'train'}/{name}"
        expected = [(row["step"], row[name]) for row in rows if name in row]
        assert sorted(history(client, run_id, key)) == expected


def assert_pictures_are_there(client, run_id, pictures):
    files = {Path(file.path).name: file.file_size for file in client.list_artifacts(run_id, "pictures")}
    assert files == {picture.name: picture.stat().st_size for picture in pictures}


def eventually(condition):
    """Waits for what a thread does; a test that waits in vain ends at its own time limit."""
    while not condition():
        time.sleep(0.02)


@contextmanager
def absent_server():
    """An address where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@contextmanager
def silent_server():
    """The address of a server that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_the_mirror_sends_every_row_and_every_picture(local, pictures, capfd):
    gone = pictures[0].with_name("gone.png")
    mirrored(ROWS, [pictures[0], gone, *pictures[1:]]).close(timeout_seconds=120)
    client = connect()
    run_id = find_run(client, "abc", "train abc")
    assert_all_there_once(client, run_id, ROWS)
    assert_pictures_are_there(client, run_id, pictures)
    assert client.get_run(run_id).data.params == {"train.lr": "1.0"}
    assert capfd.readouterr().err == ""


def test_the_mirror_sends_no_step_twice(local):
    for rows in (ROWS[:5], ROWS[3:]):
        mirrored(rows).close(timeout_seconds=120)
    client = connect()
    assert_all_there_once(client, find_run(client, "abc", "train abc"), ROWS)


def test_without_a_row_there_is_no_run(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    Mirror("abc", "train abc", {}).close(timeout_seconds=120)
    assert not (tmp_path / "mlflow.db").exists()


def test_system_metrics_go_along(local, monkeypatch):
    monkeypatch.setattr("pipelines.registry.mirror.TICK_SECONDS", 0.1)
    mirror = mirrored(ROWS[:2])
    eventually(lambda: not mirror._rows and mirror._client)
    client, name = connect(), "system/cpu_utilization_percentage"
    run_id = find_run(client, "abc", "train abc")
    eventually(lambda: len(history(client, run_id, name)) > 2)
    mirror.put(ROWS[2])
    eventually(lambda: history(client, run_id, name)[-1][0] == ROWS[2]["step"])
    mirror.close(timeout_seconds=120)
    assert {step for step, _ in history(client, run_id, name)} == {ROWS[1]["step"], ROWS[2]["step"]}
    measured = {key: value for key, value in client.get_run(run_id).data.metrics.items() if key.startswith("system/")}
    assert {
        "system/cpu_utilization_percentage",
        "system/system_memory_usage_percentage",
        "system/disk_usage_percentage",
        "system/network_receive_megabytes",
    } <= measured.keys()
    assert all(0 <= value <= 100 for key, value in measured.items() if key.endswith("percentage"))


def test_the_mirror_goes_on_once_a_store_is_there(local, pictures, monkeypatch, capsys):
    monkeypatch.setattr("pipelines.registry.mirror.TICK_SECONDS", 0.1)
    with absent_server() as uri, monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", uri)
        mirror = mirrored(ROWS[:3], pictures[:1])
        eventually(lambda: mirror._failed)
    for row in ROWS[3:5]:
        mirror.put(row)
    eventually(lambda: mirror._client and not mirror._failed)
    mirror.put(ROWS[5])
    mirror.close(timeout_seconds=120)
    client = connect()
    run_id = find_run(client, "abc", "train abc")
    assert_all_there_once(client, run_id, ROWS[:6])
    assert_pictures_are_there(client, run_id, pictures[:1])
    assert capsys.readouterr().err.count("warning: MLflow misses rows") == 1


def test_the_mirror_survives_a_server_that_is_not_there(monkeypatch, capsys):
    with absent_server() as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        mirror = mirrored(ROWS)
        eventually(lambda: mirror._failed)
        mirror.close(timeout_seconds=600)
        mirror._thread.join()
    assert "warning: MLflow misses rows, they are filled in at registration: HTTP" in capsys.readouterr().err


def test_the_mirror_does_not_wait_for_a_server_that_hangs(monkeypatch):
    monkeypatch.setattr("pipelines.registry.mirror.ANSWER_SECONDS", 600)
    with silent_server() as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        mirror = mirrored(ROWS)
        mirror.close(timeout_seconds=600)
        assert mirror._thread.is_alive()
    mirror._thread.join()  # its connection is reset


def test_a_process_ends_while_its_server_hangs_and_never_imports_mlflow(tmp_path):
    code = f"""
import sys
import pipelines.registry.mirror
pipelines.registry.mirror.ANSWER_SECONDS = 600
mirror = pipelines.registry.mirror.Mirror("abc", "train abc", {{}})
for row in {ROWS}:
    mirror.put(row)
mirror.close()
print(mirror._thread.is_alive(), "mlflow" in sys.modules)
"""
    with silent_server() as uri:
        env = environment(MLFLOW_TRACKING_URI=uri, PYTHONPATH=str(ROOT))
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, encoding="utf-8"
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True False\n", "")


def test_what_a_server_missed_that_hung_and_then_died_is_filled_in(tmp_path, pictures, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with mlflow_server(tmp_path / "server") as (uri, _):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        mirror = mirrored(ROWS[:3], pictures[:1])
        eventually(lambda: mirror._client and not mirror._rows and not mirror._pictures)
        server = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
        for process in server:
            process.suspend()
        for row in ROWS[3:5]:
            mirror.put(row)
        mirror.put_picture(pictures[1])
        mirror.close(timeout_seconds=600)
        assert mirror._thread.is_alive()
        for process in server:
            process.resume()
        mirror._thread.join()
        client = connect()
        run_id = find_run(client, "abc", "train abc")
        fill_in(client, run_id, ROWS[:6])
        fill_in_pictures(client, run_id, pictures[0].parent)
        assert_all_there_once(client, run_id, ROWS[:6])
        assert_pictures_are_there(client, run_id, pictures)
        assert capsys.readouterr().err == ""
        mirror = mirrored(ROWS[5:7])
        eventually(lambda: mirror._client and not mirror._rows)
    mirror.put(ROWS[7])
    mirror.close(timeout_seconds=600)
    mirror._thread.join()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/server/server.db")
    client = connect()
    assert fill_in(client, run_id, ROWS) == 1
    assert_all_there_once(client, run_id, ROWS)
    assert "warning: MLflow misses rows" in capsys.readouterr().err


def test_any_part_of_any_row_that_a_run_lacks_is_filled_in(local):
    client, draw = connect(), random.Random(0)
    run_id = find_run(client, "abc", "train abc")
    kept = [{name: value for name, value in row.items() if name == "step" or draw.random() < 0.5} for row in ROWS]
    log_rows(client, run_id, kept)
    lacking = sum(len(part) < len(row) for part, row in zip(kept, ROWS, strict=True))
    assert fill_in(client, run_id, ROWS) == lacking > 0
    assert_all_there_once(client, run_id, ROWS)


def test_of_a_step_that_was_timed_twice_the_last_value_counts(local):
    client = connect()
    run_id = find_run(client, "abc", "train abc")
    rows = [{"step": step, "images_per_second": value} for step, value in ((2, 1.0), (4, 2.0), (2, 3.0), (4, 4.0))]
    assert fill_in(client, run_id, rows) == 2
    assert history(client, run_id, "train/images_per_second") == [(2, 3.0), (4, 4.0)]


def test_pictures_that_a_run_lacks_or_has_in_part_are_filled_in_once(local, pictures):
    client = connect()
    run_id = find_run(client, "abc", "train abc")
    assert fill_in_pictures(client, run_id, local / "nothing") == 0
    (local / "half").mkdir()
    (local / "half" / pictures[0].name).write_bytes(pictures[0].read_bytes()[:20])
    client.log_artifact(run_id, str(local / "half" / pictures[0].name), "pictures")
    client.log_artifact(run_id, str(pictures[1]), "pictures")
    assert fill_in_pictures(client, run_id, pictures[0].parent) == 2
    assert fill_in_pictures(client, run_id, pictures[0].parent) == 0
    assert_pictures_are_there(client, run_id, pictures)


def test_half_a_last_line_is_dropped_wherever_it_was_cut(tmp_path):
    path = tmp_path / "timings.jsonl"
    assert read_rows(path) == []
    whole = "".join(json.dumps(row) + "\n" for row in ROWS[:3])
    first = len(json.dumps(ROWS[0])) + 1
    for cut in range(first, len(whole) + 1):
        path.write_text(whole[:cut], encoding="utf-8")
        assert read_rows(path) == ROWS[: (whole[:cut] + "\n").replace("\n\n", "\n").count("}\n")]


def test_any_other_damaged_line_is_named(tmp_path):
    path = tmp_path / "timings.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"timings.jsonl is damaged at line 2 .*; remove the line and run again"):
        read_rows(path)


def test_registration_fills_in_everything_and_removes_the_resume_state(local, drawn, pictures):
    (local / "params.yaml").write_text(to_yaml(merge_parameters(ROOT, None, [])), encoding="utf-8")
    (local / "dvc.lock").write_text("stages: {}\n", encoding="utf-8")
    shutil.copytree(drawn, local / "data/coco")
    for folder in ("validate/dataset", "evaluate/plots", "train"):
        (local / "artifacts" / folder).mkdir(parents=True)
    (local / "artifacts/validate/passed.json").write_text('{"data": "0123"}', encoding="utf-8")
    for name in ("validate/report.json", "validate/statistics.json", "evaluate/detections.json"):
        (local / "artifacts" / name).write_text("[]", encoding="utf-8")
    (local / "artifacts/evaluate/per_class.csv").write_text("", encoding="utf-8")
    (local / "artifacts/evaluate/metrics.json").write_text('{"AP": 0.5}', encoding="utf-8")
    torch.manual_seed(0)
    save_model(build_model(TINY_MODEL, 1), [Category(1, "cat")], InputSize(96, 96, 1), "abc", local / "artifacts/train")
    (local / "artifacts/train/history.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8"
    )
    scratch = local / "scratch/abc"
    shutil.copytree(pictures[0].parent, scratch / "pictures")
    timings = [{"step": k, "images_per_second": 10.0 + k, "data_wait": 0.1, "memory_gb": 2.0} for k in (2, 4, 6)]
    lines = [json.dumps(timing) for timing in (timings[0], {"step": 4, "data_wait": 0.9}, *timings[1:], {"step": 8})]
    (scratch / "timings.jsonl").write_text("\n".join(lines)[:-3], encoding="utf-8")
    for name in ("state", "state.previous"):
        (scratch / name).write_bytes(b"weights")
    mirrored(ROWS[:4], pictures[:2]).close(timeout_seconds=120)
    for _ in range(2):
        uri = f"sqlite:///{local}/mlflow.db"
        call(local, "python", "-m", "pipelines.register", MLFLOW_TRACKING_URI=uri, PYTHONPATH=str(ROOT))
    client = connect()
    run_id = find_run(client, "abc", "train abc")
    assert_all_there_once(client, run_id, ROWS)
    assert_all_there_once(client, run_id, timings)
    assert_pictures_are_there(client, run_id, pictures)
    assert {path.name for path in scratch.iterdir()} == {"pictures", "timings.jsonl"}


def test_an_unreachable_server_is_named(monkeypatch):
    with absent_server() as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with pytest.raises(ValueError, match=r"MLflow at http://127.0.0.1:\d+ is unreachable .* start it or unset"):
            connect()


def test_a_process_that_ends_while_the_database_is_made_leaves_none(tmp_path, monkeypatch):
    """MLflow migrates a new file in dozens of steps; half of them would be an error for ever."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    code = "from pipelines.registry.tracking import connect; connect()"
    env = environment(PYTHONPATH=str(ROOT), MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    with subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.DEVNULL) as maker:
        while not list(tmp_path.glob("mlflow.db.*.partial")):
            assert maker.poll() is None
            time.sleep(0.01)
        maker.kill()
    assert not (tmp_path / "mlflow.db").exists()
    client = connect()
    assert client.get_run(find_run(client, "abc", "train abc")).data.tags["fingerprint"] == "abc"
    assert (tmp_path / "mlflow.db").exists()
