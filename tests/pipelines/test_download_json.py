"""A download keeps the bytes of the annotations that it keeps, and refuses what is not JSON or not COCO's."""

import json
import re
import tracemalloc

import pytest

from tests.downloads import fetch


def test_numbers_that_are_not_json_pass_unchanged_for_validate_to_judge(source, tmp_path):
    text = '{"images": [], "annotations": [{"area": NaN, "bbox": [-Infinity,1,Infinity , 2]}], "categories": [], "a": "NaN, Infinity"}'
    (source / "instances_val.json").write_text(text, encoding="utf-8")
    fetch(str(source), tmp_path / "coco")
    assert (tmp_path / "coco" / "instances_val.json").read_text(encoding="utf-8") == text
    with pytest.raises(ValueError, match=r"instances_val.json holds NaN, Infinity or half a .*; mend it, or"):
        fetch(str(source), tmp_path / "coco", max_images=3)


@pytest.mark.parametrize(
    "text",
    [
        " ",
        "{",
        '{"a": [NaN',
        '{"images": [], "annotations": [], "categories": []} x',
        "\ufeff{",
        '{"images": [NaN NaN]}',
        '{"images": [-NaN]}',
        '{"images": [aNaN]}',
        "\0\0",
    ],
)
def test_garbage_is_refused_with_its_place(source, tmp_path, text):
    (source / "instances_val.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{source}/instances_val.json is not valid JSON: "):
        fetch(str(source), tmp_path / "coco")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "Expected `object`, got `array`"),
        ("1", "Expected `object`, got `int`"),
        ('{"images": {}, "annotations": [], "categories": []}', "Expected `array`, got `object` - at `$.images`"),
        ('{"annotations": []}', "Object missing required field `images`"),
    ],
)
@pytest.mark.parametrize("max_images", [0, 3])
def test_json_that_is_not_cocos_is_named(source, tmp_path, text, message, max_images):
    (source / "instances_val.json").write_text(text, encoding="utf-8")
    said = re.escape(f"instances_val.json: {message}; COCO's format has lists images, annotations, categories")
    with pytest.raises(ValueError, match=said):
        fetch(str(source), tmp_path / "coco", max_images=max_images)


def test_the_kept_records_keep_their_bytes(source, tmp_path):
    images = [
        '{"id": "b", "file_name": "é.jpg", "x": 1.50}',
        '{"id":1.0,"file_name":"two.jpg"}',
        '{"id":2,"file_name":"c"}',
    ]
    annotations = ['{"image_id":1, "id": 1e-7}', '{ "image_id": 2 }', '{"image_id": "b","bbox": [0.10, 2]}']
    text = '{"info": {"a" : 1}, "images": [%s], "annotations": [%s], "categories": [ ]}'
    (source / "instances_val.json").write_text(text % (", ".join(images), ", ".join(annotations)), encoding="utf-8")
    for _ in range(2):
        fetch(str(source), tmp_path / "coco", max_images=2)
        kept = '{"info":{"a" : 1},"images":[%s],"annotations":[%s],"categories":[ ]}'
        expected = kept % (",".join(images[:2]), ",".join(annotations[::2]))
        assert (tmp_path / "coco" / "instances_val.json").read_text(encoding="utf-8") == expected


@pytest.mark.parametrize(
    ("images", "annotations", "message"),
    [
        ('[{"id": 1}]', "[]", "an entry is not as COCO's format has it: Object missing required field `file_name`"),
        ("[3]", "[]", "Expected `object`, got `int` - at `$.images[0]`"),
        ("[]", '[{"id": 1}]', "an entry is not as COCO's format has it: Object missing required field `image_id`"),
    ],
)
def test_an_entry_that_cannot_be_chosen_by_is_named(source, tmp_path, images, annotations, message):
    text = f'{{"images": {images}, "annotations": {annotations}, "categories": []}}'
    (source / "instances_val.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"instances_val.json: {re.escape(message)}"):
        fetch(str(source), tmp_path / "coco", max_images=1)


@pytest.mark.parametrize("max_images", [0, 10])
def test_annotations_are_not_made_into_objects(source, tmp_path, max_images):
    """Which would take ten times the size of the file."""
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1.5, 2.5, 3.5, 4.5], "segmentation": [[1.5] * 20]}
    document = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [annotation] * 50_000, "categories": []}
    (source / "instances_train.json").write_text(json.dumps(document), encoding="utf-8")
    tracemalloc.start()
    try:
        fetch(str(source), tmp_path / "coco", max_images=max_images)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (2 if max_images == 0 else 3) * (source / "instances_train.json").stat().st_size
