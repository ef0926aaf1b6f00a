"""The data that measurements draw are without a fault, and one measurement, of padding, runs. All: tests/slow."""

import io
import json
import zipfile

from PIL import Image

from benchmarks.synthetic_coco import write_synthetic
from tests.running import ROOT, call


def test_the_drawn_data_has_no_fault(tmp_path):
    counts = {"train": (300, 2000), "val": (90, 200)}
    for name in ("one", "two"):
        write_synthetic(tmp_path / name, 300, 90, 2000, 200, folders=True)
    pictures = set()
    for split, (num_images, num_annotations) in counts.items():
        for name in (f"{split}.zip", f"instances_{split}.json"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        document = json.loads((tmp_path / "one" / f"instances_{split}.json").read_text(encoding="utf-8"))
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


def test_padding_is_measured():
    result = json.loads(call(ROOT, "python", "benchmarks/padding.py", "--quick").splitlines()[-1])
    assert result["benchmark"] == "padding"
    assert len(result["ratios"]["shuffled"]) == 18
    assert all(ratio > 1.2 for ratio in result["ratios"]["shuffled"].values())
