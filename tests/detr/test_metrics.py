"""COCO's numbers are pycocotools', figure by figure; what limits an AP is found where it was put."""

import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.numpy import load_file

from detr.bootstrap import match_detections
from detr.metrics import (
    METRICS,
    average_per_class,
    compute_coco_metrics,
    count_confusions,
    evaluate_detections,
    from_results,
    measure_errors,
    read_precision,
    to_results,
)
from tests.running import ROOT

PUBLISHED = (
    0.504581, 0.696973, 0.572982, 0.585626, 0.519400, 0.501398, 0.386813, 0.593680, 0.595353, 0.639811, 0.566421, 0.564291
)  # fmt: skip


def write_truth(path, image_ids, category_ids, rows):
    """A COCO file of rows (image id, x, y, width, height, area, crowd, category id)."""
    keys = ("image_id", "x", "y", "w", "h", "area", "iscrowd", "category_id")
    annotations = []
    for number, row in enumerate(rows, start=1):
        a = dict(zip(keys, row, strict=True))
        annotations.append(
            {
                "id": number,
                "image_id": int(a["image_id"]),
                "category_id": int(a["category_id"]),
                "bbox": [float(a[key]) for key in "xywh"],
                "area": float(a["area"]),
                "iscrowd": int(a["iscrowd"]),
            }
        )
    document = {
        "info": {},
        "images": [{"id": int(k), "width": 640, "height": 640, "file_name": f"{k}.jpg"} for k in image_ids],
        "categories": [{"id": int(k), "name": f"c{k}"} for k in category_ids],
        "annotations": annotations,
    }
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def published(folder):
    """COCO's own example: objects of 100 images of val2014 (CC BY 4.0, cocodataset.org) and detections of them."""
    held = load_file(ROOT / "tests/golden/coco-eval.safetensors")
    return write_truth(
        folder / "published.json", held["image_ids"], held["category_ids"], held["truth"].tolist()
    ), held["detections"]


@pytest.fixture
def truth(tmp_path):
    """Six images with small, medium and large objects, a crowd, an image without any, a category without any."""
    rng = np.random.default_rng(0)
    rows = []
    for image_id in (11, 4, 25, 9, 30):
        for k in range(6):
            side = (20, 60, 150)[k % 3]
            x, y = rng.integers(0, 300, 2)
            category_id = (3, 44, 90)[int(rng.integers(3))]
            rows.append((image_id, x, y, side, side + 5, side * (side + 5), k == 5 and image_id == 25, category_id))
    return write_truth(tmp_path / "truth.json", (11, 4, 25, 9, 30, 7), (44, 3, 90, 17), rows)


def perfect(path):
    objects = [a for a in json.loads(path.read_text(encoding="utf-8"))["annotations"] if not a["iscrowd"]]
    return from_results([a | {"score": 0.9} for a in objects])


def noisy(path, seed=1):
    """Shifted, doubled, mislabelled and invented detections of various scores."""
    rng = np.random.default_rng(seed)
    rows = np.repeat(perfect(path), 2, axis=0)
    rows[:, 1:5] = (rows[:, 1:5] + rng.normal(0, 4, (len(rows), 4))).round(2)
    rows[:, 6] = np.where(rng.random(len(rows)) < 0.8, rows[:, 6], 17)
    rows[:, 5] = rng.random(len(rows)).round(6)
    return np.concatenate([rows, [[7, 1.0, 2.0, 30.0, 40.0, 0.5, 3]]])


def by_hand(path, detections, category_ids=None):
    truth = COCO(str(path))
    judge = COCOeval(truth, truth.loadRes(to_results(detections)), "bbox")
    if category_ids:
        judge.params.catIds = category_ids
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return judge


def test_the_published_result_is_reached(tmp_path):
    metrics = compute_coco_metrics(*published(tmp_path))
    assert tuple(metrics) == METRICS
    assert tuple(round(value, 6) for value in metrics.values()) == PUBLISHED


def test_without_detections_everything_is_missed(truth):
    judge = evaluate_detections(truth, np.zeros((0, 7)))
    assert set(judge.stats) == {0.0}
    zeros, absent = (0.0, 0.0, 0.0, 0.0, 0.0), (-1.0, -1.0, -1.0, -1.0, -1.0)
    assert [per[:2] for per in average_per_class(read_precision(judge))] == [
        zeros[:2],
        absent[:2],
        zeros[:2],
        zeros[:2],
    ]


def test_perfect_detections_have_an_ap_of_one(truth):
    metrics = compute_coco_metrics(truth, perfect(truth))
    assert {name for name, value in metrics.items() if value != pytest.approx(1.0)} <= {"AR_1"}


@pytest.mark.parametrize("seed", range(5))
def test_every_figure_is_that_of_pycocotools(truth, capsys, seed):
    detections = noisy(truth, seed)
    judge = evaluate_detections(truth, detections)
    assert capsys.readouterr().out == ""
    expected = by_hand(truth, detections)
    assert judge.stats.tolist() == expected.stats.tolist()
    assert 0.1 < judge.stats[0] < 0.9
    assert np.array_equal(read_precision(judge), expected.eval["precision"])
    for category_id, per_class in zip((3, 17, 44, 90), average_per_class(read_precision(judge)), strict=True):
        stats = by_hand(truth, detections, [category_id]).stats
        assert per_class == pytest.approx((stats[1], stats[0], *stats[3:6]))


def test_the_precision_of_the_published_detections_is_that_of_pycocotools(tmp_path):
    truth, detections = published(tmp_path)
    assert np.array_equal(
        read_precision(evaluate_detections(truth, detections)), by_hand(truth, detections).eval["precision"]
    )


def test_the_order_of_detections_changes_nothing(truth):
    assert compute_coco_metrics(truth, noisy(truth)[::-1]) == compute_coco_metrics(truth, noisy(truth))


def test_detections_in_images_that_do_not_exist_are_refused(truth):
    with pytest.raises(ValueError, match=r"detections are of image ids \[12345\], not in .*truth.json"):
        compute_coco_metrics(truth, np.array([[12345, 0, 0, 1, 1, 0.5, 3]]))


OBJECTS = [(k, 100 * k, 50, 80, 80, 6400, 0, 3 if k < 3 else 44) for k in range(6)]  # one in each of six images


def seen(change):
    """A right detection of every object, but for the one in image 0."""
    rows = np.array([(k, x, y, w, h, 0.9, category) for k, x, y, w, h, _, _, category in OBJECTS], dtype=float)
    return change(rows)


def without_first(rows):
    return rows[1:]


def other_category(rows):
    rows[0, 6] = 44
    return rows


def shifted(rows):
    rows[0, 1] += 40  # IoU 1/3
    return rows


def shifted_other_category(rows):
    return other_category(shifted(rows))


def doubled(rows):
    return np.concatenate([rows, rows[:1] * [1, 1, 1, 1, 1, 1.05, 1]])


def invented(rows):
    return np.concatenate([rows, [[0, 400, 400, 50, 50, 0.95, 3]]])


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (without_first, "missed"),
        (other_category, "classification"),
        (shifted, "localisation"),
        (shifted_other_category, "classification and localisation"),
        (doubled, "duplicates"),
        (invented, "background"),
    ],
)
def test_an_error_is_found_under_its_name(tmp_path, change, kind):
    truth = write_truth(tmp_path / "truth.json", range(6), (3, 44), OBJECTS)
    judge = evaluate_detections(truth, seen(change))
    found = measure_errors(judge)
    assert {name for name, (_, count) in found.items() if count} - {"missed"} <= {kind}
    gain, count = found[kind]
    assert count == 1
    assert gain > 0 or kind == "classification and localisation"  # mending it leaves the object missed
    assert judge.stats[1] < 1


def test_confusions_are_counted_from_true_to_detected(tmp_path):
    truth = write_truth(tmp_path / "truth.json", range(6), (3, 44), OBJECTS)
    assert count_confusions(evaluate_detections(truth, seen(other_category))).tolist() == [
        [2, 1, 0],
        [0, 3, 0],
        [0, 0, 0],
    ]
    assert count_confusions(evaluate_detections(truth, seen(without_first))).tolist() == [
        [2, 0, 1],
        [0, 3, 0],
        [0, 0, 0],
    ]
    assert count_confusions(evaluate_detections(truth, seen(invented))).tolist() == [[3, 0, 0], [0, 3, 0], [1, 0, 0]]


def confusion_by_hand(rows, found, num_categories):
    """Every detection, best first, takes the object of its image that it overlaps most, of any category, from 0.5 on."""
    counts = np.zeros((num_categories + 1, num_categories + 1), dtype=int)
    free = [row for row in rows if not row[6]]
    for image_id, x, y, w, h, _, category in sorted(found.tolist(), key=lambda row: -row[5]):
        overlaps = []
        for row in free:
            wide, high = min(x + w, row[1] + row[3]) - max(x, row[1]), min(y + h, row[2] + row[4]) - max(y, row[2])
            shared = max(0, wide) * max(0, high) * (row[0] == image_id)
            overlaps.append(shared / (w * h + row[3] * row[4] - shared))
        true = num_categories
        if overlaps and max(overlaps) >= 0.5:
            true = free.pop(int(np.argmax(overlaps)))[7] - 1
        counts[true, int(category) - 1] += 1
    for row in free:
        counts[row[7] - 1, num_categories] += 1
    return counts.tolist()


@pytest.mark.parametrize("seed", range(8))
def test_confusions_and_kinds_of_errors_are_those_of_a_naive_count(tmp_path, seed):
    """Of detections off crowds; of an error on them, TIDE's kinds together are COCO's false positives."""
    rng = np.random.default_rng(seed)
    rows, found = [], []
    for image_id in (1, 2, 3):
        for _ in range(int(rng.integers(0, 7))):
            box = [float(v) for v in (*rng.uniform(0, 120, 2), *rng.uniform(20, 90, 2))]
            rows.append((image_id, *box, box[2] * box[3], rng.random() < 0.2, int(rng.integers(1, 4))))
            for _ in range(int(rng.integers(0, 3))):
                near = np.array(box) + rng.normal(0, 4, 4)
                found.append([image_id, *near, rng.random(), rng.integers(1, 4)])
    truth, found = write_truth(tmp_path / "truth.json", (1, 2, 3), (1, 2, 3), rows), np.array(found)
    matches = match_detections(truth, found)
    on_crowds = matches.row[matches.ignored[:, 0]]
    judged = np.delete(found, on_crowds, axis=0)
    assert count_confusions(evaluate_detections(truth, judged)).tolist() == confusion_by_hand(rows, judged, 3)
    kinds = measure_errors(evaluate_detections(truth, found))
    wrong = int((~matches.hit & ~matches.ignored)[:, 0].sum())
    assert sum(count for kind, (_, count) in kinds.items() if kind != "missed") == wrong
    assert kinds["missed"][1] <= matches.objects.sum() - matches.hit[:, 0].sum()
