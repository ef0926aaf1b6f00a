import math
from dataclasses import dataclass
from typing import Annotated

import pytest

from detr.config import Key, check_keys, read_keys


@dataclass(frozen=True)
class Record:
    share: Annotated[float, Key("a share", ge=0, lt=1)] = 0.5
    width: Annotated[float, Key("a width", gt=0, le=2)] = 1.0
    kind: Annotated[str, Key("a kind", choices=("one", "two"))] = "one"
    sizes: Annotated[tuple[int, ...], Key("sizes", ge=1)] = (1, 2)
    losses: Annotated[dict[str, float], Key("losses", ge=0)] = None  # type: ignore[assignment]
    free: Annotated[float, Key("any")] = 0.0
    note: Annotated[str, "any text"] = ""
    bare: int = 0


def test_keys_of_fields_are_read():
    meanings = {name: key.meaning for name, key in read_keys(Record).items()}
    assert (meanings["share"], meanings["note"], "bare" in meanings) == ("a share", "any text", False)
    assert read_keys(Record)["width"].describe_allowed() == "above 0 and at most 2"


@pytest.mark.parametrize(
    "changes", [{}, {"share": 0}, {"width": 2}, {"sizes": ()}, {"losses": {"a": 0.0}}, {"free": -9}]
)
def test_what_is_allowed_passes(changes):
    check_keys(Record(**changes), "section")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 1.0}, "section.share is 1.0, expected a number of at least 0 and below 1"),
        ({"width": 0.0}, "section.width is 0.0, expected a number above 0 and at most 2"),
        ({"width": math.inf}, "section.width is inf, expected a finite number above 0 and at most 2"),
        ({"share": math.nan}, "section.share is nan, expected a finite number of at least 0 and below 1"),
        ({"kind": "three"}, r"section.kind is 'three', expected one of \['one', 'two'\]"),
        ({"sizes": (1, 0)}, r"section.sizes\[1\] is 0, expected a number of at least 1"),
        ({"losses": {"a": 1.0, "b": -1.0}}, "section.losses.b is -1.0, expected a number of at least 0"),
        ({"free": math.inf}, "section.free is inf, expected a finite number$"),
    ],
)
def test_what_is_not_is_named_with_what_is(changes, message):
    with pytest.raises(ValueError, match=message):
        check_keys(Record(**changes), "section")
