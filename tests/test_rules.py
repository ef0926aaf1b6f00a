"""Every kind of broken data that we know of, planted in clean data: found at its level, with its ids, and nothing else."""

import io
import json
import warnings
import zipfile
from dataclasses import replace

import pytest
from PIL import Image

from pipelines.rules import KINDS, rules
from pipelines.shapes import write_shapes
from pipelines.tables import tabulate
from pipelines.validate import judge, quiet_context
from tests.conftest import SHAPES, validate_params

STRICT = validate_params(tolerated=0, num_reported=4)
NUM_QUERIES = 20


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Drawn data without crowds and empty images, on which every rule holds. Read only."""
    folder = tmp_path_factory.mktemp("clean")
    write_shapes(replace(SHAPES, empty_share=0.0, crowd_share=0.0), folder)
    return folder


class Dataset:
    """A dataset in memory, to break: `json[split]` and `files[split]`, pairs of name and bytes."""

    def __init__(self, folder):
        self.json = {s: json.loads((folder / f"instances_{s}.json").read_text()) for s in ("train", "val")}
        self.files = {}
        for split in self.json:
            with zipfile.ZipFile(folder / f"{split}.zip") as archive:
                self.files[split] = [(name, archive.read(name)) for name in archive.namelist()]
        self.compressed = set()
        self.damaged = {}

    def write(self, folder):
        folder.mkdir()
        for split, document in self.json.items():
            (folder / f"instances_{split}.json").write_text(json.dumps(document))
            with zipfile.ZipFile(folder / f"{split}.zip", "w") as archive, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a name that is there already
                for name, data in self.files[split]:
                    kind = zipfile.ZIP_DEFLATED if (split, name) in self.compressed else zipfile.ZIP_STORED
                    archive.writestr(name, data, kind)
        for old, new in self.damaged.items():
            data = (folder / "train.zip").read_bytes()
            assert data.count(old) == 1
            (folder / "train.zip").write_bytes(data.replace(old, new))
        return folder

    def __getitem__(self, key):
        kind, index = key
        return self.json["train"][kind][index]

    def picture(self, index):
        return self.files["train"][index][1]

    def set_picture(self, index, data):
        self.files["train"][index] = self.files["train"][index][0], data


def findings(folder):
    report = judge(STRICT, tabulate(folder, STRICT.box_tolerance_pixels, 1.0), NUM_QUERIES, quiet_context())
    return {
        f"{r['table']} {r['name']}": (r["outcome"], r["unexpected"], r["ids"])
        for r in report
        if r["outcome"] != "holds"
    }


def encoded(data, kind, mode="RGB", **extra):
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).convert(mode).save(file, kind, **extra)
    return file.getvalue()


DEFECTS = {}


def defect(title, rule, level="error", table="train_images", ids=None, count=None, also=()):
    """Registers what breaks a dataset. `ids(d)` are those of the data before; `also` are the other rules it must break."""

    def register(change):
        assert title not in DEFECTS
        DEFECTS[title] = change, f"{table} {rule}", level, ids, count, set(also)
        return change

    return register


def image(*indices):
    return lambda d: [d["images", k]["id"] for k in indices]


def annotation(*indices):
    return lambda d: [d["annotations", k]["id"] for k in indices]


def fixed(*ids):
    return lambda d: list(ids)


def setting(kind, index, **values):
    return lambda d: d[kind, index].update(values)


def without(kind, index, key):
    return lambda d: d[kind, index].pop(key)


ORPHANS = ("train_annotations image_known",)  # what a lost image leaves behind
EMPTY = ("train_images image_has_objects",)
for title, change in {
    "an image without id": without("images", 0, "id"),
    "an image id that is a string": setting("images", 0, id="7"),
    "an image id that is a fraction": setting("images", 0, id=1.5),
    "an image id that is true": setting("images", 0, id=True),
    "an image id beyond 2**53": setting("images", 0, id=2**60),
}.items():
    defect(title, "image_valid", ids=fixed("entry 0"), also=ORPHANS + EMPTY)(change)
for title, values in {
    "a height that is a string": {"height": "72"},
    "a width of zero": {"width": 0},
    "a negative height": {"height": -72},
    "a height that is null": {"height": None},
}.items():
    defect(title, "image_valid", ids=image(0))(setting("images", 0, **values))
defect("an image without width", "image_valid", ids=image(0))(without("images", 0, "width"))
UNLISTED = ("train_archive member_listed",)
defect("an image without a file name", "image_valid", ids=image(0), also=UNLISTED)(without("images", 0, "file_name"))
defect("an empty file name", "image_valid", ids=image(0), also=UNLISTED)(setting("images", 0, file_name=""))


@defect("two images with one id", "image_id_unique", ids=image(0, 0), count=2, also=ORPHANS + EMPTY)
def _(d):
    d["images", 1]["id"] = d["images", 0]["id"]


@defect(
    "two images of one file",
    "file_name_unique",
    ids=image(0, 1),
    also={*UNLISTED, "train_images picture_unique", "train_images picture_size"},
)
def _(d):
    d["images", 1]["file_name"] = d["images", 0]["file_name"]


@defect("a picture that is not there", "picture_found", ids=image(2))
def _(d):
    del d.files["train"][2]


@defect("a picture that is there under two paths", "picture_found", ids=image(2))
def _(d):
    name, data = d.files["train"][2]
    d.files["train"][2:3] = [(f"a/{name}", data), (f"b/{name}", data)]


@defect(
    "a file that is twice in the archive",
    "member_name_unique",
    table="train_archive",
    ids=lambda d: [d["images", 2]["file_name"]] * 2,
    count=2,
    also={"train_images picture_found"},
)
def _(d):
    d.files["train"].append(d.files["train"][2])


@defect("a compressed file", "member_stored", table="train_archive", ids=lambda d: [d["images", 3]["file_name"]])
def _(d):
    d.compressed.add(("train", d["images", 3]["file_name"]))


@defect("a picture that nobody lists", "member_listed", "warning", "train_archive", ids=fixed("other.jpg"))
def _(d):
    d.files["train"].append(("other.jpg", encoded(d.picture(0), "JPEG", quality=20)))


@defect("another size than annotated", "picture_size", ids=image(0))
def _(d):
    d["images", 0]["height"] += 1


@defect("width and height exchanged", "picture_size", ids=lambda d: [next(turned(d))["id"]])
def _(d):
    entry = next(turned(d))
    entry["width"], entry["height"] = entry["height"], entry["width"]
    for a in d.json["train"]["annotations"]:
        if a["image_id"] == entry["id"]:
            a.update(bbox=[1, 1, 9, 9], area=80)
    keep_one_label_each(d, entry["id"])


def turned(d):
    return (entry for entry in d.json["train"]["images"] if entry["width"] != entry["height"])


def keep_one_label_each(d, image_id):
    """Sets the boxes of an image apart, so that none is a repeated label."""
    mine = [a for a in d.json["train"]["annotations"] if a["image_id"] == image_id]
    for k, a in enumerate(mine):
        a["bbox"] = [1 + k, 1, 9, 9]


@defect("a text in the place of a picture", "picture_opens", ids=image(0))
def _(d):
    d.set_picture(0, b"<html>404 Not Found</html>")


@defect("an empty file in the place of a picture", "picture_opens", ids=image(0))
def _(d):
    d.set_picture(0, b"")


@defect("a GIF", "picture_opens", ids=image(1))
def _(d):
    d.set_picture(1, encoded(d.picture(1), "GIF"))


@defect("a bit that flipped on the disk", "picture_opens", ids=image(1))
def _(d):
    middle = len(d.picture(1)) // 2
    part = d.picture(1)[middle : middle + 20]
    d.damaged[part] = bytes([part[0] ^ 1]) + part[1:]


@defect("a JPEG cut in the middle", "picture_whole", ids=image(1))
def _(d):
    d.set_picture(1, d.picture(1)[: len(d.picture(1)) // 2])


@defect("a JPEG that lacks its last byte", "picture_whole", ids=image(1))
def _(d):
    d.set_picture(1, d.picture(1)[:-1])


@defect("a JPEG cut behind its thumbnail", "picture_whole", ids=image(1))
def _(d):
    thumbnail = d.picture(0)
    exif = b"Exif\0\0" + thumbnail
    with_thumbnail = d.picture(1)[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + d.picture(1)[2:]
    d.set_picture(1, with_thumbnail[: len(with_thumbnail) - 500])


@defect("a PNG cut short", "picture_whole", ids=image(1), also={"train_images picture_format"})
def _(d):
    d.set_picture(1, encoded(d.picture(1), "PNG")[:-30])


@defect("a PNG with a hole", "picture_decodes", ids=image(1), also={"train_images picture_format"})
def _(d):
    data = bytearray(encoded(d.picture(1), "PNG"))
    data[len(data) // 2 : len(data) // 2 + 500] = bytes(500)
    d.set_picture(1, bytes(data))


@defect("a PNG named .jpg", "picture_format", "warning", ids=image(1))
def _(d):
    d.set_picture(1, encoded(d.picture(1), "PNG"))


@defect("a picture without an ending in its name", "picture_format", "warning", ids=image(1))
def _(d):
    d["images", 1]["file_name"] = "picture"
    d.files["train"][1] = "picture", d.picture(1)


@defect("a picture in print colours", "picture_colour", "warning", ids=image(1))
def _(d):
    d.set_picture(1, encoded(d.picture(1), "JPEG", "CMYK"))


@defect("a picture with transparency", "picture_colour", "warning", ids=image(1), also={"train_images picture_format"})
def _(d):
    d.set_picture(1, encoded(d.picture(1), "PNG", "RGBA"))


@defect("a picture of 16 bits", "picture_colour", "warning", ids=image(1), also={"train_images picture_format"})
def _(d):
    d.set_picture(1, encoded(d.picture(1), "PNG", "I;16"))


@defect("a picture that its camera calls turned", "picture_upright", "warning", ids=image(1))
def _(d):
    exif = Image.Exif()
    exif[0x0112] = 6
    d.set_picture(1, encoded(d.picture(1), "JPEG", exif=exif))


@defect("one picture twice", "picture_unique", "warning", ids=image(0, 1), count=2)
def _(d):
    d.set_picture(1, d.picture(0))
    for key in ("width", "height"):
        d["images", 1][key] = d["images", 0][key]
    for a in d.json["train"]["annotations"]:
        if a["image_id"] == d["images", 1]["id"]:
            a.update(bbox=[1, 1, 9, 9], area=80)
    keep_one_label_each(d, d["images", 1]["id"])


@defect(
    "a training picture among the validation ones",
    "picture_held_out",
    table="val_images",
    ids=lambda d: [d.json["val"]["images"][0]["id"]],
)
def _(d):
    name = d.json["val"]["images"][0]["file_name"]
    d.files["val"][0] = name, d.picture(0)
    for key in ("width", "height"):
        d.json["val"]["images"][0][key] = d["images", 0][key]
    first = d.json["val"]["images"][0]["id"]
    for k, a in enumerate(a for a in d.json["val"]["annotations"] if a["image_id"] == first):
        a.update(bbox=[1 + k, 1, 9, 9], area=80)


@defect("an image without objects", "image_has_objects", "warning", ids=image(0))
def _(d):
    first = d["images", 0]["id"]
    d.json["train"]["annotations"] = [a for a in d.json["train"]["annotations"] if a["image_id"] != first]


@defect("more objects than queries", "image_fits_queries", "warning", ids=image(0))
def _(d):
    for k in range(NUM_QUERIES + 1):
        d.json["train"]["annotations"].append(d["annotations", 0] | {"id": 9000 + k, "bbox": [k, 1, 9, 9], "area": 80})


@defect("one object labelled twice", "labels_unique", "warning", ids=lambda d: [d["annotations", 0]["image_id"]])
def _(d):
    d.json["train"]["annotations"].append(d["annotations", 0] | {"id": 9000})


@defect("no images", "images_exist", ids=fixed(), count=1, also={*ORPHANS, "train_archive member_listed"})
def _(d):
    d.json["train"]["images"] = []


@defect(
    "no annotations",
    "annotations_exist",
    table="train_annotations",
    ids=fixed(),
    count=1,
    also={*EMPTY, "train_categories category_has_objects"},
)
def _(d):
    d.json["train"]["annotations"] = []


TABLE = "train_annotations"
for title, change, shown in (
    ("an annotation without id", without("annotations", 1, "id"), fixed("entry 1")),
    ("an annotation id that is a string", setting("annotations", 1, id="a"), fixed("entry 1")),
    ("an annotation without image_id", without("annotations", 1, "image_id"), annotation(1)),
    ("an annotation without category_id", without("annotations", 1, "category_id"), annotation(1)),
    ("a category_id that is a string", setting("annotations", 1, category_id="7"), annotation(1)),
    ("an annotation without area", without("annotations", 1, "area"), annotation(1)),
    ("an area that is a string", setting("annotations", 1, area="9"), annotation(1)),
    ("an area that is no number", setting("annotations", 1, area=float("nan")), annotation(1)),
):
    defect(title, "annotation_valid", table=TABLE, ids=shown)(change)
for title, box in {
    "no box": None,
    "a box of three numbers": [5, 5, 9],
    "a box of five numbers": [5, 5, 9, 9, 9],
    "a box with a string": [5, 5, "x", 9],
    "a box with true": [5, 5, True, 9],
    "a box that is a mapping": {"x": 5, "y": 5, "w": 9, "h": 9},
    "a box with NaN": [5, 5, float("nan"), 9],
    "a box with infinity": [5, float("-inf"), 9, 9],
}.items():
    defect(title, "box_finite", table=TABLE, ids=annotation(0))(setting("annotations", 0, bbox=box))
for title, box in {
    "a box without width": [5, 5, 0, 9],
    "a box without height": [5, 5, 9, 0.0],
    "a box of negative width": [20, 5, -9, 9],
}.items():
    defect(title, "box_has_size", table=TABLE, ids=annotation(1))(setting("annotations", 1, bbox=box))
for title, box in {
    "a box beyond the right edge": [60, 5, 60, 9],
    "a box beyond the lower edge": [5, 60, 9, 60],
    "a box left of the image": [-3, 5, 20, 9],
    "a box in fractions of the image's far corner": [500.5, 500.5, 9, 9],
}.items():
    defect(title, "box_inside", table=TABLE, ids=annotation(2))(setting("annotations", 2, bbox=box, area=50))
for title, area in {
    "a negative area": -1,
    "no area": 0,
    "an area larger than its box": 1e6,
    "an infinite area": float("inf"),
}.items():
    defect(title, "area_fits", "warning", TABLE, ids=annotation(2))(setting("annotations", 2, area=area))
for title, flag in {
    "a crowd flag of 2": 2,
    "a crowd flag of -1": -1,
    "a crowd flag that is a string": "no",
    "a crowd flag that is null": None,
}.items():
    defect(title, "crowd_flag", table=TABLE, ids=annotation(0))(setting("annotations", 0, iscrowd=flag))
defect("no crowd flag, which pycocotools needs", "crowd_flag", table=TABLE, ids=annotation(0))(
    without("annotations", 0, "iscrowd")
)
defect("a crowd", "object_single", "warning", TABLE, ids=annotation(0))(setting("annotations", 0, iscrowd=1))
defect("an annotation of an image that is not listed", "image_known", table=TABLE, ids=annotation(1))(
    setting("annotations", 1, image_id=123456)
)
defect("an annotation of a category that is not listed", "category_known", table=TABLE, ids=annotation(3))(
    setting("annotations", 3, category_id=99)
)
defect("an annotation with id 0", "annotation_id_positive", table=TABLE, ids=fixed(0))(setting("annotations", 1, id=0))


@defect("two annotations with one id", "annotation_id_unique", table=TABLE, ids=annotation(0, 0), count=2)
def _(d):
    d["annotations", 1]["id"] = d["annotations", 0]["id"]


TABLE = "train_categories"


@defect(
    "no categories",
    "categories_exist",
    table=TABLE,
    ids=fixed(),
    count=1,
    also={"train_annotations category_known", "val_categories category_in_both"},
)
def _(d):
    d.json["train"]["categories"] = []


@defect(
    "two categories with one id",
    "category_id_unique",
    table=TABLE,
    ids=fixed(3, 3),
    count=2,
    also={"train_categories category_in_both"},
)
def _(d):
    d.json["train"]["categories"].append({"id": 3, "name": "other"})


@defect(
    "two categories with one name",
    "category_name_unique",
    table=TABLE,
    ids=fixed(3, 99),
    count=2,
    also={"train_categories category_in_both", "train_categories category_has_objects"},
)
def _(d):
    d.json["train"]["categories"].append({"id": 99, "name": "ellipse"})


@defect(
    "a category id that is a string",
    "category_valid",
    table=TABLE,
    ids=fixed("entry 0"),
    also={
        "train_annotations category_known",
        "train_categories category_in_both",
        "val_categories category_in_both",
        "train_categories category_has_objects",
    },
)
def _(d):
    d["categories", 0]["id"] = "3"


@defect(
    "a category without a name",
    "category_valid",
    table=TABLE,
    ids=fixed(3),
    also={"train_categories category_in_both", "val_categories category_in_both"},
)
def _(d):
    del d["categories", 0]["name"]


@defect(
    "a category that the validation data lacks",
    "category_in_both",
    table=TABLE,
    ids=fixed(58),
    also={"val_annotations category_known"},
)
def _(d):
    del d.json["val"]["categories"][4]


@defect(
    "a category of another name in the validation data",
    "category_in_both",
    table=TABLE,
    ids=fixed(58),
    also={"val_categories category_in_both"},
)
def _(d):
    d.json["val"]["categories"][4]["name"] = "plus"


@defect("a category without objects", "category_has_objects", "warning", TABLE, ids=fixed(60))
def _(d):
    for split in d.json:
        d.json[split]["categories"].append({"id": 60, "name": "pentagon"})
    d.json["val"]["annotations"].append(
        {
            "id": 9000,
            "image_id": d.json["val"]["images"][0]["id"],
            "category_id": 60,
            "bbox": [1, 1, 9, 9],
            "area": 80,
            "iscrowd": 0,
        }
    )


def test_clean_data_gives_no_alarm(clean):
    assert findings(clean) == {}


@pytest.mark.parametrize("title", DEFECTS)
def test_a_planted_defect_is_found_at_its_level_with_its_ids(clean, tmp_path, title):
    change, rule, level, ids, count, also = DEFECTS[title]
    dataset = Dataset(clean)
    expected = ids(dataset)
    change(dataset)
    found = findings(dataset.write(tmp_path / "data"))
    assert found.pop(rule, None) == (level, count or len(expected), expected), found
    assert set(found) == also


def test_every_rule_is_broken_by_some_defect():
    named = {rule.name for kind in KINDS if kind != "drift" for rule in rules(STRICT, kind, NUM_QUERIES)}
    assert {entry[1].split()[1] for entry in DEFECTS.values()} == named
    assert len(DEFECTS) >= 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tolerated": {"box_inside": 0}}, "validate.tolerated lacks the key 'image_valid'"),
        ({"tolerated": STRICT.tolerated | {"box_insid": 1}}, "unknown key 'box_insid'; did you mean 'box_inside'?"),
        (
            {"tolerated": STRICT.tolerated | {"box_inside": -1}},
            "validate.tolerated.box_inside is -1, expected 0 or more",
        ),
        ({"decoded_share": 1.5}, "validate.decoded_share is 1.5, expected a share in 0..1"),
        ({"num_reported": 201}, "validate.num_reported is 201, Great Expectations lists at most 200"),
        ({"max_drift": -0.1}, "validate.max_drift is -0.1, expected 0 or more"),
    ],
)
def test_parameters_out_of_range_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(STRICT, **change)
