"""The gate lets data through that keeps the rules, and says of other data what is wrong with it."""

import contextlib
import io
import json
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from pipelines.params import from_document, merged
from pipelines.rules import ValidateParams
from pipelines.tables import tabulate
from pipelines.validate import describe, digest, judge, quiet_context, validate
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
    return judge(config, asked, 20, quiet_context())


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
        ValueError, match=r"1 of 75 expectations on .* are broken, first: train_annotations: boxes are inside the image"
    ):
        gate(source, tmp_path / "out")
    assert not (tmp_path / "out" / "passed.json").exists()
    assert (tmp_path / "out" / "report.json").exists()
    (page,) = (tmp_path / "docs" / "validations" / "train_annotations").rglob("*.html")
    cells = re.findall(r"<td[^>]*>(?:<[^>]*>|\s)*([^<>\s]+)", page.read_text(encoding="utf-8"))
    key = json.loads((source / "instances_train.json").read_text(encoding="utf-8"))["annotations"][2]["id"]
    assert str(key) in cells


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (outside, "train_annotations: boxes are inside the image by 1 pixels: 1 break it (ids {a2})"),
        (set_in("annotations", 1, bbox=[5, 5, 0, 9]), "boxes have a positive size: 1 break it (ids {a1})"),
        (set_in("annotations", 3, category_id=99), "annotations have a known category: 1 break it (ids {a3})"),
        (lambda d: d["annotations"].clear(), "there are annotations: 1 break it"),
        (lambda d: d["images"][3].pop("height"), "entries have id, file_name, height and width of their types: 1 break it (ids {i3})"),
    ],
)  # fmt: skip
def test_the_message_names_rule_and_ids(source, tmp_path, change, message):
    document = json.loads((source / "instances_train.json").read_text(encoding="utf-8"))
    ids = {f"a{k}": document["annotations"][k]["id"] for k in range(5)} | {"i3": document["images"][3]["id"]}
    edit(source, change)
    broken = [describe(row) for row in report_of(source, split="train") if row["outcome"] == "error"]
    assert any(message.format(**ids) in line for line in broken), broken


def test_a_tolerated_error_is_a_warning_and_one_more_closes_the_gate(source, tmp_path, capsys):
    edit(source, set_in("annotations", 1, bbox=[5, 5, 0, 9]))
    tolerant = replace(CONFIG, tolerated=CONFIG.tolerated | {"box_has_size": 1})
    gate(source, tmp_path / "out", tolerant)
    said = "train_annotations: boxes have a positive size: 1 break it (ids 2), 1 tolerated"
    assert f"warning: {said}" in capsys.readouterr().out
    (row,) = [
        r for r in json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8")) if r["outcome"] != "holds"
    ]
    assert (row["name"], row["level"], row["outcome"], row["tolerated"]) == ("box_has_size", "error", "warning", 1)
    edit(source, set_in("annotations", 2, bbox=[5, 5, 0, 9]))
    with pytest.raises(ValueError, match="boxes have a positive size: 2 break it"):
        gate(source, tmp_path / "out", tolerant)


def test_malformed_rows_that_are_tolerated_do_not_break_the_page(source, tmp_path):
    edit(source, lambda d: d["images"][0].pop("width"))
    edit(source, lambda d: d["categories"][0].pop("name"))
    with zipfile.ZipFile(source / "train.zip") as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(source / "train.zip", "w") as archive:
        for index, (name, data) in enumerate(members):
            archive.writestr(name, data if index else b"no picture")
    gate(source, tmp_path / "out", validate_params(1000, num_examples=50))
    assert (tmp_path / "out" / "passed.json").exists()


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
    assert describe(row).endswith(", ...)")


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


def test_folders_are_judged_like_archives(passed, source):
    for split in ("train", "val"):
        with zipfile.ZipFile(source / f"{split}.zip") as archive:
            archive.extractall(source / split)
        (source / f"{split}.zip").unlink()
    assert report_of(source) == json.loads((passed / "out" / "report.json").read_text(encoding="utf-8"))
    before = digest(source)
    picture = next((source / "val").iterdir())
    picture.rename(picture.with_name("another"))
    renamed = digest(source)
    picture.with_name("another").write_bytes(b"other")
    assert len({before, renamed, digest(source)}) == 3


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
    config = from_document(merged(ROOT, "coco-detr-r50", []), "validate", ValidateParams)
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
    assert [line for line in said if line.startswith(("warning", "error"))] == [
        "warning: train_images: pictures have the format of their name's ending: 1 break it (ids 320612)",
        f"warning: train_images: images have objects: 2 break it (ids {empty['train']})",
        "warning: train_images: no object is labelled twice: 4 break it (ids 99844, 201706, 214087, 522365)",
        "warning: train_annotations: boxes have a positive size: 2 break it (ids 918, 2206849), 2 tolerated",
        f"warning: train_annotations: annotations are of single objects, not crowds: 3 break it (ids {crowds['train']})",
        f"warning: val_images: images have objects: 1 break it (ids {empty['val']})",
        f"warning: val_annotations: annotations are of single objects, not crowds: 2 break it (ids {crowds['val']})",
    ]
    assert (tmp_path / "out" / "passed.json").exists()


def test_drift_from_the_champions_data_is_a_warning_outside_of_what_dvc_tracks(drawn, passed, source, tmp_path, capsys):
    champions = json.loads((passed / "out" / "statistics.json").read_text(encoding="utf-8"))
    gate(drawn, tmp_path / "same", champions=champions)
    assert "warning" not in (passed / "said").read_text(encoding="utf-8") + capsys.readouterr().out
    edit(source, lambda d: [a.update(category_id=3) for a in d["annotations"]])
    gate(source, tmp_path / "other", champions=champions)
    assert (
        "warning: champion_drift: distances from the champion's data are at most 0.1: 1 break it (ids train class)"
        in capsys.readouterr().out
    )
    assert list((tmp_path / "docs").rglob("validations/champion_drift/**/*.html"))
    gate(source, tmp_path / "alone")
    assert (tmp_path / "other" / "report.json").read_bytes() == (tmp_path / "alone" / "report.json").read_bytes()


@pytest.mark.parametrize("missing", ["instances_val.json", "train.zip"])
def test_a_missing_file_is_named(source, missing):
    (source / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        tabulate(source, 1.0, 1.0)
