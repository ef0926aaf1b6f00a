"""Defects of annotations and of categories."""

from tests.pipelines.defects import Defect, annotation, fixed, planting, setting, without

DEFECTS: dict[str, Defect] = {}
defect = planting(DEFECTS)


@defect("no annotations", "annotations_exist", table="train_annotations", ids=fixed(), count=1)
def _(d):
    d.json["train"]["annotations"] = []


TABLE = "train_annotations"
for title, change, shown in (
    ("an annotation without id", without("annotations", 1, "id"), fixed("annotations[1]")),
    ("an annotation id that is a string", setting("annotations", 1, id="a"), fixed("annotations[1]")),
    ("an annotation id beyond 2**63", setting("annotations", 1, id=2**64), fixed("annotations[1]")),
    ("an image_id that is a string", setting("annotations", 1, image_id="7"), annotation(1)),
    ("a category_id that is true", setting("annotations", 1, category_id=True), annotation(1)),
    ("an annotation without image_id", without("annotations", 1, "image_id"), annotation(1)),
    ("an annotation without category_id", without("annotations", 1, "category_id"), annotation(1)),
    ("a category_id that is a string", setting("annotations", 1, category_id="7"), annotation(1)),
    ("an area that is null", setting("annotations", 1, area=None), annotation(1)),
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
    "a box beyond all pixels": [5, 5, 1e308, 1e308],
    "a box with a whole number beyond 2**63": [5, 5, 2**64, 9],
}.items():
    defect(title, "box_finite", table=TABLE, ids=annotation(0))(setting("annotations", 0, bbox=box))
for title, box in {
    "a box without width": [5, 5, 0, 9],
    "a box without height": [5, 5, 9, 0.0],
    "a box of negative width": [20, 5, -9, 9],
    "a box that vanishes in training's numbers": [20, 5, 1e-320, 9],
    "a box of nothing in the first pixel": [0, 0, 0, 0],
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
    "an area of zero": 0,
    "an area larger than its box": 1e6,
    "an infinite area": float("inf"),
    "an area beyond 2**63": 2**70,
}.items():
    defect(title, "area_fits", "warning", TABLE, ids=annotation(2))(setting("annotations", 2, area=area))
for title, flag in {
    "a crowd flag of 2": 2,
    "a crowd flag of -1": -1,
    "a crowd flag that is a string": "no",
    "a crowd flag that is null": None,
}.items():
    defect(title, "crowd_flag", table=TABLE, ids=annotation(0))(setting("annotations", 0, iscrowd=flag))
defect("no crowd flag", "crowd_given", "warning", TABLE, ids=annotation(0))(without("annotations", 0, "iscrowd"))
defect("no area", "area_given", "warning", TABLE, ids=annotation(0))(without("annotations", 0, "area"))
defect("a crowd", "object_single", "warning", TABLE, ids=annotation(0))(setting("annotations", 0, iscrowd=1))
defect("an annotation of an image that is not listed", "image_known", table=TABLE, ids=annotation(1))(
    setting("annotations", 1, image_id=123456)
)
defect("an annotation of a category that is not listed", "category_known", table=TABLE, ids=annotation(3))(
    setting("annotations", 3, category_id=99)
)


@defect(
    "a box in fractions of its image",
    "box_in_pixels",
    table=TABLE,
    ids=lambda d: [a["id"] for a in of_first_image(d)],
)
def _(d):
    for number, a in enumerate(of_first_image(d), start=1):
        a.update(bbox=[0.1 * number, 0.25, 0.5, 0.5], area=0.25)


def of_first_image(d):
    return [a for a in d.json["train"]["annotations"] if a["image_id"] == d["annotations", 0]["image_id"]]


@defect(
    "nothing but crowds",
    "objects_judged",
    table=TABLE,
    ids=annotation(0, 1, 2, 3),
    count=lambda d: len(d.json["train"]["annotations"]),
    also={"train_annotations object_single", "train_categories category_has_objects"},
)
def _(d):
    for a in d.json["train"]["annotations"]:
        a["iscrowd"] = 1


@defect(
    "nothing but areas that pycocotools leaves out, in the validation data",
    "objects_judged",
    table="val_annotations",
    ids=lambda d: [a["id"] for a in d.json["val"]["annotations"][:4]],
    count=lambda d: len(d.json["val"]["annotations"]),
    also={"val_annotations area_fits"},
)
def _(d):
    for a in d.json["val"]["annotations"]:
        a["area"] = -1


@defect("two annotations with one id", "annotation_id_unique", table=TABLE, ids=annotation(0, 0), count=2)
def _(d):
    d["annotations", 1]["id"] = d["annotations", 0]["id"]


@defect(
    "boxes that are all strings",
    "box_finite",
    table=TABLE,
    ids=annotation(0, 1, 2, 3),
    count=lambda d: len(d.json["train"]["annotations"]),
)
def _(d):
    for a in d.json["train"]["annotations"]:
        a["bbox"] = [str(value) for value in a["bbox"]]


TABLE = "train_categories"


@defect("no categories", "categories_exist", table=TABLE, ids=fixed(), count=1)
def _(d):
    d.json["train"]["categories"] = []


@defect(
    "two categories with one id",
    "category_id_unique",
    table=TABLE,
    ids=fixed(3, 3),
    count=2,
)
def _(d):
    d.json["train"]["categories"].append({"id": 3, "name": "other"})


@defect(
    "two categories with one name",
    "category_name_unique",
    table=TABLE,
    ids=fixed(3, 99),
    count=2,
    also={"train_categories category_has_objects"},
)
def _(d):
    d.json["train"]["categories"].append({"id": 99, "name": "ellipse"})


@defect(
    "a category id that is a string",
    "category_valid",
    table=TABLE,
    ids=fixed("categories[0]"),
)
def _(d):
    d["categories", 0]["id"] = "3"


@defect(
    "a category without a name",
    "category_valid",
    table=TABLE,
    ids=fixed(3),
)
def _(d):
    del d["categories", 0]["name"]


@defect(
    "a category that the validation data lacks",
    "category_in_both",
    table=TABLE,
    ids=fixed(58),
)
def _(d):
    del d.json["val"]["categories"][4]


@defect(
    "a category of another name in the validation data",
    "category_in_both",
    table=TABLE,
    ids=fixed(58),
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
