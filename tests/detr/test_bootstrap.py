"""A weighted AP is that of a dataset with each image as often as it weighs, by pycocotools; resamples are paired."""

import json

import numpy as np
import pytest

from benchmarks.ap_interval import measure
from detr.bootstrap import (
    bootstrap_ap,
    can_be_certain,
    compute_weighted_ap,
    draw_halves,
    find_interval,
    match_detections,
    rank_images,
)
from detr.metrics import compute_coco_metrics, to_results
from tests.detr.test_metrics import by_hand, noisy, perfect, published, truth, write_truth  # noqa: F401


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
    matches = match_detections(path, found)
    weights = np.ones((len(matches.objects), 1))
    assert compute_weighted_ap(matches, weights)[0] == pytest.approx(by_hand(path, found).stats[0], abs=1e-12)


def test_the_published_ap_is_reached(tmp_path):
    path, found = published(tmp_path)
    matches = match_detections(path, found)
    assert round(compute_weighted_ap(matches, np.ones((100, 1)))[0], 6) == 0.504581
    expected = match_detections(path, to_results(found))
    assert all(np.array_equal(value, getattr(expected, name)) for name, value in vars(matches).items())


@pytest.mark.parametrize("seed", range(5))
def test_a_weighted_image_counts_as_so_many_images(tmp_path, seed):
    path, found = random_case(seed, tmp_path)
    matches = match_detections(path, found)
    drawn = np.random.default_rng(seed).multinomial(9, np.full(9, 1 / 9), 4).T
    aps = compute_weighted_ap(matches, drawn)
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
        assert ap == pytest.approx(compute_coco_metrics(doubled, np.concatenate(repeated))["AP"], abs=1e-12)


def test_nothing_detected_and_nothing_to_find(truth, tmp_path):  # noqa: F811
    assert compute_weighted_ap(match_detections(truth, np.zeros((0, 7))), np.ones((6, 2))).tolist() == [0, 0]
    empty = write_truth(tmp_path / "empty.json", (1, 2), (3,), [])
    assert compute_weighted_ap(match_detections(empty, np.zeros((0, 7))), np.ones((2, 1))).tolist() == [-1]


def test_only_the_best_hundred_detections_of_an_image_and_category_count(tmp_path):
    path = write_truth(tmp_path / "one.json", (1,), (3,), [(1, 10, 10, 20, 20, 400, 0, 3)])
    wrong = [[1, 300, 300, 10, 10, 0.5 + k / 1000, 3] for k in range(100)]
    found = np.array([*wrong, [1, 10, 10, 20, 20, 0.4, 3]], dtype=float)
    assert compute_weighted_ap(match_detections(path, found), np.ones((1, 1)))[0] == by_hand(path, found).stats[0] == 0
    found[0, 5] = 0.3
    assert compute_weighted_ap(match_detections(path, found), np.ones((1, 1)))[0] == pytest.approx(
        by_hand(path, found).stats[0]
    )


def test_resamples_are_those_of_the_seed_and_have_the_ap_as_mean(truth):  # noqa: F811
    matches = match_detections(truth, noisy(truth))
    aps = bootstrap_ap([matches], 600, seed=3)
    assert np.array_equal(aps, bootstrap_ap([matches, match_detections(truth, perfect(truth))], 600, seed=3)[:1])
    assert not np.array_equal(aps, bootstrap_ap([matches], 600, seed=4))
    ap = compute_coco_metrics(truth, noisy(truth))["AP"]
    assert aps.shape == (1, 600)
    assert aps.mean() == pytest.approx(ap)
    low, high = find_interval(aps[0], 0.95, 6)
    assert low < ap < high


def test_differences_are_paired(tmp_path):
    """A model and itself differ by nothing in every resample, a slightly better one by more than nothing in most."""
    path, found = published(tmp_path)
    better = found.copy()
    better[:, 5] = np.where(np.random.default_rng(0).random(len(found)) < 0.5, 1, found[:, 5])  # other scores
    first, second, third = bootstrap_ap(
        [match_detections(path, found), match_detections(path, found), match_detections(path, better)], 200, seed=0
    )
    assert np.array_equal(first, second)
    assert np.std(third - first) < np.std(third)


def test_models_that_saw_other_objects_are_not_paired(truth, tmp_path):  # noqa: F811
    path, found = published(tmp_path)
    with pytest.raises(ValueError, match="matched with different objects"):
        bootstrap_ap([match_detections(truth, noisy(truth)), match_detections(path, found)], 10, seed=0)


def test_detections_of_unknown_images_or_categories_are_refused(truth):  # noqa: F811
    for row in ([999, 0, 0, 1, 1, 0.5, 3], [11, 0, 0, 1, 1, 0.5, 5]):
        with pytest.raises(ValueError, match="of images or categories not in"):
            match_detections(truth, np.array([row], dtype=float))


@pytest.mark.parametrize(("num_images", "num_resamples"), [(1, 3), (2, 4), (7, 5), (50, 1000)])
def test_every_image_is_in_one_of_two_halves(num_images, num_resamples):
    drawn = draw_halves(num_images, num_resamples, seed=1)
    assert drawn.shape == (num_images, num_resamples)
    counts = drawn.sum(axis=0)
    first = -(-num_resamples // 2)
    assert set(counts[:first]) == {num_images // 2}
    assert np.array_equal(drawn[:, : num_resamples - first], ~drawn[:, first:])
    assert num_images < 50 or len({column.tobytes() for column in drawn.T}) == num_resamples


def test_the_interval_holds_its_share_of_what_can_be():
    assert find_interval(np.arange(1001.0) / 1000, 0.95, 50) == pytest.approx((0.025, 0.975))
    assert find_interval(np.arange(1001.0) / 500 - 1, 0.95, 50) == pytest.approx((-0.95, 0.95))
    assert find_interval(np.arange(1001.0) / 500 - 1, 0.95, 50, lowest=0) == pytest.approx((0, 0.95))
    assert find_interval(np.arange(1001.0) / 500, 0.95, 50) == pytest.approx((0.05, 1))


def test_an_interval_of_no_width_is_as_wide_as_what_so_few_images_may_miss():
    """(1 - 0.071)^50 = 0.025: of a kind that has this share, 50 images hold none once in 40 times."""
    assert find_interval(np.full(5, 0.3), 0.95, 1) == (-0.675, 1)
    assert find_interval(np.zeros(5), 0.95, 50, lowest=0) == pytest.approx((0, 0.0711), abs=1e-4)
    assert find_interval(np.ones(5), 0.95, 500) == pytest.approx((0.9927, 1), abs=1e-4)


def test_some_images_cannot_make_certain():
    assert [can_be_certain(n, 0.95) for n in (0, 1, 4, 5, 50)] == [False, False, False, True, True]
    assert can_be_certain(2, 0.75)


def test_one_image_or_halves_without_objects_give_an_interval(tmp_path):
    for image_ids in ((1,), (1, 2), (1, 2, 3)):
        path = write_truth(tmp_path / "few.json", image_ids, (3,), [(1, 10, 10, 20, 20, 400, 0, 3)])
        found = np.array([[1, 10, 10, 20, 20, 0.4, 3], [1, 90, 90, 20, 20, 0.6, 3]], dtype=float)
        (aps,) = bootstrap_ap([match_detections(path, found)], 20, seed=0)
        assert aps.tolist() == pytest.approx([0.5] * 20)
        low, high = find_interval(aps, 0.95, len(image_ids), lowest=0)
        assert 0 <= low < 0.5 < high <= 1


def test_the_interval_holds_the_ap_of_all_images_about_as_often_as_it_says():
    """Of 60 sets of 50 images; more of them, other methods and populations: benchmarks/ap_interval.py."""
    shares = measure("3 classes", 50, 60, 100, seed=1)["shares"]
    assert shares["halves"][0] >= 0.9
    assert shares["halves"][1] >= 0.9
    assert shares["halves"][3] > shares["bootstrap"][3]


SQUARES = {"a": (0, 0, 10, 10), "b": (100, 0, 10, 10), "c": (0, 100, 40, 40), "far": (300, 300, 10, 10)}


def test_images_are_ranked_by_what_is_right_and_wrong_in_them(tmp_path):
    """Counted by hand: image 1 has all of two objects, 2 one of two, 3 none of one and an invention, 4 is right to be
    empty, 5 has inventions alone, 6 a crowd with three detections on it, 7 one object and one invention, 8 one of one."""
    objects = [(1, "a", 0), (1, "b", 0), (2, "a", 0), (2, "b", 0), (3, "a", 0), (6, "c", 1), (7, "a", 0), (8, "a", 0)]
    rows = [(k, *SQUARES[name], SQUARES[name][2] * SQUARES[name][3], crowd, 3) for k, name, crowd in objects]
    path = write_truth(tmp_path / "truth.json", (8, 7, 6, 5, 4, 3, 2, 1), (3,), rows)
    found = [(1, "a"), (1, "b"), (2, "b"), (3, "far"), (5, "far"), (5, "b"), (7, "a"), (7, "far"), (8, "a")]
    seen = [(k, *SQUARES[name], 0.9, 3) for k, name in found] + [(6, 5 * n, 105, 20, 20, 0.9, 3) for n in range(3)]
    faint = [(k, *SQUARES["far"], 0.1, 3) for k in (1, 4, 8)]
    seen = np.array(seen + faint, dtype=float)
    worst, best = rank_images(match_detections(path, seen[seen[:, 5] >= 0.5]))
    assert (worst + 1).tolist() == [3, 5, 2, 7]  # F1 0 with two errors, 0 with two, 2/3, 2/3
    assert (best + 1).tolist() == [1, 8, 7, 2]  # F1 1 with two hits, 1 with one, 2/3, 2/3
    worst, best = rank_images(match_detections(path, seen))  # what is faint is wrong too when it counts
    assert (worst + 1).tolist() == [3, 5, 4, 2, 7, 8, 1]
    assert (best + 1).tolist() == [1, 8, 7, 2]


def odd_case(seed, folder):
    """Objects and detections of negative, no and huge areas, crowds, areas that are not of the box, equal scores, many."""
    rng = np.random.default_rng(seed)
    rows, found = [], []
    for image_id in range(1, 7):
        for _ in range(int(rng.integers(0, 9))):
            x, y, w, h = (int(v) * 10 for v in (*rng.integers(0, 12, 2), *rng.integers(-1, 9, 2)))
            if rng.random() < 0.05:
                w, h = 200_000, 100_000
            area = (w * h, 0, -5, 2e10, 1e10, abs(w * h) / 2)[int(rng.integers(6))]
            rows.append((image_id, x, y, w, h, area, rng.random() < 0.2, int(rng.integers(1, 4))))
            for _ in range(int(rng.integers(0, 30 if seed % 4 == 0 else 4))):
                box = [v + 5 * int(rng.integers(-1, 2)) for v in (x, y, w, h)]
                score = rng.random()
                found.append([image_id, *box, round(score, 1) if seed % 2 else score, rng.integers(1, 4)])
        for _ in range(120 if seed % 4 == 0 else 0):
            found.append([image_id, *(int(v) * 10 for v in rng.integers(-1, 12, 4)), round(rng.random(), 1), 1])
    return write_truth(folder / f"{seed}.json", range(1, 8), (1, 2, 3, 4), rows), np.array(found, dtype=np.float64)


@pytest.mark.parametrize("seed", range(24))
def test_odd_areas_equal_scores_and_many_detections_are_matched_as_by_pycocotools(tmp_path, seed):
    path, found = odd_case(seed, tmp_path)
    matches, judge = match_detections(path, found), by_hand(path, found)
    assert compute_weighted_ap(matches, np.ones((7, 1)))[0] == pytest.approx(judge.stats[0], abs=1e-12)
    everything = [e for e in judge.evalImgs if e and e["aRng"] == [0, 1e10]]
    expected = {}
    for e in everything:
        taken = e["dtMatches"] > 0
        place = (e["image_id"] - 1, e["category_id"] - 1)
        expected[place] = (taken & ~e["dtIgnore"].astype(bool), e["dtIgnore"].astype(bool), sum(e["gtIgnore"] == 0))
    for image, category in np.ndindex(7, 4):
        own = (matches.image == image) & (matches.category == category)
        hit, ignored, wanted = expected.get((image, category), (np.zeros((10, 0)), np.zeros((10, 0)), 0))
        assert np.array_equal(matches.hit[own].T, hit)
        assert np.array_equal(matches.ignored[own].T, ignored)
        assert matches.objects[image, category] == wanted
    assert np.array_equal(found[matches.row, 0] - 1, matches.image)
