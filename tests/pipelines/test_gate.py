"""The gate's decisions as tables."""

import json
from dataclasses import replace

import numpy as np
import pytest

from detr.bootstrap import match_detections
from detr.metrics import average_per_class, evaluate_detections, from_results, read_precision
from pipelines.registry.gate import (
    Judged,
    RegisterParams,
    as_json,
    as_markdown,
    check_protected,
    compute_class_ap,
    decide,
    have_same_images,
    read_names,
)
from tests.projects import detections_like

CONFIG = RegisterParams(0.0, 0.95, 1000, 0, {}, True)
SURE, EVEN = np.linspace(0.00999, 0.01001, 1000), np.linspace(-0.01, 0.01, 1000)


def numbers(version, ap, num_images=500, **per_class):
    return Judged(version, ap, ap - 0.05, ap + 0.05, per_class, "its detections", num_images)


@pytest.mark.parametrize(
    ("candidate", "before", "gains", "changes", "alias", "said"),
    [
        (0.3, 0.2, SURE, {}, "champion", "AP 0.3000 against 0.2000 of version 1, the champion: +0.1000 [+0.0100, +0.0100], better in 100.0% of 1000 resamples"),
        (0.2, 0.2, np.zeros(1000), {}, "challenger", "it is not certain enough (95.0% are asked for)"),
        (0.1, 0.2, -SURE, {}, "challenger", "the gain is below 0, it is not certain enough"),
        (0.3, 0.2, EVEN, {}, "challenger", "better in 50.0% of 1000 resamples: it is not certain enough"),
        (0.3, 0.2, np.r_[np.ones(949), -np.ones(51)], {}, "challenger", "better in 94.9%"),
        (0.3, 0.2, np.r_[np.ones(950), -np.ones(50)], {}, "champion", "better in 95.0%"),
        (0.3, 0.2, np.r_[np.ones(600), -np.ones(400)], {"confidence": 0.6}, "champion", "better in 60.0%"),
        (0.25, 0.2, SURE, {"min_ap_gain": 0.1}, "challenger", "resamples: the gain is below 0.1"),
        (0.3, 0.2, SURE, {"min_ap_gain": 0.1}, "champion", "+0.1000"),
        (0.3, 0.2, SURE, {"protected": {"cat": 0.1}}, "champion", "+0.1000"),
        (0.3, 0.2, SURE, {"protected": {"cat": 0.09}}, "challenger", "resamples: cat loses 0.1000 AP, 0.09 allowed"),
        (0.3, 0.2, SURE, {"protected": {"dog": 0.0}}, "champion", "+0.1000"),
        (0.3, 0.2, SURE, {"protected": {"hen": 0.0}}, "champion", "the champion's AP of hen, protected, is unknown and was not compared"),
        (0.1, 0.2, -SURE, {"protected": {"cat": 0.0}}, "challenger", "the gain is below 0, it is not certain enough (95.0% are asked for), cat loses"),
    ],
)  # fmt: skip
def test_the_gate(candidate, before, gains, changes, alias, said):
    config = replace(CONFIG, **changes)
    new = numbers("2", candidate, cat=0.4, dog=0.5, hen=0.1)
    decision = decide(new, numbers("1", before, cat=0.5, dog=0.5), gains, config)
    assert decision.alias == alias
    assert said in decision.sentence
    assert json.loads(json.dumps(as_json(decision)))["gain"] == pytest.approx(candidate - before)
    page = as_markdown(decision, config)
    assert page.startswith(f"# Version 2: {alias}\n\n{decision.sentence}.\n")
    assert (
        f"| candidate | 2 | {candidate:.4f} | {candidate - 0.05:.4f} to {candidate + 0.05:.4f} | its detections |"
        in page
    )
    assert "| cat | 0.4000 | 0.5000 | -0.1000 |" in page
    assert f"| {'champion before' if alias == 'champion' else 'champion'} | 1 | {before:.4f} |" in page


@pytest.mark.parametrize(
    ("num_images", "confidence", "alias"),
    [(1, 0.95, "challenger"), (4, 0.95, "challenger"), (5, 0.95, "champion"), (1, 0.5, "champion")],
)
def test_some_images_cannot_make_a_gain_certain(num_images, confidence, alias):
    gains = np.full(1000, 0.1)
    decision = decide(
        numbers("2", 0.3, num_images), numbers("1", 0.2, num_images), gains, replace(CONFIG, confidence=confidence)
    )
    assert decision.alias == alias
    assert decision.gain_low < 0.1 < decision.gain_high
    said = f"{num_images} images cannot make it certain (95.0% are asked for)"
    assert (said in decision.sentence) == (alias == "challenger")


def test_the_first_is_the_champion():
    decision = decide(numbers("1", 0.0), None, None, CONFIG)
    assert (decision.alias, decision.sentence) == ("champion", "there was no champion")
    assert "| champion" not in as_markdown(decision, CONFIG)


def test_an_ap_of_minus_one_takes_and_holds_no_place():
    """Also where it is the first, or seems to be better for certain."""
    for before, gains in ((None, None), (numbers("1", -1.0), np.zeros(1000)), (numbers("1", -2.0), SURE)):
        decision = decide(numbers("2", -1.0), before, gains, CONFIG)
        assert (decision.alias, decision.gain) == ("challenger", None)
        assert decision.sentence.startswith("its AP is -1, for no validation image has an object to judge it by")
    decision = decide(numbers("2", 0.0), numbers("1", -1.0), SURE, CONFIG)
    assert (decision.alias, decision.gain, decision.champion) == ("champion", None, None)
    assert decision.sentence == "version 1, the champion, has an AP of -1, which is none: its place is free"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"min_ap_gain": -0.1}, "min_ap_gain is -0.1"),
        ({"confidence": 1.0}, "confidence is 1.0, expected a number above 0 and below 1"),
        ({"num_resamples": 0}, "num_resamples is 0, expected a number of at least 1"),
        ({"protected": {"cat": -1.0}}, "register.protected.cat is -1.0, expected a number of at least 0"),
        ({"protected": {"cat": float("nan")}}, "register.protected.cat is nan, expected a finite number of at least 0"),
    ],
)
def test_wrong_parameters_are_named(changes, said):
    with pytest.raises(ValueError, match="register") as error:
        replace(CONFIG, **changes)
    assert said in str(error.value)


def test_an_unknown_protected_category_is_an_error(drawn, tmp_path):
    path = drawn / "instances_val.json"
    check_protected(replace(CONFIG, protected={"ellipse": 0.0}), path)
    with pytest.raises(ValueError, match="names 'elipse', no category; did you mean 'ellipse'"):
        check_protected(replace(CONFIG, protected={"elipse": 0.0}), path)
    document = json.loads(path.read_text(encoding="utf-8"))
    gone = {c["id"] for c in document["categories"] if c["name"] == "ellipse"}
    document["annotations"] = [a for a in document["annotations"] if a["category_id"] not in gone]
    (tmp_path / "other.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ValueError, match="names 'ellipse', of which .*other.json has no object"):
        check_protected(replace(CONFIG, protected={"ellipse": 0.0}), tmp_path / "other.json")


def test_the_ap_of_classes_is_cocos(drawn):
    path = drawn / "instances_val.json"
    found = detections_like(path, 4.0)
    expected = [ap for _, ap, *_ in average_per_class(read_precision(evaluate_detections(path, from_results(found))))]
    ours = compute_class_ap(match_detections(path, found), read_names(path))
    assert list(ours.values()) == pytest.approx([ap for ap in expected if ap >= 0], abs=1e-12)
    assert list(ours) == [name for name, ap in zip(read_names(path), expected, strict=True) if ap >= 0]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"val_digest": "a", "data_digest": "x"}, {"val_digest": "a", "data_digest": "y"}, True),
        ({"val_digest": "a", "data_digest": "x"}, {"val_digest": "b", "data_digest": "x"}, False),
        ({"data_digest": "x"}, {"val_digest": "a", "data_digest": "x"}, True),
        ({"data_digest": "x"}, {"val_digest": "a", "data_digest": "y"}, False),
        ({}, {}, False),
    ],
)
def test_whether_the_images_are_the_same(one, other, same):
    assert have_same_images(one, other) is have_same_images(other, one) is same
