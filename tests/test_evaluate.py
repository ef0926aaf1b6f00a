import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr.coco import CocoDataset, ImageArchive, load_annotations
from detr.distributed import Process
from detr.evaluate import METRICS, ap_per_class, batches_of_one_size, coco_metrics, detect, detect_all
from detr.model import build_model
from detr.postprocess import postprocess
from tests.conftest import TINY_MODEL

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def truth(tmp_path):
    """Annotations of six images with small, medium and large objects, a crowd, and an image without any."""
    rng = np.random.default_rng(0)
    annotations = []
    for image_id in (11, 4, 25, 9, 30):
        for k in range(6):
            side = (20, 60, 150)[k % 3]
            box = [float(v) for v in (*rng.integers(0, 300, 2), side, side + 5)]
            crowd = int(k == 5 and image_id == 25)
            category_id = (3, 44, 90)[int(rng.integers(3))]
            annotations.append(
                {
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": crowd,
                }
            )
    document = {
        "images": [{"id": k, "width": 500, "height": 500, "file_name": f"{k}.jpg"} for k in (11, 4, 25, 9, 30, 7)],
        "categories": [{"id": k, "name": str(k)} for k in (44, 3, 90, 17)],
        "annotations": [{"id": k, **a} for k, a in enumerate(annotations, start=1)],
    }
    (tmp_path / "truth.json").write_text(json.dumps(document))
    return tmp_path / "truth.json"


def perfect(path):
    return [
        {key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for a in json.loads(path.read_text())["annotations"]
        if not a["iscrowd"]
    ]


def noisy(path):
    """Shifted, doubled, mislabelled and invented detections of various scores."""
    rng = np.random.default_rng(1)
    found = []
    for row in perfect(path) * 2:
        box = [round(float(v), 2) for v in np.array(row["bbox"]) + rng.normal(0, 4, 4)]
        category_id = row["category_id"] if rng.random() < 0.8 else 17
        found.append(row | {"bbox": box, "category_id": category_id, "score": round(float(rng.random()), 6)})
    return [*found, {"image_id": 7, "category_id": 3, "bbox": [1.0, 2.0, 30.0, 40.0], "score": 0.5}]


def by_hand(path, detections, category_ids=None):
    truth = COCO(str(path))
    truth.dataset["info"] = {}
    judge = COCOeval(truth, truth.loadRes([dict(row) for row in detections]), "bbox")
    if category_ids:
        judge.params.catIds = category_ids
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return judge


def test_without_detections_everything_is_missed(truth):
    metrics, precision = coco_metrics(truth, [])
    assert set(metrics.values()) == {0.0}
    assert ap_per_class(precision) == [(0.0, 0.0), (-1.0, -1.0), (0.0, 0.0), (0.0, 0.0)]


def test_perfect_detections_have_an_ap_of_one(truth):
    metrics, precision = coco_metrics(truth, perfect(truth))
    assert list(metrics) == list(METRICS)
    assert {name for name, value in metrics.items() if value != pytest.approx(1.0)} <= {"AR_1"}
    assert [pair == pytest.approx((1, 1)) for pair in ap_per_class(precision)] == [True, False, True, True]


def test_figures_equal_pycocotools_by_hand(truth, capsys):
    metrics, precision = coco_metrics(truth, noisy(truth))
    printed = capsys.readouterr().out
    judge = by_hand(truth, noisy(truth))
    assert printed == ""
    assert list(metrics.values()) == judge.stats.tolist()
    assert 0.1 < metrics["AP"] < 0.9
    assert np.array_equal(precision, judge.eval["precision"])
    for category_id, (ap, ap50) in zip((3, 17, 44, 90), ap_per_class(precision), strict=True):
        stats = by_hand(truth, noisy(truth), [category_id]).stats
        assert (ap, ap50) == pytest.approx((stats[0], stats[1]))


def test_the_order_of_detections_changes_nothing(truth):
    expected = coco_metrics(truth, noisy(truth))[0]
    assert coco_metrics(truth, noisy(truth)[::-1])[0] == pytest.approx(expected)


def test_detections_in_images_that_do_not_exist_are_refused(truth):
    with pytest.raises(AssertionError, match="Results do not correspond to current coco set"):
        coco_metrics(truth, [{"image_id": 12345, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 0.5}])


@pytest.fixture
def dataset(drawn):
    """Images of several sizes."""
    annotations = load_annotations(drawn / "instances_val.json")
    sizes = [(50 + 7 * (k % 3), 64 - 9 * (k % 2)) for k in range(len(annotations.image_ids))]

    def cut(image, boxes, labels, key):
        height, width = sizes[key[1]]
        return image[:, :height, :width], boxes, labels

    return CocoDataset(replace(annotations, sizes_hw=np.array(sizes)), ImageArchive(drawn / "val.zip"), cut)


@pytest.fixture
def model(dataset):
    torch.manual_seed(0)
    return build_model(TINY_MODEL, len(dataset.annotations.category_ids))


def test_detections_are_the_models_in_coco_form(model, dataset):
    model.train()
    batches = list(detect(model, dataset, [[6, 0], [7]], 1, CPU))
    assert [len(rows) for rows in batches] == [10, 5]
    assert model.training
    rows = [row for batch in batches for row in batch]
    ids = dataset.annotations.image_ids
    assert [row["image_id"] for row in rows] == [int(ids[k]) for k in (6, 0, 7) for _ in range(5)]
    image = dataset[0, 0].image[None]
    model.eval()
    normal = (image / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    with torch.no_grad():
        logits, boxes = model(normal)
    scores, labels, corners = (x[0] for x in postprocess(logits, boxes, torch.tensor([dataset[0, 0].original_size_hw])))
    for row, score, label, (left, top, right, bottom) in zip(
        rows[5:10], scores.tolist(), labels.tolist(), corners.tolist(), strict=True
    ):
        assert row["category_id"] == dataset.annotations.category_ids[label]
        assert row["score"] == pytest.approx(score, abs=1e-5)
        assert row["bbox"] == pytest.approx([left, top, right - left, bottom - top], abs=0.01)
    json.dumps(rows)


def test_no_images_give_no_detections(model, dataset):
    assert list(detect(model, dataset, [], 1, CPU)) == []


@pytest.mark.parametrize("config", ["group", "frozen", "batch"])
@pytest.mark.parametrize("batch_size", [1, 2, 100])
@pytest.mark.parametrize("multiple", [1, 48])
def test_the_size_of_batches_changes_no_detection(dataset, batch_size, multiple, config):
    torch.manual_seed(0)
    model = build_model(replace(TINY_MODEL, backbone_norm=config), len(dataset.annotations.category_ids)).eval()
    expected = [
        row for rows in detect(model, dataset, [[k] for k in range(len(dataset))], multiple, CPU) for row in rows
    ]
    found = detect_all(model, dataset, batch_size, multiple, Process(0, 1, CPU))
    assert [row["image_id"] for row in found] == np.repeat(dataset.annotations.image_ids, 5).tolist()
    for row, other in zip(found, expected, strict=True):
        assert row["category_id"] == other["category_id"]
        assert row["score"] == pytest.approx(other["score"], abs=1e-5)
        assert row["bbox"] == pytest.approx(other["bbox"], abs=0.02)


@pytest.mark.parametrize("num_images", [0, 1, 12])
def test_every_image_is_in_one_batch_of_its_size(num_images):
    sizes = [(64 + 7 * (k % 3), 96 - 9 * (k % 2)) for k in range(num_images)]
    batches = batches_of_one_size(sizes, 2)
    assert sorted(index for batch in batches for index in batch) == list(range(num_images))
    assert all(1 <= len(batch) <= 2 and len({sizes[index] for index in batch}) == 1 for batch in batches)


def test_progress_counts_every_image(model, dataset):
    counts = []
    detect_all(model, dataset, 3, 1, Process(0, 1, CPU), counts.append)
    assert sum(counts) == len(dataset)


def test_detections_of_a_model_can_be_judged(model, dataset, drawn):
    metrics, _ = coco_metrics(drawn / "instances_val.json", detect_all(model, dataset, 4, 1, Process(0, 1, CPU)))
    assert 0 <= metrics["AP"] < 0.5
