"""Every measurement runs and ends with its line of JSON; padding, and what is drawn: tests/pipelines/test_benchmarks.py."""

import json

import pytest

from benchmarks import authors
from tests.projects import reference
from tests.running import ROOT, call

ROWS = {
    "inference": {"detr-r50", "detr-dc5-r50"},
    "input_pipeline": {
        "with normalisation on the CPU", "with normalisation left to the device",
        "two workers, with normalisation on the CPU", "two workers, normalisation left to the device",
        "reading from memory: single files, archive", "reading from the disk: single files, archive",
    },
    "matching": {"matcher", "matcher and loss, with gradients"},
    "train_step": {
        f"coco-detr-r50: {what}"
        for what in ("step", "peak memory", "forward", "matcher", "loss", "backward", "optimizer")
    },
}  # fmt: skip


def measured(name, folder=ROOT, cold=False, **extra):
    """The result of a smoke run. Memory is that of real interpreters, which alone are found by their environment, too."""
    *_, last = call(folder, "python", f"benchmarks/{name}.py", "--quick", cold=cold, **extra).strip().splitlines()
    result = json.loads(last)
    assert result["benchmark"] == name
    return result


@pytest.mark.skipif(
    not (authors.FOLDER / "models").is_dir(), reason="the authors' code is absent: python benchmarks/authors.py"
)
@pytest.mark.parametrize("name", ROWS)
def test_a_measurement_runs(name):
    result = measured(name, cold=name == "train_step", DETR_AUTHORS=str(authors.FOLDER))
    assert result["ratios"]["authors"].keys() == ROWS[name]
    assert all(ratio > 0 for ratio in result["ratios"]["authors"].values())
    figures = result["figures"]
    assert figures.get("equal matches", True) is True
    assert all(value < 1e-5 for key, value in figures.items() if "difference" in key)
    for side in [*figures.get("coco-detr-r50", {}).values(), *figures.get("demo", {}).values()]:
        assert all(value > 0 for value in side["parts_milliseconds"].values())
        assert 0 < side["utilisation_percent"] < 200  # of a smoke run


def test_the_memory_of_annotations_is_measured():
    result = measured("dataset_memory", cold=True)
    assert result["ratios"]["objects"].keys() == result["figures"].keys()
    assert all(ratio > 0 for ratio in result["ratios"]["objects"].values())
    assert all(result["figures"][f"worker by {method}, MB"][1] < 50 for method in ("fork", "spawn"))


def test_what_prefect_adds_is_measured():
    result = measured("orchestration")
    assert result["ratios"].keys() == {"dvc repro"}
    assert result["figures"].keys() == {"first", "total", "waited"}
    assert all(figure > 0 for figure in (*result["ratios"].values(), *result["figures"].values()))


def test_the_scale_of_the_data_is_measured():
    result = measured("data_scale", cold=True)
    wanted = {"validate_seconds", "validate_peak_mb", "noop_repro_seconds", "noop_status_seconds"}
    assert result["ratios"]["files"].keys() == wanted
    assert result["figures"].keys() == wanted | {f"files_{name}" for name in wanted}
    assert all(value > 0 for value in result["figures"].values())


def test_what_tracking_costs_is_measured():
    result = measured("slow_tracking")
    assert len(result["ratios"]["no tracking"]) == 6
    assert all(ratio > 0 for ratio in result["ratios"]["no tracking"].values())


def test_kills_change_no_bit():
    result = measured("kill_resume", cold=True)
    assert (result["figures"]["kills"], result["figures"]["identical"]) == (2, True)


def test_coco_numbers_are_measured_and_equal():
    result = measured("coco_eval")
    assert result["ratios"]["pycocotools"] > 0
    assert result["figures"]["max_difference"] == 0
    assert result["figures"]["bootstrap_seconds"] > 0


def test_how_often_the_interval_of_ap_is_right_is_measured():
    result = measured("ap_interval")
    assert result["ratios"]["bootstrap"] > 0
    for found in result["figures"].values():
        assert found.keys() == {"bias", "halves", "bootstrap", "shifted to the AP", "shifted by the bias"}
        assert all(0 <= share <= 1 for share in found["halves"].values())


def test_the_demos_benchmark_runs(tmp_path):
    result = measured("demo", reference(tmp_path))
    assert result["ratios"] == {}
    assert set(result["figures"]) == {"lowest_AP", "lowest_AP50", "highest_seconds"}
