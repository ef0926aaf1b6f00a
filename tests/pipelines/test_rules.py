"""Every kind of broken data that we know of, planted in clean data: found at its level, with its ids, and nothing else."""

import hashlib
from collections import defaultdict
from dataclasses import replace

import pytest

from pipelines.data.rules import KINDS, make_rules
from pipelines.data.shapes import write_shapes
from pipelines.data.tables import tabulate
from pipelines.validate import judge, make_context
from tests.pipelines import annotation_defects, picture_defects
from tests.pipelines.defects import Dataset
from tests.pipelines.picture_defects import NUM_QUERIES
from tests.projects import SHAPES, validate_params

STRICT = validate_params(tolerated=0, num_reported=4)
DEFECTS = picture_defects.DEFECTS | annotation_defects.DEFECTS


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Drawn data without crowds and empty images, on which every rule holds. Read only."""
    folder = tmp_path_factory.mktemp("clean")
    write_shapes(replace(SHAPES, empty_share=0.0, crowd_share=0.0), folder)
    return folder


@pytest.fixture(scope="module")
def findings(clean, tmp_path_factory):
    """What does not hold of the clean data, under None, and of the data with each defect, under its title.

    All tables are judged in one context, and those with the same content once: most defects change one of eight.
    """
    folders, planted = {None: clean}, tmp_path_factory.mktemp("planted")
    for number, (title, defect) in enumerate(DEFECTS.items()):
        dataset = Dataset(clean)
        defect.change(dataset)
        folders[title] = dataset.write(planted / str(number))
    tables, owners = {}, defaultdict(list)
    for title, folder in folders.items():
        for table, frame in tabulate(folder, STRICT.box_tolerance_pixels, 1.0).items():
            name = f"{content(frame)}-{table}"
            tables[name] = frame
            owners[name].append(title)
    found = {title: {} for title in folders}
    for row in judge(STRICT, tables, NUM_QUERIES, make_context()):
        if row["outcome"] != "holds":
            rule = f"{row['table'].partition('-')[2]} {row['name']}"
            for title in owners[row["table"]]:
                found[title][rule] = row["outcome"], row["unexpected"], row["ids"]
    return found


def content(frame):
    """A digest of a table's values and their types."""
    return hashlib.sha256(f"{frame.dtypes.to_dict()} {frame.to_dict('list')}".encode()).hexdigest()[:16]


def test_clean_data_gives_no_alarm(findings):
    assert findings[None] == {}


@pytest.mark.parametrize("title", DEFECTS)
def test_a_planted_defect_is_found_at_its_level_with_its_ids(clean, findings, title):
    defect, found = DEFECTS[title], dict(findings[title])
    expected = defect.ids(Dataset(clean))
    count = defect.count(Dataset(clean)) if callable(defect.count) else defect.count or len(expected)
    assert found.pop(defect.rule, None) == (defect.level, count, expected), found
    assert set(found) == defect.also


def test_every_rule_is_broken_by_some_defect():
    named = {rule.name for kind in KINDS if kind != "drift" for rule in make_rules(STRICT, kind, NUM_QUERIES)}
    assert {defect.rule.split()[1] for defect in DEFECTS.values()} == named
    assert len(DEFECTS) == len(picture_defects.DEFECTS) + len(annotation_defects.DEFECTS) >= 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tolerated": {"box_inside": 0}}, "validate.tolerated lacks the key 'image_valid'"),
        ({"tolerated": STRICT.tolerated | {"box_insid": 1}}, "unknown key 'box_insid'; did you mean 'box_inside'?"),
        (
            {"tolerated": STRICT.tolerated | {"box_inside": -1}},
            "validate.tolerated.box_inside is -1, expected a number of at least 0",
        ),
        ({"decoded_share": 1.5}, "validate.decoded_share is 1.5, expected a number of at least 0 and at most 1"),
        ({"num_reported": 201}, "validate.num_reported is 201, expected a number of at least 0 and at most 200"),
        ({"max_drift": -0.1}, "validate.max_drift is -0.1, expected a number of at least 0"),
    ],
)
def test_parameters_out_of_range_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(STRICT, **change)
