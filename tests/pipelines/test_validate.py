"""The gate lets data through that keeps the rules, and says of other data what is wrong with it."""

import contextlib
import io
import json
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detr.coco import CocoDataset, load_annotations
from detr.images import open_images
from detr.metrics import compute_coco_metrics
from detr.transforms import EvalTransform
from pipelines.data.rules import KINDS, ValidateParams, describe, make_rules
from pipelines.data.tables import pictures_of, tabulate
from pipelines.params import from_document, merge_parameters
from pipelines.validate import compute_digest, judge, make_context, validate
from tests.projects import validate_params
from tests.running import ROOT

CONFIG = validate_params(num_reported=3, num_examples=2)


def edit(folder, change, split="train"):
    path = folder / f"instances_{split}.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def gate(folder, output, config=CONFIG, num_queries=20, champions=None):
    validate(config, folder, output, output.parent / "docs", num_queries, champions)


@pytest.fixture(scope="module")
def passed(drawn, tmp_path_factory):
    """A folder with what the gate gives of clean data in `out` and `docs`, and what it says in `said`. Read only."""
    folder, said = tmp_path_factory.mktemp("passed"), io.StringIO()
    with contextlib.redirect_stdout(said):
        gate(drawn, folder / "out")
    (folder / "said").write_text(said.getvalue(), encoding="utf-8")
    return folder


def report_of(folder, config=CONFIG, split=""):
    """The rows of all tables, or of those of one split."""
    tables = tabulate(folder, config.box_tolerance_pixels, config.decoded_share)
    asked = {name: table for name, table in tables.items() if name.startswith(split)}
    return judge(config, asked, 20, make_context())


def set_in(kind, index, **values):
    return lambda document: document[kind][index].update(values)


def outside(document):
    document["annotations"][2]["bbox"][0] += 500


def test_clean_data_passes_twice_to_the_same_bytes(drawn, passed, tmp_path):
    one, two = passed / "out", tmp_path / "two"
    gate(drawn, two)
    files = [path.relative_to(one) for path in one.rglob("*") if path.is_file()]
    for name in files:
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert {Path(name) for name in ("passed.json", "report.json", "statistics.json", "dataset/index.html")} <= set(
        files
    )
    assert set(json.loads((one / "passed.json").read_text(encoding="utf-8"))) == {"data"}
    report = json.loads((one / "report.json").read_text(encoding="utf-8"))
    assert all(row["outcome"] == "holds" for row in report)
    pages = list((passed / "docs").rglob("*.html"))
    assert (passed / "docs" / "index.html") in pages
    assert len([page for page in pages if "validations" in page.parts]) == 8


def test_the_digest_follows_the_data(passed, source, tmp_path):
    edit(source, lambda d: d["info"].update(description="other"))
    gate(source, tmp_path / "two")
    assert (passed / "out" / "passed.json").read_text(encoding="utf-8") != (tmp_path / "two" / "passed.json").read_text(
        encoding="utf-8"
    )


def test_the_gate_closes_and_leaves_no_pass_of_before(passed, source, tmp_path):
    shutil.copytree(passed, tmp_path, dirs_exist_ok=True)
    assert (tmp_path / "out" / "passed.json").exists()
    edit(source, outside)
    with pytest.raises(
        ValueError,
        match=r"1 of 83 expectations on .* are broken, first: \[box_inside\] train_annotations: boxes are inside",
    ):
        gate(source, tmp_path / "out")
    assert not (tmp_path / "out" / "passed.json").exists()
    assert (tmp_path / "out" / "report.json").exists()
    (page,) = (tmp_path / "docs" / "validations" / "train_annotations").rglob("*.html")
    cells = re.findall(r"<td[^>]*>(?:<[^>]*>|\s)*([^<>\s]+)", page.read_text(encoding="utf-8"))
    key = json.loads((source / "instances_train.json").read_text(encoding="utf-8"))["annotations"][2]["id"]
    assert str(key) in cells


def test_a_tolerated_error_is_a_warning_and_one_more_closes_the_gate(source, tmp_path, capsys):
    edit(source, set_in("annotations", 1, bbox=[5, 5, 0, 9]))
    tolerant = replace(CONFIG, tolerated=CONFIG.tolerated | {"box_has_size": 1})
    gate(source, tmp_path / "out", tolerant)
    said = "[box_has_size] train_annotations: boxes have a positive size: 1 of"
    printed = capsys.readouterr().out
    assert f"warning: {said}" in printed
    assert "break it (ids 2), 1 tolerated: annotations[1].bbox of" in printed
    (row,) = [
        r for r in json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8")) if r["outcome"] != "holds"
    ]
    assert (row["name"], row["level"], row["outcome"], row["tolerated"]) == ("box_has_size", "error", "warning", 1)
    edit(source, set_in("annotations", 2, bbox=[5, 5, 0, 9]))
    with pytest.raises(ValueError, match="boxes have a positive size: 2 of"):
        gate(source, tmp_path / "out", tolerant)


@pytest.mark.parametrize(
    "name",
    [
        "image_valid", "image_id_unique", "picture_found", "picture_opens", "picture_whole", "picture_decodes",
        "picture_size", "annotation_valid", "image_known", "category_known", "box_finite", "crowd_flag",
        "objects_judged", "category_valid", "category_id_unique", "category_name_unique", "category_in_both",
        "member_name_unique", "member_stored",
    ],
)  # fmt: skip
def test_what_training_or_its_judgement_cannot_do_with_is_not_tolerated(name):
    with pytest.raises(
        ValueError, match=f"validate.tolerated.{name} is 3, expected 0: training or its judgement would"
    ):
        replace(CONFIG, tolerated=CONFIG.tolerated | {name: 3})


TOLERABLE = {
    "file_name_unique": lambda d: d["images"][1].update(
        {key: d["images"][0][key] for key in ("file_name", "width", "height")}
    ),
    "annotation_id_unique": set_in("annotations", 1, id=1),
    "box_has_size": set_in("annotations", 1, bbox=[5, 5, 0, 9]),
    "box_in_pixels": lambda d: [
        a.update(bbox=[0.1, 0.1, 0.5, 0.5], area=0.25)
        for a in d["annotations"]
        if a["image_id"] == d["annotations"][0]["image_id"]
    ],
    "box_inside": outside,
}


def test_what_is_tolerated_of_errors_is_read_by_training_and_judged(source, tmp_path):
    for split in ("train", "val"):
        for change in TOLERABLE.values():
            edit(source, change, split)
    tolerant = replace(CONFIG, tolerated=CONFIG.tolerated | dict.fromkeys([*TOLERABLE, "picture_held_out"], 1000))
    gate(source, tmp_path / "out", tolerant)
    report = json.loads((tmp_path / "out/report.json").read_bytes())
    assert set(TOLERABLE) <= {row["name"] for row in report if row["outcome"] == "warning"}
    levels = {rule.name: rule for kind in KINDS for rule in make_rules(CONFIG, kind, 20)}
    assert set(TOLERABLE) | {"picture_held_out"} == {
        name for name, rule in levels.items() if rule.level == "error" and rule.column and rule.tolerable
    }
    for split in ("train", "val"):
        annotations = load_annotations(source / f"instances_{split}.json")
        dataset = CocoDataset(annotations, open_images(source / f"{split}.zip"), EvalTransform(64, 96))
        for index in range(len(dataset)):
            assert dataset[0, index].boxes_xyxy.isfinite().all()
    metrics = compute_coco_metrics(source / "instances_val.json", np.zeros((0, 7)))
    assert metrics["AP"] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [', r"instances_train.json is not valid JSON"),
        ("", r"instances_train.json is not valid JSON"),
        ("[]", r"instances_train.json: Expected `object`, got `array`; COCO's format has lists"),
        ('{"images": [], "categories": []}', r"Object missing required field `annotations`"),
        ('{"images": {}, "annotations": [], "categories": []}', r"Expected `array`, got `object` - at `\$.images`"),
        ('{"images": [3], "annotations": [], "categories": []}', r"Expected `object`, got `int` - at `\$.images\[0\]`"),
        ('{"images": [], "annotations": [{}, null], "categories": []}', r"got `null` - at `\$.annotations\[1\]`"),
        ('{"images": [NaN], "annotations": [], "categories": []}', r"Expected `object`, got `float`"),
        (b"\xff\xfe{", r"instances_train.json is not valid JSON"),
    ],
)
def test_a_file_that_is_no_coco_json_is_named(source, text, message):
    (source / "instances_train.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        tabulate(source, 1.0, 1.0)


@pytest.mark.parametrize("kept", [0, 1000, -100])
def test_a_torn_zip_is_named(source, kept):
    (source / "val.zip").write_bytes((source / "val.zip").read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"val.zip is not a whole zip file \(.*\); run download again"):
        tabulate(source, 1.0, 1.0)


def test_offending_ids_are_a_bounded_list(source):
    edit(source, lambda d: [a.update(iscrowd=7) for a in d["annotations"]])
    (row,) = [row for row in report_of(source) if row["name"] == "crowd_flag" and row["outcome"] == "error"]
    assert row["unexpected"] > len(row["ids"]) == CONFIG.num_reported
    assert "(ids 1, 2, 3, ...): annotations[0].iscrowd is 7, expected 0 or 1; annotations[1]" in describe(row)


def test_only_a_share_is_decoded_but_all_are_read(source):
    with zipfile.ZipFile(source / "train.zip") as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(source / "train.zip", "w") as archive:
        for name, data in members:
            middle = len(data) // 2
            archive.writestr(name, data[:middle] + b"\xff\xff\xff" * 40 + data[middle + 120 :])

    def broken(share):
        table = tabulate(source, 1.0, share)["train_images"]
        assert table["opens"].all()
        assert table["whole"].all()
        return (~table["decodes"]).sum()

    assert broken(0.0) == 0
    assert 0 < broken(0.5) <= len(members) // 2
    assert broken(0.5) < broken(1.0)


def test_folders_are_judged_like_archives(drawn, passed, source):
    for split in ("train", "val"):
        with zipfile.ZipFile(source / f"{split}.zip") as archive:
            archive.extractall(source / split)
        (source / f"{split}.zip").unlink()
    assert report_of(source) == json.loads((passed / "out" / "report.json").read_text(encoding="utf-8"))
    before = compute_digest(source)
    shutil.copy(drawn / "val.zip", source)
    assert pictures_of(source, "val") == source / "val.zip"  # the archive, as for training
    assert compute_digest(source) != before
    (source / "val.zip").unlink()
    picture = next((source / "val").iterdir())
    picture.rename(picture.with_name("another"))
    renamed = compute_digest(source)
    picture.with_name("another").write_bytes(b"other")
    assert len({before, renamed, compute_digest(source)}) == 3


@pytest.fixture
def like_coco(source):
    """Drawn data with the defects of COCO 2017, under COCO's ids."""
    entries = {}

    def rename(document):
        images, annotations = document["images"], document["annotations"]
        for entry, new in zip(images, (99844, 201706, 214087, 522365, 320612), strict=False):
            entries[new] = entry["file_name"]
            for a in annotations:
                a["image_id"] = new if a["image_id"] == entry["id"] else a["image_id"]
            entry["id"] = new
        mine = [next(a for a in annotations if a["image_id"] == i["id"]) for i in images[:4]]
        for number, a in enumerate(mine):
            annotations.append(a | {"id": 3000000 + number})
        flat = [a for a in annotations if a["id"] < 3000000 and a not in mine][:2]
        for a, new in zip(flat, (918, 2206849), strict=True):
            a.update(id=new, bbox=[*a["bbox"][:3], 0.0])
        images[4]["file_name"] = "000000320612.jpg"

    for split in ("train", "val"):
        edit(source, lambda d: [a.update(iscrowd=0) for a in d["annotations"]], split)
    edit(source, rename)
    with zipfile.ZipFile(source / "train.zip") as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(source / "train.zip", "w") as archive:
        for name, data in members:
            if name == entries[320612]:
                file = io.BytesIO()
                Image.open(io.BytesIO(data)).save(file, "PNG")
                name, data = "000000320612.jpg", file.getvalue()
            archive.writestr(f"train2017/{name}", data)
    for split, crowds, empty in (("train", 3, 2), ("val", 2, 1)):
        edit(source, lambda d, crowds=crowds, empty=empty: set_crowds_and_empty(d, crowds, empty), split)
    return source


def set_crowds_and_empty(document, crowds, empty):
    """Makes the last annotations crowds, and exactly `empty` images empty: the last ones."""
    for a in document["annotations"][5 : 5 + crowds]:
        a["iscrowd"] = 1
    full = {a["image_id"] for a in document["annotations"]}
    for image in document["images"]:
        if image["id"] not in full:
            new = document["annotations"][0] | {"id": 4000000 + image["id"], "image_id": image["id"]}
            document["annotations"].append(new | {"bbox": [1, 1, 9, 9], "area": 80})
    gone = {image["id"] for image in document["images"][-empty:]}
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] not in gone]


def test_cocos_own_defects_pass_with_warnings_that_say_exactly_these(like_coco, tmp_path, capsys):
    config = from_document(merge_parameters(ROOT, "coco-detr-r50", []), "validate", ValidateParams)
    gate(like_coco, tmp_path / "out", replace(config, decoded_share=1.0, num_examples=1), num_queries=100)
    said = capsys.readouterr().out.splitlines()
    documents = {
        s: json.loads((like_coco / f"instances_{s}.json").read_text(encoding="utf-8")) for s in ("train", "val")
    }
    empty = {
        s: ", ".join(str(i["id"]) for i in d["images"][-n:])
        for (s, d), n in zip(documents.items(), (2, 1), strict=True)
    }
    crowds = {s: ", ".join(str(a["id"]) for a in d["annotations"] if a["iscrowd"]) for s, d in documents.items()}
    broken = [re.split(r"(?<=[)d]): ", line)[0] for line in said if line.startswith(("warning", "error"))]
    images, annotations = (
        {s: f"of {len(d[kind])} break it" for s, d in documents.items()} for kind in ("images", "annotations")
    )
    assert broken == [
        f"warning: [picture_format] train_images: pictures have the format of their name's ending: 1 {images['train']} (ids 320612)",
        f"warning: [image_has_objects] train_images: images have objects: 2 {images['train']} (ids {empty['train']})",
        f"warning: [labels_unique] train_images: no object is labelled twice: 4 {images['train']} (ids 99844, 201706, 214087, 522365)",
        f"warning: [box_has_size] train_annotations: boxes have a positive size: 2 {annotations['train']} (ids 918, 2206849), 2 tolerated",
        f"warning: [object_single] train_annotations: annotations are of single objects, not crowds: 3 {annotations['train']} (ids {crowds['train']})",
        f"warning: [image_has_objects] val_images: images have objects: 1 {images['val']} (ids {empty['val']})",
        f"warning: [object_single] val_annotations: annotations are of single objects, not crowds: 2 {annotations['val']} (ids {crowds['val']})",
    ]
    assert (tmp_path / "out" / "passed.json").exists()


def test_drift_from_the_champions_data_is_a_warning_outside_of_what_dvc_tracks(drawn, passed, source, tmp_path, capsys):
    champions = json.loads((passed / "out" / "statistics.json").read_text(encoding="utf-8"))
    gate(drawn, tmp_path / "same", champions=champions)
    assert "warning" not in (passed / "said").read_text(encoding="utf-8") + capsys.readouterr().out
    edit(source, lambda d: [a.update(category_id=3) for a in d["annotations"]])
    gate(source, tmp_path / "other", champions=champions)
    assert (
        "warning: [like_champion] champion_drift: distances from the champion's data are at most 0.1: 1 of 12 break it "
        "(train class): train class: 0." in capsys.readouterr().out
    )
    assert list((tmp_path / "docs").rglob("validations/champion_drift/**/*.html"))
    gate(source, tmp_path / "alone")
    assert (tmp_path / "other" / "report.json").read_bytes() == (tmp_path / "alone" / "report.json").read_bytes()


@pytest.mark.parametrize("missing", ["instances_val.json", "train.zip"])
def test_a_missing_file_is_named(source, missing):
    (source / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        tabulate(source, 1.0, 1.0)
