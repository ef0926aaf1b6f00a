import json
from copy import deepcopy

import numpy as np
import pytest

from pipelines.data.distribution import LIMITS, _distance, compute_distances, compute_statistics
from pipelines.data.tables import tabulate


@pytest.fixture(scope="module")
def counts(drawn):
    return compute_statistics(tabulate(drawn, 1.0, 0.0))


def test_statistics_count_what_the_files_hold(drawn, counts):
    for split in ("train", "val"):
        document = json.loads((drawn / f"instances_{split}.json").read_text(encoding="utf-8"))
        objects = [a for a in document["annotations"] if not a["iscrowd"]]
        got = counts[split]
        assert got["images"] == len(document["images"])
        assert got["annotations"] == len(document["annotations"])
        assert got["crowds"] == len(document["annotations"]) - len(objects)
        full = {a["image_id"] for a in document["annotations"]}
        assert got["images_without_objects"] == len({i["id"] for i in document["images"]} - full)
        names = {c["id"]: c["name"] for c in document["categories"]}
        assert sum(got["class"].values()) == len(objects)
        for key, name in names.items():
            assert got["class"][name] == sum(a["category_id"] == key for a in objects)
        small = sum(a["area"] < 32**2 for a in objects)
        large = sum(a["area"] >= 96**2 for a in objects)
        assert got["area"] == {"small": small, "medium": len(objects) - small - large, "large": large}
        for name in ("aspect_ratio", "relative_side"):
            assert sum(got[name].values()) == len(objects)
        assert sum(got["objects_per_image"].values()) == sum(got["image_side"].values()) == len(document["images"])
        wide = sum(a["bbox"][2] / a["bbox"][3] > 8 for a in objects)
        assert got["aspect_ratio"]["above 8"] == wide
        assert np.sum(got["box_centres"]) == len(objects)


def test_statistics_are_json_and_survive_it(counts):
    assert json.loads(json.dumps(counts)) == counts


def test_equal_data_are_at_distance_zero(counts):
    apart = compute_distances(counts, counts)
    assert set(apart) == {f"{s} {name}" for s in ("train", "val") for name in ("class", "area", *LIMITS)}
    assert set(apart.values()) == {0.0}


def test_a_class_that_takes_all_is_far_and_only_its_row(counts):
    other = deepcopy(counts)
    total = sum(other["train"]["class"].values())
    other["train"]["class"] = {"box": total}
    apart = compute_distances(other, counts)
    assert apart.pop("train class") > 0.5
    assert set(apart.values()) == {0.0}


@pytest.mark.parametrize(("p", "q", "expected"), [([], [], 0.0), ([5], [], 1.0), ([0, 9], [9, 0], 0.95)])
def test_ends_of_the_scale(p, q, expected):
    assert _distance(np.array(p), np.array(q)) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("size", [50, 500, 20_000])
def test_two_samples_of_one_distribution_are_near_and_two_of_different_ones_are_not(size):
    rng = np.random.default_rng(size)
    shares = rng.dirichlet(np.ones(20))
    near = [_distance(*rng.multinomial(size, shares, 2)) for _ in range(100)]
    assert np.mean(near) < 1.2 / np.sqrt(size)
    assert _distance(rng.multinomial(size, shares), rng.multinomial(size, np.roll(shares, 7))) > 0.3
