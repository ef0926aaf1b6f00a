"""Every measurement runs and ends with its line of JSON; what is drawn for them is without a fault."""

import io
import json
import sys
import zipfile

import pytest
from PIL import Image

from benchmarks import authors
from benchmarks.synthetic_coco import write_synthetic
from tests.conftest import ROOT, call

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


@pytest.mark.skipif(
    not (authors.FOLDER / "models").is_dir(), reason="the authors' code is absent: python benchmarks/authors.py"
)
@pytest.mark.parametrize("name", ROWS)
def test_a_measurement_runs(name):
    output = call(ROOT, sys.executable, f"benchmarks/{name}.py", "--quick", DETR_AUTHORS=str(authors.FOLDER))
    result = json.loads(output.splitlines()[-1])
    assert result["benchmark"] == name
    assert result["ratios"]["authors"].keys() == ROWS[name]
    assert all(ratio > 0 for ratio in result["ratios"]["authors"].values())
    figures = result["figures"]
    assert figures.get("equal matches", True) is True
    assert all(value < 1e-5 for key, value in figures.items() if "difference" in key)
    for side in [*figures.get("coco-detr-r50", {}).values(), *figures.get("demo", {}).values()]:
        assert all(value > 0 for value in side["parts_milliseconds"].values())
        assert 0 < side["utilisation_percent"] < 200  # of a smoke run


def test_the_memory_of_annotations_is_measured():
    result = json.loads(call(ROOT, sys.executable, "benchmarks/dataset_memory.py", "--quick").splitlines()[-1])
    assert result["benchmark"] == "dataset_memory"
    assert result["ratios"]["objects"].keys() == result["figures"].keys()
    assert all(ratio > 0 for ratio in result["ratios"]["objects"].values())
    assert all(result["figures"][f"worker by {method}, MB"][1] < 50 for method in ("fork", "spawn"))


def test_what_prefect_adds_is_measured():
    result = json.loads(call(ROOT, sys.executable, "benchmarks/orchestration.py", "--quick").splitlines()[-1])
    assert result["benchmark"] == "orchestration"
    assert result["ratios"].keys() == {"dvc repro"}
    assert result["figures"].keys() == {"first", "total", "waited"}
    assert all(figure > 0 for figure in (*result["ratios"].values(), *result["figures"].values()))


def test_the_drawn_data_has_no_fault(tmp_path):
    counts = {"train": (300, 2000), "val": (90, 200)}
    for name in ("one", "two"):
        write_synthetic(tmp_path / name, 300, 90, 2000, 200, folders=True)
    pictures = set()
    for split, (num_images, num_annotations) in counts.items():
        for name in (f"{split}.zip", f"instances_{split}.json"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        document = json.loads((tmp_path / "one" / f"instances_{split}.json").read_text())
        images = {image["id"]: image for image in document["images"]}
        annotations = document["annotations"]
        assert (len(images), len(annotations)) == (num_images, num_annotations)
        with zipfile.ZipFile(tmp_path / "one" / f"{split}.zip") as archive:
            for image in images.values():
                data = archive.read(f"{split}2017/{image['file_name']}")
                assert data == (tmp_path / "one" / split / image["file_name"]).read_bytes()
                picture = Image.open(io.BytesIO(data))
                assert picture.size == (image["width"], image["height"])
                pictures.add(picture.tobytes())
        for a in annotations:
            x, y, width, height = a["bbox"]
            image = images[a["image_id"]]
            assert 0 <= x < x + width <= image["width"] + 1e-9
            assert 0 <= y < y + height <= image["height"] + 1e-9
            assert 0 < a["area"] <= width * height
        assert {a["category_id"] for a in annotations} == {category["id"] for category in document["categories"]}
        assert len({a["id"] for a in annotations}) == num_annotations
        assert len({(a["image_id"], a["category_id"]) for a in annotations}) == num_annotations
    assert len(pictures) == sum(num_images for num_images, _ in counts.values())


def test_the_scale_of_the_data_is_measured():
    result = json.loads(call(ROOT, sys.executable, "benchmarks/data_scale.py", "--quick").splitlines()[-1])
    assert result["benchmark"] == "data_scale"
    wanted = {"validate_seconds", "validate_peak_mb", "noop_repro_seconds", "noop_status_seconds"}
    assert result["ratios"]["files"].keys() == wanted
    assert result["figures"].keys() == wanted | {f"files_{name}" for name in wanted}
    assert all(value > 0 for value in result["figures"].values())


def test_padding_is_measured():
    result = json.loads(call(ROOT, sys.executable, "benchmarks/padding.py", "--quick").splitlines()[-1])
    assert result["benchmark"] == "padding"
    assert len(result["ratios"]["shuffled"]) == 18
    assert all(ratio > 1.2 for ratio in result["ratios"]["shuffled"].values())


def test_what_tracking_costs_is_measured():
    result = json.loads(call(ROOT, sys.executable, "benchmarks/slow_tracking.py", "--quick").splitlines()[-1])
    assert result["benchmark"] == "slow_tracking"
    assert len(result["ratios"]["no tracking"]) == 6
    assert all(ratio > 0 for ratio in result["ratios"]["no tracking"].values())


def test_kills_change_no_bit():
    result = json.loads(call(ROOT, sys.executable, "benchmarks/kill_resume.py", "--quick").splitlines()[-1])
    assert result["benchmark"] == "kill_resume"
    assert (result["figures"]["kills"], result["figures"]["identical"]) == (2, True)


def test_coco_numbers_are_measured_and_equal():
    result = json.loads(call(ROOT, sys.executable, "benchmarks/coco_eval.py", "--quick").splitlines()[-1])
    assert result["benchmark"] == "coco_eval"
    assert result["ratios"]["pycocotools"] > 0
    assert result["figures"]["max_difference"] == 0
    assert result["figures"]["bootstrap_seconds"] > 0
