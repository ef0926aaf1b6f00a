"""The rules that a dataset must keep, about the columns of `tables`."""

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from detr.config import Key, check_keys
from pipelines.params import find_nearest

LONGEST = 40  # times a picture's short side; as long as that, 1333 pixels are one cell of 32 pixels wide
KINDS = ("images", "annotations", "categories", "archive", "drift")


@dataclass(frozen=True)
class ValidateParams:
    """The `validate` section of params.yaml."""

    box_tolerance_pixels: Annotated[
        float, Key("pixels by which a box may reach out of its image, and its area exceed the box, on each side", ge=0)
    ]
    min_objects_per_category: Annotated[int, Key("fewest objects of a category in each split", ge=0)]
    max_drift: Annotated[float, Key("largest distance, 0 to 1, from the data that the champion was trained on", ge=0)]
    decoded_share: Annotated[
        float, Key("share of the pictures that are decoded in full; headers and ends are checked in all", ge=0, le=1)
    ]
    num_reported: Annotated[int, Key("most offending ids that are listed per rule", ge=0, le=200)]
    num_examples: Annotated[int, Key("pictures per category on the dataset page", ge=0)]
    tolerated: Annotated[
        dict[str, int], Key("rows of a split that may break the rule of that name; an error is then a warning", ge=0)
    ]

    def __post_init__(self) -> None:
        check_keys(self, "validate")
        judging = [rule for kind in KINDS for rule in make_rules(self, kind, 0) if rule.column]
        names, needed = [rule.name for rule in judging], {rule.name for rule in judging if not rule.tolerable}
        for name in self.tolerated:
            if name not in names:
                raise ValueError(f"validate.tolerated has an unknown key {name!r}{find_nearest(name, names)}")
        for name in names:
            if name not in self.tolerated:
                raise ValueError(f"validate.tolerated lacks the key {name!r}")
            if self.tolerated[name] and name in needed:
                raise ValueError(
                    f"validate.tolerated.{name} is {self.tolerated[name]}, expected 0: training or its judgement "
                    "would fail or be wrong on such rows; mend them, or take them out of the JSON file"
                )


class Rule(NamedTuple):
    """An expectation on a column of one kind of table.

    An `error` broken by more rows than tolerated closes the gate; within the tolerance it is a warning. A
    `warning` within its tolerance is only counted in the report. Without a column it is about the number of rows.
    """

    name: str
    level: str
    meaning: str
    column: str = ""
    expected: Any = True  # of every value: this one, one of a list, (lowest, highest), or "unique"
    example: str = ""  # what is said of a row that breaks it, of `row`, its number, and the columns
    tolerable: bool = True  # whether training and its judgement do without harm with rows that break it


BOX = "annotations[{row}].bbox of {file_name!r} is [{x:.10g}, {y:.10g}, {width:.10g}, {height:.10g}]"
PICTURE = "{file_name!r} {picture_problem}"
ENTRY = "annotations[{row}] of {file_name!r}"


def make_rules(config: ValidateParams, kind: str, num_queries: int) -> list[Rule]:
    """The rules of the tables of images, annotations, categories, archive or drift."""
    judge = {"images": _of_images, "annotations": _of_annotations, "categories": _of_categories}
    if kind in judge:
        return judge[kind](config, num_queries)
    return {
        "archive": [
            Rule("member_name_unique", "error", "no file is twice in the archive", "name", "unique", "", False),
            Rule("member_stored", "error", "files are stored, neither compressed nor encrypted", "stored", True,
                 "{name!r} is not: pack the archive anew, as by zip -0", False),
            Rule("member_listed", "warning", "files are listed in the annotations", "listed"),
        ],
        "drift": [
            Rule("like_champion", "warning", f"distances from the champion's data are at most {config.max_drift:g}",
                 "distance", (None, config.max_drift), "{entry}: {distance:.3f}"),
        ],
    }[kind]  # fmt: skip


def _of_images(config: ValidateParams, num_queries: int) -> list[Rule]:
    return [
        Rule("images_exist", "error", "there are images"),
        Rule("image_valid", "error", "entries have id, file_name, height and width of their types", "valid", True,
             "{problem}", False),
        Rule("image_id_unique", "error", "image ids are unique", "id", "unique",
             "images[{row}].id of {file_name!r} is {id}", False),
        Rule("file_name_unique", "error", "file names are unique", "file_name", "unique",
             "images[{row}].file_name is {file_name!r}"),
        Rule("picture_found", "error", "images are in the archive once", "found", (1, 1),
             "{file_name!r} {whereabouts}", False),
        Rule("picture_opens", "error", "pictures are undamaged JPEG or PNG files", "opens", True,
             PICTURE, False),
        Rule("picture_whole", "error", "pictures are whole, not cut short", "whole", True, PICTURE, False),
        Rule("picture_decodes", "error", "pictures decode", "decodes", True, PICTURE, False),
        Rule("picture_size", "error", "pictures have the annotated size", "size_agrees", True,
             "{file_name!r} is {real_width:.0f} x {real_height:.0f}, annotated as {width} x {height}", False),
        Rule("picture_format", "warning", "pictures have the format of their name's ending", "format_agrees", True,
             "{file_name!r} is a {format}"),
        Rule("picture_colour", "warning", "pictures are in RGB or grey", "mode", ["RGB", "L"],
             "{file_name!r} is in {mode}"),
        Rule("picture_upright", "warning", "pictures have no EXIF turn, which training ignores", "orientation", 1,
             "{file_name!r} has EXIF orientation {orientation}: its boxes must be of the picture as it is stored"),
        Rule("picture_shape", "warning", f"no side of a picture is more than {LONGEST} times the other", "elongation",
             (None, LONGEST), "{file_name!r} is {width} x {height}: training sees next to nothing of it; cut it up"),
        Rule("picture_unique", "warning", "pictures differ from each other", "repeated", False,
             "{file_name!r} has the bytes of {twin!r}"),
        Rule("picture_held_out", "error", "validation pictures are not among the training ones", "leaked", False,
             "{file_name!r} has the bytes of {trained!r}"),
        Rule("image_has_objects", "warning", "images have objects", "told_objects", (1, None), "{file_name!r}"),
        Rule("image_fits_queries", "warning",
             f"images have no more objects than the model has queries ({num_queries})", "num_targets",
             (None, num_queries), "{file_name!r} has {num_targets}"),
        Rule("labels_unique", "warning", "no object is labelled twice", "num_repeated_labels", 0,
             "{file_name!r} has {num_repeated_labels} times the box and category of another label"),
    ]  # fmt: skip


def _of_annotations(config: ValidateParams, num_queries: int) -> list[Rule]:
    reach = f"{config.box_tolerance_pixels:g}"
    return [
        Rule("annotations_exist", "error", "there are annotations"),
        Rule("annotation_valid", "error", "entries have ids and area of their types", "valid", True,
             "{problem}", False),
        Rule("annotation_id_unique", "error", "annotation ids are unique", "id", "unique", f"{ENTRY} has id {{id}}"),
        Rule("image_known", "error", "annotations have a known image", "image_known", True,
             "annotations[{row}].image_id is {image_id}, which no image has", False),
        Rule("category_known", "error", "annotations have a known category", "category_known", True,
             "annotations[{row}].category_id of {file_name!r} is {category_id}, which no category has", False),
        Rule("box_finite", "error", "boxes are four finite numbers", "finite", True, "{box_problem}", False),
        Rule("box_has_size", "error", "boxes have a positive size", "has_size", True, BOX),
        Rule("box_in_pixels", "error",
             "boxes are in pixels, not in fractions of the image as YOLO's are", "in_pixels", True,
             f"{BOX}: like all of its image within one pixel; multiply by its width and height"),
        Rule("box_inside", "error", f"boxes are inside the image by {reach} pixels", "overhang",
             (None, config.box_tolerance_pixels), f"{BOX}, the image {{image_width:.0f}} x {{image_height:.0f}}"),
        Rule("area_given", "warning", "annotations have an area", "area_given", True,
             "annotations[{row}].area of {file_name!r} is missing: taken as {area:.10g}, that of the box"),
        Rule("area_fits", "warning", f"areas are positive and fit the box by {reach} pixels", "area_fits", True,
             f"{BOX}, its area {{area:.10g}}"),
        Rule("crowd_given", "warning", "annotations have a crowd flag", "crowd_given", True,
             "annotations[{row}].iscrowd of {file_name!r} is missing: taken as 0"),
        Rule("crowd_flag", "error", "crowd flags are 0 or 1", "crowd", (0, 1), "{crowd_problem}", False),
        Rule("object_single", "warning", "annotations are of single objects, not crowds", "crowd", (None, 0), ENTRY),
        Rule("objects_judged", "error", "there are objects to judge by: not all are crowds or without size",
             "some_of_use", True, f"{BOX}, iscrowd {{crowd}}, area {{area:.10g}}", False),
    ]  # fmt: skip


def _of_categories(config: ValidateParams, num_queries: int) -> list[Rule]:
    enough = config.min_objects_per_category
    return [
        Rule("categories_exist", "error", "there are categories"),
        Rule("category_valid", "error", "entries have id and name of their types", "valid", True, "{problem}", False),
        Rule("category_id_unique", "error", "category ids are unique", "id", "unique",
             "categories[{row}].id of {name!r} is {id}", False),
        Rule("category_name_unique", "error", "category names are unique", "name", "unique",
             "categories[{row}].name is {name!r}", False),
        Rule("category_in_both", "error", "both splits have the category under this id and name", "in_both", True,
             "{name!r} has id {id}, {beside}", False),
        Rule("category_has_objects", "warning", f"categories have at least {enough} objects", "told_objects",
             (enough, None), "{name!r} has {num_objects}"),
    ]  # fmt: skip


def describe(row: dict[str, Any], num_examples: int = 200) -> str:
    """A row of the report in one line, with the first of its examples."""
    head = f"[{row['name']}] {row['table']}: {row['meaning']}"
    if not row["ids"]:
        return f"[{row['name']}] {row['table']}: there are none" if row["unexpected"] else head
    word = "ids " if all(isinstance(one, int) for one in row["ids"]) else ""  # others say what they are
    ids = f"{word}{', '.join(map(str, row['ids']))}{', ...' if row['unexpected'] > len(row['ids']) else ''}"
    tolerated = f", {row['tolerated']} tolerated" if row["tolerated"] else ""
    examples = "; ".join(row.get("examples", [])[:num_examples])
    said = f"{head}: {row['unexpected']} of {row['rows']} break it ({ids}){tolerated}"
    return f"{said}: {examples}" if examples else said
