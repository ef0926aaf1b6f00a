"""What the register stage words: names of metrics, the time of a training."""

import pytest

from pipelines.register import class_metrics, training_seconds
from pipelines.registry.tracking import connect


def test_names_of_categories_as_metrics(local, tmp_path):
    rows = ["1,a/b,0.1", "2,a?b,0.2", '3,"x, y",0.3', "4,..,0.4", "5,absent,-1.0", "6,stop sign,0.5", "7,ö,0.6"]
    (tmp_path / "t.csv").write_text("\n".join(["category_id,name,AP", *rows, ""]), encoding="utf-8")
    found = class_metrics(tmp_path / "t.csv")
    assert found == {
        "class_AP/a_b_1": 0.1, "class_AP/a_b_2": 0.2, "class_AP/x_ y": 0.3, "class_AP/.._4": 0.4,
        "class_AP/stop sign": 0.5, "class_AP/ö": 0.6,
    }  # fmt: skip
    (tmp_path / "empty.csv").write_text("", encoding="utf-8")
    assert class_metrics(tmp_path / "empty.csv") == {}
    client = connect()
    run_id = client.create_run("0").info.run_id
    for name, value in found.items():
        client.log_metric(run_id, name, value)
    assert client.get_run(run_id).data.metrics == found


def test_the_seconds_of_training():
    history = [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 0.5}]
    timings = [{"step": 10, "images_per_second": 5.0}, {"step": 20, "images_per_second": 10.0}]
    assert training_seconds(history, timings, 2) == pytest.approx(10 * 2 / 5 + 10 * 2 / 10)
    assert training_seconds(history, timings[1:], 2) is None
    assert training_seconds([], timings, 2) is None
