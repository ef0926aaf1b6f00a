"""COCO's numbers as people read them: -1, which is that there are no such objects, and the end of an interval of 0."""

import csv
import json

import pytest

from detr.coco import load_annotations
from detr.metrics import METRICS, count_confusions, evaluate_detections, from_results, measure_errors
from pipelines.__main__ import summarize
from pipelines.evaluate import write_tables
from pipelines.labels import say_metric
from pipelines.register import class_metrics
from pipelines.registry.compare import report
from pipelines.registry.tracking import connect, fill_in, find_run
from pipelines.registry.version import read_per_class
from tests.projects import detections_like


def test_no_such_objects_is_said_and_any_other_number_shown():
    assert [say_metric(value) for value in (-1.0, 0.0, 0.12345)] == ["no such objects", "0.000", "0.123"]
    assert say_metric(0.12345, digits=4) == "0.1235"


@pytest.mark.parametrize(
    ("ap", "low", "high", "said"),
    [
        (0.0, 0.0, 0.0725, "0.072  (so few images cannot rule it out)"),
        (0.0, 0.0, 0.0, "0.000"),
        (0.25, 0.2, 0.3, "0.300"),
        (-1.0, -1.0, -1.0, "no such objects"),
    ],
)
def test_the_final_table_explains_what_seems_impossible(tmp_path, capsys, ap, low, high, said):
    metrics = {"AP": ap, "AP_large": -1.0, "AP_low": low, "AP_high": high, "gflops": 0.5}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    (tmp_path / "version.json").write_text('{"name": "detr", "version": 1}', encoding="utf-8")
    summarize(tmp_path, tmp_path / "version.json")
    lines = capsys.readouterr().out.splitlines()
    assert f"{'AP_large':<20}no such objects" in lines
    assert f"{'AP_high':<20}{said}" in lines
    assert f"{'gflops':<20}0.500" in lines


def test_a_category_without_objects_has_no_bar_and_no_metric(source, tmp_path):
    truth = source / "instances_val.json"
    document = json.loads(truth.read_text(encoding="utf-8"))
    document["annotations"] = [a for a in document["annotations"] if a["category_id"] != 58]
    truth.write_text(json.dumps(document), encoding="utf-8")
    judge = evaluate_detections(truth, from_results(detections_like(truth, 1.0)))
    (tmp_path / "out").mkdir()
    write_tables([judge], load_annotations(truth), measure_errors(judge), count_confusions(judge), tmp_path / "out")
    table = tmp_path / "out/per_class.csv"
    with table.open(newline="", encoding="utf-8") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert list(rows["cross"].values()) == ["58", "cross", "0", "", "", "", "", ""]
    assert all(float(row["AP"]) >= 0 for name, row in rows.items() if name != "cross")
    assert set(read_per_class(table)) == {name for name in rows if name != "cross"}
    assert set(class_metrics(table)) == {f"class_AP/{name}" for name in rows if name != "cross"}


def test_no_chart_of_mlflow_shows_a_number_that_there_is_not(local):
    client = connect()
    run_id = find_run(client, "abc", "train abc")
    row = {"step": 2, "loss": 1.0, "AP": 0.5, "AP_large": -1.0}
    assert fill_in(client, run_id, [row]) == 1
    assert client.get_run(run_id).data.metrics == {"train/loss": 1.0, "val/AP": 0.5}
    assert fill_in(client, run_id, [row]) == 0


def test_a_comparison_tells_no_objects_from_nothing_known():
    document = {
        "versions": [1, 2], "titles": ["1", "2"], "AP": [0.5, None], "confidence": 0.95, "interval": [None, None],
        "difference": [None, None], "metrics": {name: [None, None] for name in METRICS}, "classes": [], "params": {},
        "data": {}, "environment": {}, "cost": {}, "notes": [],
    }  # fmt: skip
    (line,) = (line for line in report(document, 5).splitlines() if line.startswith("| AP_large"))
    assert [cell.strip() for cell in line.strip("|").split("|")] == ["AP_large", "no such objects", "-"]
