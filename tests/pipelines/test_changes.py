"""Differences of small datasets in plain files, against naive loops over their JSON."""

import copy
import hashlib
import json
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.data.changes import find_changes, report
from pipelines.data.layout import FILES
from pipelines.data.versions import DataFile, DataVersion

TORN = {"torn": b""}
CLASSES = {3: "cat", 7: "dog", 90: "bird"}


def image(key, **other):
    return {"id": key, "file_name": f"{key}.jpg", "height": 40, "width": 60} | other


def annotation(key, image_id=1, category_id=3, **other):
    box = [1.5, 2.0, 10.0, 20.0]
    return {"id": key, "image_id": image_id, "category_id": category_id, "bbox": box, "area": 200, "iscrowd": 0} | other


def document(images=(1, 2, 3), annotations=(), classes=CLASSES):
    return {
        "info": {"description": "skipped"},
        "images": [entry if isinstance(entry, dict) else image(entry) for entry in images],
        "annotations": list(annotations),
        "categories": [{"id": key, "name": name, "supercategory": "x"} for key, name in classes.items()],
    }


@pytest.fixture
def between(tmp_path):
    """difference() of two versions with the given training split each: (document, {path in the zip: picture})."""

    def write(name, train, pictures):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for split, held, files in (("train", train, pictures), ("val", document(), {})):
            (folder / f"instances_{split}.json").write_text(json.dumps(held), encoding="utf-8")
            with zipfile.ZipFile(folder / f"{split}.zip", "w") as archive:
                for path, data in files.items():
                    archive.writestr(zipfile.ZipInfo(path), data)
        if pictures == TORN:
            (folder / "train.zip").write_bytes(b"PK")
        data = {file: (folder / file).read_bytes() for file in FILES}
        files = {file: DataFile(hashlib.md5(data[file]).hexdigest(), len(data[file])) for file in FILES}
        return DataVersion(name, "2026-01-01", files, False)

    def opened(version, path):
        return (tmp_path / version.commit / path.rpartition("/")[2]).open("rb")

    def compare(old, new, old_pictures=None, new_pictures=None):
        versions = write("old", old, old_pictures or {}), write("new", new, new_pictures or {})
        return find_changes(*versions, opened)

    return compare


def numbers(kind):
    return [len(kind[name]) for name in ("added", "removed", "altered")]


def test_equal_data_has_no_difference(between):
    held = document(annotations=[annotation(1), annotation(2, category_id=90)])
    split = between(held, copy.deepcopy(held))["train"]
    assert [numbers(split[kind]) for kind in ("images", "annotations", "categories")] == [[0, 0, 0]] * 3
    assert [(c["before"], c["after"], c["altered"]) for c in split["classes"]] == [(1, 1, 0), (0, 0, 0), (1, 1, 0)]


def test_empty_data_has_no_difference(between):
    empty = {"images": [], "annotations": [], "categories": []}
    assert between(empty, empty, {}, {"a.jpg": b"a"})["train"]["classes"] == []


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"bbox": [1.5, 2.0, 10.0, 20.25]}, "bbox"),
        ({"category_id": 7}, "category_id"),
        ({"image_id": 2}, "image_id"),
        ({"iscrowd": 1}, "iscrowd"),
        ({"area": 200.5}, "area"),
    ],
)
def test_an_annotation_is_altered_by_each_of_its_fields(between, change, field):
    old = document(annotations=[annotation(8), annotation(9)])
    new = document(annotations=[annotation(8) | change, annotation(9)])
    found = between(old, new)["train"]["annotations"]
    assert (numbers(found), found["altered"]) == ([0, 0, 1], [8])
    assert {name for name, count in found["fields"].items() if count} == {field}


@pytest.mark.parametrize(("change", "field"), [({"file_name": "b.jpg"}, "file_name"), ({"width": 61}, "size")])
def test_an_image_is_altered_by_its_name_and_its_size(between, change, field):
    found = between(document(), document(images=[1, image(2, **change), 3]))["train"]["images"]
    assert (found["altered"], found["fields"][field]) == ([2], 1)


def test_an_image_is_altered_by_its_picture_wherever_it_lies_in_the_zip(between):
    old = {"train2017/1.jpg": b"one", "train2017/2.jpg": b"two", "train2017/3.jpg": b"three"}
    new = {"3.jpg": b"three", "1.jpg": b"one", "2.jpg": b"owt"}
    found = between(document(), document(), old, new)["train"]["images"]
    assert (found["altered"], found["fields"]["picture"]) == ([2], 1)


def test_an_image_whose_picture_came_or_went_is_altered(between):
    found = between(document(), document(), {"1.jpg": b"one"}, {"2.jpg": b"two"})["train"]["images"]
    assert found["altered"] == [1, 2]


def test_what_is_not_compared_alters_nothing(between):
    old = document(annotations=[annotation(1, segmentation=[[1, 2, 3]])])
    new = document(annotations=[annotation(1, segmentation=[])], images=[3, image(1, license=4), 2])
    split = between(old, new)["train"]
    assert numbers(split["images"]) == numbers(split["annotations"]) == [0, 0, 0]


def test_categories_come_go_and_are_renamed(between):
    split = between(document(), document(classes={3: "tiger", 90: "bird", 91: "fish"}))["train"]
    assert numbers(split["categories"]) == [1, 1, 1]
    assert split["categories"]["names"] == [
        {"id": 3, "before": "cat", "after": "tiger"},
        {"id": 7, "before": "dog", "after": None},
        {"id": 91, "before": None, "after": "fish"},
    ]


def test_a_changed_category_is_an_alteration_of_both_classes(between):
    old = document(annotations=[annotation(1), annotation(2)])
    split = between(old, document(annotations=[annotation(1), annotation(2, category_id=7)]))["train"]
    cat, dog, bird = split["classes"]
    assert cat == {"id": 3, "name": "cat", "before": 2, "after": 1, "added": 0, "removed": 0, "altered": 1}
    assert dog == {"id": 7, "name": "dog", "before": 0, "after": 1, "added": 0, "removed": 0, "altered": 1}
    assert bird["altered"] == 0


def test_a_category_that_none_lists_is_counted(between):
    (*_, stray) = between(document(), document(annotations=[annotation(1, category_id=99)]))["train"]["classes"]
    assert (stray["id"], stray["name"], stray["added"]) == (99, None, 1)


entries = st.dictionaries(
    st.integers(1, 12), st.tuples(st.integers(1, 3), st.sampled_from([*CLASSES]), st.integers(0, 2))
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries, entries)
def test_it_is_what_a_loop_over_the_annotations_finds(between, old, new):
    def held(drawn):
        return document(annotations=[annotation(k, i, c, bbox=[x, 0, 1, 1]) for k, (i, c, x) in drawn.items()])

    split = between(held(old), held(new))["train"]
    found = split["annotations"]
    assert found["added"] == sorted(new.keys() - old.keys())
    assert found["removed"] == sorted(old.keys() - new.keys())
    altered = [key for key in sorted(old.keys() & new.keys()) if old[key] != new[key]]
    assert found["altered"] == altered
    for row in split["classes"]:
        of_class = [{key for key, value in drawn.items() if value[1] == row["id"]} for drawn in (old, new)]
        assert (row["before"], row["after"]) == tuple(map(len, of_class))
        assert row["added"] == len(of_class[1] - old.keys())
        assert row["removed"] == len(of_class[0] - new.keys())
        assert row["altered"] == len((of_class[0] | of_class[1]) & set(altered))
    back = between(held(new), held(old))["train"]["annotations"]
    assert (back["added"], back["removed"], back["altered"]) == (found["removed"], found["added"], altered)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            document(annotations=[annotation(1, bbox=[1, 2, 3])]),
            "annotations[0].bbox is [1, 2, 3], expected four finite numbers below 2^53",
        ),
        (
            document(images=[{"id": "1"}]),
            'images[0].id is "1", expected a whole number, 0 or more and below 2^53, without quotes',
        ),
        ([], "Expected `object`, got `array`"),
    ],
)
def test_what_is_not_in_cocos_format_is_named(between, broken, message):
    with pytest.raises(ValueError, match="data/coco/instances_train.json of new .*: ") as error:
        between(document(), broken)
    assert message in str(error.value)


def test_a_torn_archive_is_named(between):
    with pytest.raises(ValueError, match="data/coco/train.zip of new .* is not a whole zip file"):
        between(document(), document(), {}, TORN)


def test_the_report_shows_every_kind_of_change(between):
    old = document(annotations=[annotation(k) for k in range(1, 20)])
    new = document((1, 2, 4), [annotation(1, area=5)], {3: "tiger", 7: "dog", 91: "fish"})
    text = report(between(old, new)).splitlines()
    assert text[0] == "from old (2026-01-01) to new (2026-01-01)"
    assert text[2:14] == [
        "train        before  after  added  removed  altered",
        "images            3      3      1        1        0",
        "annotations      19      1      0       18        1",
        "categories        3      3      1        1        1",
        "  3 tiger        19      1      0       18        1",
        "  7 dog           0      0      0        0        0",
        "  90 bird         0      0      0        0        0",
        "  91 fish         0      0      0        0        0",
        "images added: 4",
        "images removed: 3",
        "annotations removed: 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ...",
        "annotations altered (area 1): 1",
    ]
    assert text[14:17] == ["category 3 cat is now tiger", "category 90 bird is gone", "category 91 fish is new"]
