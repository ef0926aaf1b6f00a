"""The rules that a dataset must keep, about the columns of `tables`."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from pipelines.params import nearest

KINDS = ("images", "annotations", "categories", "archive", "drift")


@dataclass(frozen=True)
class ValidateParams:
    """The `validate` section of params.yaml."""

    box_tolerance_pixels: float  # how far a box may reach outside its image, and an area over its box, per side
    min_objects_per_category: int  # per split
    max_drift: float  # distance (0..1) of a distribution from that of the champion's data
    decoded_share: float  # of the pictures, decoded in full; all are read, and their headers and ends looked at
    num_reported: int  # offending ids listed per rule
    num_examples: int  # pictures per category on the dataset page
    tolerated: dict[str, int]  # rows of a split that may break a rule, by the name of every rule

    def __post_init__(self) -> None:
        names = [rule.name for kind in KINDS for rule in rules(self, kind, 0) if rule.column]
        for name in self.tolerated:
            if name not in names:
                raise ValueError(f"validate.tolerated has an unknown key {name!r}{nearest(name, names)}")
        for name in names:
            if name not in self.tolerated:
                raise ValueError(f"validate.tolerated lacks the key {name!r}")
        counts = {f"tolerated.{name}": value for name, value in self.tolerated.items()}
        for name in ("box_tolerance_pixels", "min_objects_per_category", "max_drift", "num_reported", "num_examples"):
            counts[name] = getattr(self, name)
        for name, value in counts.items():
            if value < 0:
                raise ValueError(f"validate.{name} is {value}, expected 0 or more")
        if self.num_reported > 200:
            raise ValueError(f"validate.num_reported is {self.num_reported}, Great Expectations lists at most 200")
        if not 0 <= self.decoded_share <= 1:
            raise ValueError(f"validate.decoded_share is {self.decoded_share}, expected a share in 0..1")


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


def rules(config: ValidateParams, kind: str, num_queries: int) -> list[Rule]:
    """The rules of the tables of images, annotations, categories, archive or drift."""
    reach = f"{config.box_tolerance_pixels:g}"
    enough = config.min_objects_per_category
    return {
        "images": [
            Rule("images_exist", "error", "there are images"),
            Rule("image_valid", "error", "entries have id, file_name, height and width of their types", "valid"),
            Rule("image_id_unique", "error", "image ids are unique", "id", "unique"),
            Rule("file_name_unique", "error", "file names are unique", "file_name", "unique"),
            Rule("picture_found", "error", "images are in the archive once", "found", (1, 1)),
            Rule("picture_opens", "error", "pictures are undamaged JPEG or PNG files", "opens"),
            Rule("picture_whole", "error", "pictures are whole, not cut short", "whole"),
            Rule("picture_decodes", "error", "pictures decode", "decodes"),
            Rule("picture_size", "error", "pictures have the annotated size", "size_agrees"),
            Rule("picture_format", "warning", "pictures have the format of their name's ending", "format_agrees"),
            Rule("picture_colour", "warning", "pictures are in RGB or grey", "mode", ["RGB", "L"]),
            Rule("picture_upright", "warning", "pictures have no EXIF turn, which training ignores", "orientation", 1),
            Rule("picture_unique", "warning", "pictures differ from each other", "repeated", False),
            Rule("picture_held_out", "error", "validation pictures are not among the training ones", "leaked", False),
            Rule("image_has_objects", "warning", "images have objects", "num_objects", (1, None)),
            Rule(
                "image_fits_queries",
                "warning",
                f"images have no more objects than the model has queries ({num_queries})",
                "num_targets",
                (None, num_queries),
            ),
            Rule("labels_unique", "warning", "no object is labelled twice", "num_repeated_labels", 0),
        ],
        "annotations": [
            Rule("annotations_exist", "error", "there are annotations"),
            Rule("annotation_valid", "error", "entries have ids and area of their types", "valid"),
            Rule("annotation_id_unique", "error", "annotation ids are unique", "id", "unique"),
            Rule("annotation_id_positive", "error", "ids are positive: pycocotools' 0 means no match", "id", (1, None)),
            Rule("image_known", "error", "annotations have a known image", "image_known"),
            Rule("category_known", "error", "annotations have a known category", "category_known"),
            Rule("box_finite", "error", "boxes are four finite numbers", "finite"),
            Rule("box_has_size", "error", "boxes have a positive size", "has_size"),
            Rule("box_inside", "error", f"boxes are inside the image by {reach} pixels", "overhang",
                 (None, config.box_tolerance_pixels)),
            Rule("area_fits", "warning", f"areas are positive and fit the box by {reach} pixels", "area_fits"),
            Rule("crowd_flag", "error", "crowd flags are 0 or 1", "crowd", (0, 1)),
            Rule("object_single", "warning", "annotations are of single objects, not crowds", "crowd", (None, 0)),
        ],
        "categories": [
            Rule("categories_exist", "error", "there are categories"),
            Rule("category_valid", "error", "entries have id and name of their types", "valid"),
            Rule("category_id_unique", "error", "category ids are unique", "id", "unique"),
            Rule("category_name_unique", "error", "category names are unique", "name", "unique"),
            Rule("category_in_both", "error", "both splits have the category under this id and name", "in_both"),
            Rule("category_has_objects", "warning", f"categories have at least {enough} objects", "num_objects",
                 (enough, None)),
        ],
        "archive": [
            Rule("member_name_unique", "error", "no file is twice in the archive", "name", "unique"),
            Rule("member_stored", "error", "files are stored, neither compressed nor encrypted", "stored"),
            Rule("member_listed", "warning", "files are listed in the annotations", "listed"),
        ],
        "drift": [
            Rule("like_champion", "warning", f"distances from the champion's data are at most {config.max_drift:g}",
                 "distance", (None, config.max_drift)),
        ],
    }[kind]  # fmt: skip
