import io
import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pipelines.data.shapes import CATEGORIES, draw_scene, write_shapes
from tests.projects import SHAPES


def scenes(count, **changes):
    return [draw_scene(replace(SHAPES, **changes), "train", index) for index in range(count)]


def test_a_scene_is_a_function_of_seed_split_and_index():
    assert draw_scene(SHAPES, "train", 5) == draw_scene(SHAPES, "train", 5)
    others = [
        draw_scene(SHAPES, "train", 6),
        draw_scene(SHAPES, "val", 5),
        draw_scene(replace(SHAPES, seed=4), "train", 5),
    ]
    assert all(other[0] != draw_scene(SHAPES, "train", 5)[0] for other in others)


def test_drawing_twice_gives_the_same_bytes(drawn, tmp_path):
    write_shapes(SHAPES, tmp_path)
    for name in ("train.zip", "val.zip", "instances_train.json", "instances_val.json"):
        assert (tmp_path / name).read_bytes() == (drawn / name).read_bytes()


def test_scenes_have_what_makes_coco_hard():
    drawn = scenes(200)
    boxes = [(a["area"], a["category_id"], a["iscrowd"]) for _, _, objects in drawn for a in objects]
    areas = np.array([area for area, _, crowd in boxes if not crowd])
    assert (areas < 32**2).mean() > 0.2
    assert ((areas > 32**2) & (areas < 96**2)).mean() > 0.1
    assert {category for _, category, _ in boxes} == set(CATEGORIES)
    assert sorted(CATEGORIES) != list(range(min(CATEGORIES), min(CATEGORIES) + len(CATEGORIES)))
    assert any(not objects for _, _, objects in drawn)
    assert any(crowd for _, _, crowd in boxes)
    assert len({size for _, size, _ in drawn}) > 1


def test_some_objects_overlap():
    def overlap(a, b):
        width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
        height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
        return width > 0 and height > 0

    pairs = [
        overlap(a["bbox"], b["bbox"])
        for _, _, objects in scenes(60)
        for i, a in enumerate(objects)
        for b in objects[:i]
    ]
    assert sum(pairs) > 5


def test_boxes_lie_in_the_picture_and_the_picture_has_the_annotated_size():
    for jpeg, (height, width), objects in scenes(40):
        assert Image.open(io.BytesIO(jpeg)).size == (width, height)
        for annotation in objects:
            x, y, w, h = annotation["bbox"]
            assert min(x, y) >= 0
            assert min(w, h) > 0
            assert x + w <= width
            assert y + h <= height
            assert 0 < annotation["area"] <= w * h + 1e-6


def test_the_four_files_are_cocos(drawn):
    for split, count in (("train", SHAPES.num_train), ("val", SHAPES.num_val)):
        document = json.loads((drawn / f"instances_{split}.json").read_text(encoding="utf-8"))
        with zipfile.ZipFile(drawn / f"{split}.zip") as archive:
            assert [image["file_name"] for image in document["images"]] == archive.namelist()
            assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        assert len(document["images"]) == count
        assert {"id", "image_id", "category_id", "bbox", "area", "iscrowd"} <= set(document["annotations"][0])
        ids = [annotation["id"] for annotation in document["annotations"]]
        assert len(set(ids)) == len(ids)


def test_sizes_that_cannot_fit_are_refused():
    with pytest.raises(ValueError, match="max_object_size"):
        replace(SHAPES, max_object_size=90)
