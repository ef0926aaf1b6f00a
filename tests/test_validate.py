import json
import zipfile
from dataclasses import replace

import pytest

from pipelines.validate import ValidateParams, describe, judge, tabulate, validate

CONFIG = ValidateParams(box_tolerance_pixels=1.0, max_zero_size_boxes=0, num_decoded=1000, num_reported=3)


def edit(folder, change, split="train"):
    path = folder / f"instances_{split}.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def repack(folder, change, split="train"):
    with zipfile.ZipFile(folder / f"{split}.zip") as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(folder / f"{split}.zip", "w") as archive:
        for name, data in change(members):
            archive.writestr(name, data)


def test_clean_data_passes_twice_to_the_same_bytes(drawn, tmp_path):
    for run in ("one", "two"):
        validate(CONFIG, drawn, tmp_path / run, tmp_path / "docs")
    for name in ("passed.json", "report.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert set(json.loads((tmp_path / "one" / "passed.json").read_text())) == {"data"}
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert all(row["success"] for row in report if row["level"] == "error")
    pages = list((tmp_path / "docs").rglob("*.html"))
    assert (tmp_path / "docs" / "index.html") in pages
    assert len([page for page in pages if "validations" in page.parts]) == 6


def test_the_digest_follows_the_data(drawn, source, tmp_path):
    edit(source, lambda d: d["info"].update(description="other"))
    for run, folder in (("one", drawn), ("two", source)):
        validate(CONFIG, folder, tmp_path / run, tmp_path / "docs")
    assert (tmp_path / "one" / "passed.json").read_text() != (tmp_path / "two" / "passed.json").read_text()


def set_in(kind, index, **values):
    return lambda document: document[kind][index].update(values)


def outside(document):
    document["annotations"][2]["bbox"][0] += 500


JSON_DEFECTS = {
    "box outside": (outside, "train_annotations: boxes are inside the image by 1 pixels: 1 break it (ids {a2})"),
    "zero size": (set_in("annotations", 1, bbox=[5, 5, 0, 9]), "boxes have a positive size: 1 break it (ids {a1})"),
    "not a number": (
        set_in("annotations", 0, bbox=[5, 5, "x", 9]),
        "boxes are four finite numbers: 1 break it (ids {a0})",
    ),
    "unknown category": (
        set_in("annotations", 3, category_id=99),
        "annotations have a known category: 1 break it (ids {a3})",
    ),
    "unknown image": (
        set_in("annotations", 4, image_id=123456),
        "annotations have a known image: 1 break it (ids {a4})",
    ),
    "double annotation id": (
        lambda d: d["annotations"][1].update(id=d["annotations"][0]["id"]),
        "annotation ids are unique: 2 break it",
    ),
    "crowd flag": (set_in("annotations", 0, iscrowd=2), "crowd flags are 0 or 1: 1 break it (ids {a0})"),
    "image size": (set_in("images", 0, height=500), "pictures have the annotated size: 1 break it (ids {i0})"),
    "missing picture": (
        set_in("images", 1, file_name="gone.jpg"),
        "images are in the archive once: 1 break it (ids {i1})",
    ),
    "double image id": (lambda d: d["images"].append(dict(d["images"][0])), "image ids are unique: 2 break it"),
    "double category": (
        lambda d: d["categories"].append(dict(d["categories"][0])),
        "category ids are unique: 2 break it",
    ),
    "no annotations": (lambda d: d["annotations"].clear(), "there are annotations: 1 break it"),
}


@pytest.mark.parametrize("defect", JSON_DEFECTS)
def test_a_defect_in_the_annotations_is_named_with_its_ids(source, tmp_path, defect):
    change, message = JSON_DEFECTS[defect]
    document = json.loads((source / "instances_train.json").read_text())
    ids = {f"a{k}": document["annotations"][k]["id"] for k in range(5)}
    ids |= {f"i{k}": document["images"][k]["id"] for k in range(2)}
    edit(source, change)
    report = judge(CONFIG, tabulate(CONFIG, source, "train"), tmp_path / "docs")
    broken = [describe(row) for row in report if row["level"] == "error" and not row["success"]]
    assert any(message.format(**ids) in line for line in broken), broken


def test_the_gate_closes_and_leaves_no_pass_of_before(source, tmp_path):
    validate(CONFIG, source, tmp_path / "out", tmp_path / "docs")
    edit(source, outside)
    with pytest.raises(
        ValueError, match=r"1 of 36 expectations on .* are broken, first: train_annotations: boxes are in"
    ):
        validate(CONFIG, source, tmp_path / "out", tmp_path / "docs")
    assert not (tmp_path / "out" / "passed.json").exists()
    assert (tmp_path / "out" / "report.json").exists()


def test_a_picture_that_does_not_decode_and_one_cut_short_are_named(source, tmp_path):
    def change(members):
        (a, _), (b, data), *rest = members
        return [(a, b"no picture"), (b, data[: len(data) * 2 // 3]), *rest]

    repack(source, change)
    report = judge(CONFIG, tabulate(CONFIG, source, "train"), tmp_path / "docs")
    (row,) = [row for row in report if row["meaning"] == "pictures decode"]
    ids = [image["id"] for image in json.loads((source / "instances_train.json").read_text())["images"][:2]]
    assert (row["success"], row["ids"]) == (False, ids)


def test_tolerances_are_parameters(source, tmp_path):
    edit(source, set_in("annotations", 1, bbox=[5, 5, 0, 9]))
    tolerant = replace(CONFIG, max_zero_size_boxes=1)
    validate(tolerant, source, tmp_path / "out", tmp_path / "docs")
    edit(source, set_in("annotations", 2, bbox=[5, 5, 0, 9]))
    with pytest.raises(ValueError, match="boxes have a positive size: 2 break it"):
        validate(tolerant, source, tmp_path / "out", tmp_path / "docs")


def test_an_entry_without_a_key_and_a_torn_zip_are_named(source, tmp_path):
    edit(source, lambda d: d["images"][3].pop("height"))
    with pytest.raises(ValueError, match=r"instances_train.json images: entry 3 lacks 'height'"):
        tabulate(CONFIG, source, "train")
    data = (source / "val.zip").read_bytes()
    (source / "val.zip").write_bytes(data[:-100])
    with pytest.raises(ValueError, match=r"val.zip is not a whole zip file"):
        tabulate(CONFIG, source, "val")


def test_offending_ids_are_a_bounded_list(source, tmp_path):
    edit(source, lambda d: [a.update(iscrowd=7) for a in d["annotations"]])
    report = judge(CONFIG, tabulate(CONFIG, source, "train"), tmp_path / "docs")
    (row,) = [row for row in report if row["meaning"] == "crowd flags are 0 or 1"]
    assert row["unexpected"] > len(row["ids"]) == CONFIG.num_reported
    assert describe(row).endswith(", ...)")
