"""What labelling tools write is read, or refused with key and value, alike by the gate, training, judge and registration."""

import json
import math
import re

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr.annotation_file import complain, read_truth
from detr.bootstrap import bootstrap_ap, match_detections
from detr.coco import load_annotations
from detr.metrics import compute_coco_metrics, from_results, to_results
from pipelines.data.tables import tabulate
from pipelines.registry.gate import RegisterParams, check_protected, read_names
from tests.downloads import fetch
from tests.projects import detections_like

DEEP: list = []
for _ in range(300):
    DEEP = [DEEP]
ODD = [
    *(None, True, False, 0, -1, 1.5, -0.0, 10**18, -(2**63), 2**64, 10**30, 10**400, 1e308, float("nan"), float("inf")),
    *("", " ", "0", "2024", "é", "日本", "\ud83d", "\0", "a\nb", "<b>", "NaN", "x" * 10_000),
    *([], [[]], [None], [[1, 2], "3"], [10**30], {}, {"": {}}, {"counts": "abc", "size": [1, 2]}, {"id": None}, DEEP),
]
USED = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd"),
    "categories": ("id", "name"),
}
UNUSED = {
    "images": ("license", "coco_url", "flickr_url", "date_captured", "extra", "tags", "Id", "héight"),
    "annotations": ("segmentation", "attributes", "score", "ignore", "keypoints", "num_keypoints", "caption", "extra"),
    "categories": ("supercategory", "keypoints", "skeleton", "color", "isthing", "extra"),
}
CVAT = dict.fromkeys(("contributor", "date_created", "description", "url", "version", "year"), "")


def written(folder, change, split="val"):
    path = folder / f"instances_{split}.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def seen_by_all(folder):
    """What the gate, training, the judge and the registration make of the validation data in a folder."""
    path = folder / "instances_val.json"
    found = detections_like(path, 3.0)
    tables = {name: table for name, table in tabulate(folder, 1.0, 0.0).items() if name.startswith("val")}
    config = RegisterParams(0.0, 0.9, 10, 0, {read_names(path)[0]: 0.0}, True)
    check_protected(config, path)
    return {
        "gate": {name: table.drop(columns="digest", errors="ignore").to_json() for name, table in tables.items()},
        "training": {name: str(value) for name, value in vars(load_annotations(path)).items()},
        "judge": compute_coco_metrics(path, from_results(found)),
        "registration": (read_names(path), bootstrap_ap([match_detections(path, found)], 10, 0).tolist()),
    }


def spread(entries, keys, number):
    """Odd values under the keys of entries: another one of each key and entry."""
    for row, entry in enumerate(entries):
        for column, key in enumerate(keys):
            entry[key] = ODD[(number + 7 * row + column) % len(ODD)]


@pytest.mark.parametrize("number", range(0, len(ODD), 6))
def test_what_detection_does_not_use_can_hold_anything(source, tmp_path, number):
    expected = seen_by_all(source)

    def change(document):
        for kind, keys in UNUSED.items():
            spread(document[kind], keys, number)
        spread([document], ("info", "licenses", "type", "videos", "extra"), number)

    written(source, change)
    assert seen_by_all(source) == expected
    fetch(str(source), tmp_path / "coco")
    assert (tmp_path / "coco/instances_val.json").read_bytes() == (source / "instances_val.json").read_bytes()


def test_the_heads_of_known_tools_change_nothing(source):
    expected = seen_by_all(source)
    for info in (CVAT, {"year": "2024"}, {"year": None}, {"year": 2024.5}, [], "x", None):
        written(
            source,
            lambda d, info=info: [d.update(info=info), *(i.update(date_captured=0, license="") for i in d["images"])],
        )
        assert seen_by_all(source) == expected


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_every_unicode_is_read(source, tmp_path, encoding):
    written(source, lambda d: d["images"][0].update(note="é 日本"))
    expected, path = seen_by_all(source), source / "instances_val.json"
    path.write_bytes(json.dumps(json.loads(path.read_bytes()), ensure_ascii=False).encode(encoding))
    assert read_truth(path).file_names
    found = detections_like_in(path)
    assert compute_coco_metrics(path, found) == expected["judge"]
    fetch(str(source), tmp_path / "coco", max_images=3)
    assert len(read_truth(tmp_path / "coco/instances_val.json").image_ids) == 3


def detections_like_in(path):
    plain = path.with_name("plain.json")
    plain.write_text(json.dumps(json.loads(path.read_bytes())), encoding="utf-8")
    return from_results(detections_like(plain, 3.0))


def test_what_is_no_unicode_is_named_with_its_place(source, tmp_path):
    path = written(source, lambda d: d["categories"][0].update(name="caf?"))
    text = path.read_bytes().replace(b"caf?", b"caf\xe9")
    path.write_bytes(text)
    place = rf"instances_val.json is not valid JSON: byte {text.index(0xE9)} is 0xe9 \(near '.*café.*'\), which is not UTF-8"
    for read in (read_truth, load_annotations, read_names, lambda path: tabulate(path.parent, 1.0, 0.0)):
        with pytest.raises(ValueError, match=place):
            read(path)
    path.write_bytes(b"\xff\xfe" + text)
    with pytest.raises(ValueError, match="instances_val.json is not valid JSON"):
        fetch(str(source), tmp_path / "coco")


REFUSED = {
    ("images", "id"): (None, "7", 1.5, -7, True, [], 2**60, float("nan")),
    ("images", "file_name"): (None, "", 7, ["a.png"], "\ud83d.png", "a\0.png"),
    ("images", "height"): (None, "72", 0, -72, 1.5, float("inf")),
    ("annotations", "image_id"): (None, "7", 1.5, -1, {}),
    ("annotations", "category_id"): (None, "7", -1, False),
    ("annotations", "bbox"): (
        *(None, [], [1, 2, 3], [1, 2, 3, 4, 5], "1,2,3,4", ["1", "2", "3", "4"], [1, 2, None, 4], [1, 2, True, 4]),
        *({"x": 1}, [1, 2, float("nan"), 4], [1, 2, float("inf"), 4], [[1, 2, 3, 4]], [1, 2, 2**60, 4]),
    ),
    ("annotations", "area"): (None, "9", float("nan"), [9], True),
    ("annotations", "iscrowd"): (None, "0", 2, -1, 0.5, []),
    ("categories", "id"): (None, "1", 1.5, -1),
    ("categories", "name"): (None, "", 5, ["cat"], "\udfff"),
}


@pytest.mark.parametrize(("kind", "key"), REFUSED)
def test_what_detection_uses_is_refused_with_key_and_value_by_all_alike(source, kind, key):
    path = source / "instances_val.json"
    original = path.read_bytes()
    for value in REFUSED[kind, key]:
        path.write_bytes(original)
        written(source, lambda d, value=value: d[kind][1].update({key: value}))
        expected = complain(kind, 1, key, value)
        for read in (load_annotations, read_names, lambda path: compute_coco_metrics(path, np.zeros((0, 7)))):
            with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {expected}')}$"):
                read(path)
        table = tabulate(source, 1.0, 0.0)[f"val_{kind}"]
        column = {"bbox": "box_problem", "iscrowd": "crowd_problem"}.get(key, "problem")
        assert table[column].dropna().to_dict() == {1: expected}


def test_numbers_are_taken_as_pycocotools_and_the_authors_take_them(source):
    expected = seen_by_all(source)

    def loosely(document):
        for image in document["images"]:
            image.update(id=float(image["id"]), width=float(image["width"]))
        for a in document["annotations"]:
            a.update(image_id=float(a["image_id"]), category_id=float(a["category_id"]))
            if not a["iscrowd"]:
                del a["iscrowd"]
            if a["area"] == math.prod(a["bbox"][2:]):
                del a["area"]
            a["iscrowd"] = bool(a["iscrowd"]) if "iscrowd" in a else 0

    found = from_results(detections_like(source / "instances_val.json", 3.0))
    path = written(source, loosely)
    written(source, lambda d: [a.pop("iscrowd") for a in d["annotations"] if not a["iscrowd"]])
    assert compute_coco_metrics(path, found) == expected["judge"]
    assert {name: str(value) for name, value in vars(load_annotations(path)).items()} == expected["training"]
    assert (
        match_detections(path, found).objects.sum()
        == len(json.loads(path.read_bytes())["annotations"]) - read_truth(path).crowd.sum()
    )


def test_ids_of_annotations_change_no_number(source):
    """pycocotools takes an object of id 0 for none, which costs a hit."""
    path = source / "instances_val.json"
    found = from_results(detections_like(path, 3.0))
    expected = compute_coco_metrics(path, found)
    assert expected == dict(zip(expected, by_pycocotools(path, found), strict=True))
    for change in (lambda k: k, lambda k: -k - 1, lambda k: 0, lambda k: 10**15 - k):
        written(source, lambda d, change=change: [a.update(id=change(k)) for k, a in enumerate(d["annotations"])])
        assert compute_coco_metrics(path, found) == expected


def by_pycocotools(path, found):
    truth = COCO(str(path))
    judge = COCOeval(truth, truth.loadRes(to_results(found)), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return judge.stats.tolist()


def test_ids_of_images_and_categories_start_where_a_tool_starts_them(source):
    path = source / "instances_val.json"
    expected = compute_coco_metrics(path, from_results(detections_like(path, 3.0)))

    def from_zero(document):
        for kind, key in (("images", "image_id"), ("categories", "category_id")):
            places = {entry["id"]: place for place, entry in enumerate(document[kind])}
            for entry in document[kind]:
                entry["id"] = places[entry["id"]]
            for a in document["annotations"]:
                a[key] = places[a[key]]

    written(source, from_zero)
    assert compute_coco_metrics(path, from_results(detections_like(path, 3.0)))["AP"] == pytest.approx(
        expected["AP"], abs=0.05
    )
    assert load_annotations(path).category_ids[0] == load_annotations(path).image_ids[0] == 0
