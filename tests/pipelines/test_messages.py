"""What the gate says of what is wrong: the rule's key, the file, the value, what was expected, what is near."""

import html
import json
import zipfile

import pandas as pd
import pytest

from pipelines.data.pictures import find_nearest as nearest_of
from pipelines.data.rules import describe
from pipelines.data.tables import _look_at_pictures
from tests.pipelines.test_validate import edit, gate, outside, report_of, set_in


def test_the_message_names_key_ids_file_and_value(source):
    edit(source, outside)
    edit(source, set_in("annotations", 1, bbox=[5, 5, 0, 9.5]))
    edit(source, set_in("annotations", 3, category_id=99))
    edit(source, set_in("annotations", 4, iscrowd=None))
    edit(source, lambda d: d["annotations"][5].pop("iscrowd"))
    edit(source, set_in("annotations", 6, area="12"))
    edit(source, lambda d: d["images"][3].pop("height"))
    document = json.loads((source / "instances_train.json").read_text(encoding="utf-8"))
    a, names = document["annotations"], {image["id"]: image["file_name"] for image in document["images"]}
    x, y, width, height = a[2]["bbox"]
    file = [repr(names[one["image_id"]]) for one in a]
    rows = f"of {len(a)} break it"
    said = [describe(row) for row in report_of(source, split="train") if row["outcome"] != "holds"]
    for expected in (
        f"[box_inside] train_annotations: boxes are inside the image by 1 pixels: 1 {rows} (ids {a[2]['id']}): "
        f"annotations[2].bbox of {file[2]} is [{x:g}, {y:g}, {width:g}, {height:g}], the image 96 x 96",
        f"[box_has_size] train_annotations: boxes have a positive size: 1 {rows} (ids {a[1]['id']}): "
        f"annotations[1].bbox of {file[1]} is [5, 5, 0, 9.5]",
        f"[category_known] train_annotations: annotations have a known category: 1 {rows} (ids {a[3]['id']}): "
        f"annotations[3].category_id of {file[3]} is 99, which no category has",
        f"[crowd_flag] train_annotations: crowd flags are 0 or 1: 1 {rows} (ids {a[4]['id']}): "
        "annotations[4].iscrowd is null, expected 0 or 1",
        f"[crowd_given] train_annotations: annotations have a crowd flag: 1 {rows} (ids {a[5]['id']}): "
        f"annotations[5].iscrowd of {file[5]} is missing: taken as 0",
        f"[annotation_valid] train_annotations: entries have ids and area of their types: 1 {rows} (ids {a[6]['id']}): "
        'annotations[6].area is "12", expected a number, without quotes',
        "[image_valid] train_images: entries have id, file_name, height and width of their types: 1 of "
        f"{len(names)} break it (ids {document['images'][3]['id']}): "
        "images[3].height is missing, expected a whole number of pixels, 1 or more and below 2^53",
    ):
        assert expected in said
    edit(source, lambda d: d["annotations"].clear())
    said = [describe(row) for row in report_of(source, split="train")]
    assert "[annotations_exist] train_annotations: there are none" in said


@pytest.mark.parametrize(
    ("member", "name", "nearest"),
    [
        ("train/a b.png", "a%20b.png", "train/a b.png"),
        ("a.png", "images/a.png", "a.png"),
        ("train/a.png", "train\\a.png", "train/a.png"),
        ("e\u0301.png", "\u00e9.png", "e\u0301.png"),
        ("IMG_1.JPG", "img_1.jpg", "IMG_1.JPG"),
        ("picture.png", "picture.jpg", "picture.png"),
        ("picture_001.png", "picture_0001.png", "picture_001.png"),
        ("another.png", "12.png", ""),
    ],
)
def test_the_nearest_member_is_named(member, name, nearest):
    others = [f"unlike{number}.txt" for number in range(9)]
    assert nearest_of([name], [*others, member]) == [nearest]


def test_a_picture_that_is_not_found_is_named_with_the_nearest_member_on_every_page(source, tmp_path, capsys):
    names = [image["file_name"] for image in json.loads((source / "instances_val.json").read_bytes())["images"]]
    edit(source, set_in("images", 0, file_name=f"images/{names[0]}"), "val")
    with pytest.raises(ValueError, match=r"\[picture_found\] val_images: images are in the archive once"):
        gate(source, tmp_path / "out")
    said = f"'images/{names[0]}' is not in val.zip; nearest member: '{names[0]}'"
    (page,) = (tmp_path / "docs" / "validations" / "val_images").rglob("*.html")
    (row,) = (r for r in json.loads((tmp_path / "out/report.json").read_bytes()) if r["outcome"] == "error")
    for text in (capsys.readouterr().out, html.unescape(page.read_text(encoding="utf-8")), describe(row)):
        assert said in text


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("train/\u00e9.png", "nearest member: 'e\u0301.png'"),
        ("\u00e9.png", "nearest member: 'e\u0301.png', of other letters that look alike, 'e\\u0301.png'"),
        ("12.webp", "only .jpg, .jpeg and .png files are taken: convert it"),
        ("12.png", "none of its 2 files is like it"),
        ("twice.png", "is 2 times in train.zip: 'a/twice.png', 'b/twice.png'"),
    ],
)
def test_where_a_picture_is_instead_is_said(tmp_path, name, advice):
    path = tmp_path / "train.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for member in ("a/twice.png", "b/twice.png") if name == "twice.png" else ("e\u0301.png", "other"):
            archive.writestr(member, b"")
    images = pd.DataFrame({"file_name": [name], "height": [1], "width": [1]})
    _look_at_pictures(path, images, 1.0)
    assert images["whereabouts"][0].endswith(advice)
