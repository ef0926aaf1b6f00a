"""A weighted AP is that of a dataset with each image as often as it weighs, by pycocotools; resamples are paired."""

import json

import numpy as np
import pytest

from detr.bootstrap import bootstrap_ap, interval, match, weighted_ap
from detr.judge import coco_metrics, to_results
from tests.detr.test_judge import by_hand, noisy, perfect, published, truth, write_truth  # noqa: F401


def random_case(seed, folder):
    """Crowded images of few categories: ties in overlap and score, crowds, boxes without area, empty images."""
    rng = np.random.default_rng(seed)
    rows, found = [], []
    for image_id in range(1, 9):
        for _ in range(int(rng.integers(0, 12))):
            x, y, w, h = (int(v) * 10 for v in (*rng.integers(0, 12, 2), *rng.integers(0, 9, 2)))
            rows.append((image_id, x, y, w, h, w * h, rng.random() < 0.15, rng.integers(1, 4)))
        for row in rows[-10:]:
            if row[0] == image_id:
                for _ in range(int(rng.integers(0, 4))):
                    box = [v + 5 * int(rng.integers(-1, 2)) for v in row[1:5]]
                    found.append([image_id, *box[:2], max(box[2], 1), max(box[3], 1), rng.random(), rng.integers(1, 4)])
    path = write_truth(folder / f"{seed}.json", range(1, 10), (1, 2, 3, 4), rows)
    return path, np.array(found, dtype=np.float64)


@pytest.mark.parametrize("seed", range(20))
def test_an_unweighted_ap_is_that_of_pycocotools(tmp_path, seed):
    path, found = random_case(seed, tmp_path)
    matches = match(path, found)
    weights = np.ones((len(matches.objects), 1))
    assert weighted_ap(matches, weights)[0] == pytest.approx(by_hand(path, found).stats[0], abs=1e-12)


def test_the_published_ap_is_reached(tmp_path):
    path, found = published(tmp_path)
    matches = match(path, found)
    assert round(weighted_ap(matches, np.ones((100, 1)))[0], 6) == 0.504581
    expected = match(path, to_results(found))
    assert all(np.array_equal(value, getattr(expected, name)) for name, value in vars(matches).items())


@pytest.mark.parametrize("seed", range(5))
def test_a_weighted_image_counts_as_so_many_images(tmp_path, seed):
    path, found = random_case(seed, tmp_path)
    matches = match(path, found)
    drawn = np.random.default_rng(seed).multinomial(9, np.full(9, 1 / 9), 4).T
    aps = weighted_ap(matches, drawn)
    annotations = json.loads(path.read_text(encoding="utf-8"))["annotations"]
    for weights, ap in zip(drawn.T, aps, strict=True):
        rows, repeated, image_ids = [], [], []
        for image_id, weight in zip(range(1, 10), weights, strict=True):
            for copy in range(weight):
                other = 100 * copy + image_id
                image_ids.append(other)
                own = [a for a in annotations if a["image_id"] == image_id]
                rows += [(other, *a["bbox"], a["area"], a["iscrowd"], a["category_id"]) for a in own]
                part = found[found[:, 0] == image_id].copy()
                part[:, 0] = other
                repeated.append(part)
        doubled = write_truth(tmp_path / "doubled.json", image_ids, (1, 2, 3, 4), rows)
        assert ap == pytest.approx(coco_metrics(doubled, np.concatenate(repeated))["AP"], abs=1e-12)


def test_nothing_detected_and_nothing_to_find(truth, tmp_path):  # noqa: F811
    assert weighted_ap(match(truth, np.zeros((0, 7))), np.ones((6, 2))).tolist() == [0, 0]
    empty = write_truth(tmp_path / "empty.json", (1, 2), (3,), [])
    assert weighted_ap(match(empty, np.zeros((0, 7))), np.ones((2, 1))).tolist() == [-1]


def test_only_the_best_hundred_detections_of_an_image_and_category_count(tmp_path):
    path = write_truth(tmp_path / "one.json", (1,), (3,), [(1, 10, 10, 20, 20, 400, 0, 3)])
    wrong = [[1, 300, 300, 10, 10, 0.5 + k / 1000, 3] for k in range(100)]
    found = np.array([*wrong, [1, 10, 10, 20, 20, 0.4, 3]], dtype=float)
    assert weighted_ap(match(path, found), np.ones((1, 1)))[0] == by_hand(path, found).stats[0] == 0
    found[0, 5] = 0.3
    assert weighted_ap(match(path, found), np.ones((1, 1)))[0] == pytest.approx(by_hand(path, found).stats[0])


def test_resamples_are_those_of_the_seed_and_have_the_ap_as_mean(truth):  # noqa: F811
    matches = match(truth, noisy(truth))
    aps = bootstrap_ap([matches], 600, seed=3)
    assert np.array_equal(aps, bootstrap_ap([matches, match(truth, perfect(truth))], 600, seed=3)[:1])
    assert not np.array_equal(aps, bootstrap_ap([matches], 600, seed=4))
    ap = coco_metrics(truth, noisy(truth))["AP"]
    assert aps.shape == (1, 600)
    assert aps.mean() == pytest.approx(ap)
    low, high = interval(aps[0], 0.95)
    assert low < ap < high


def test_differences_are_paired(tmp_path):
    """A model and itself differ by nothing in every resample, a slightly better one by more than nothing in most."""
    path, found = published(tmp_path)
    better = found.copy()
    better[:, 5] = np.where(np.random.default_rng(0).random(len(found)) < 0.5, 1, found[:, 5])  # other scores
    first, second, third = bootstrap_ap([match(path, found), match(path, found), match(path, better)], 200, seed=0)
    assert np.array_equal(first, second)
    assert np.std(third - first) < np.std(third)


def test_models_that_saw_other_objects_are_not_paired(truth, tmp_path):  # noqa: F811
    path, found = published(tmp_path)
    with pytest.raises(ValueError, match="matched with different objects"):
        bootstrap_ap([match(truth, noisy(truth)), match(path, found)], 10, seed=0)


def test_detections_of_unknown_images_or_categories_are_refused(truth):  # noqa: F811
    for row in ([999, 0, 0, 1, 1, 0.5, 3], [11, 0, 0, 1, 1, 0.5, 5]):
        with pytest.raises(ValueError, match="of images or categories not in"):
            match(truth, np.array([row], dtype=float))


def test_the_interval_holds_its_share():
    assert interval(np.arange(1001.0), 0.95) == pytest.approx((25, 975))
    assert interval(np.full(5, 0.3), 0.9) == (0.3, 0.3)
