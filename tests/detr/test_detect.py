import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from detr.checkpoint import build_model
from detr.coco import CocoDataset, ImageArchive, load_annotations
from detr.detect import PIXEL_DECIMALS, SCORE_DECIMALS, detect_all, detect_each
from detr.distributed import Process
from detr.metrics import compute_coco_metrics, from_results, to_results
from detr.postprocess import postprocess
from tests.detr.test_metrics import published
from tests.projects import TINY_MODEL

CPU = torch.device("cpu")


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
    images = list(detect_each(model, dataset, [6, 0, 7], 1, CPU))
    assert [found.shape for found in images] == [(1, 5, 7)] * 3
    assert model.training
    ids = dataset.annotations.image_ids
    assert [found[0, 0, 0] for found in images] == [ids[k] for k in (6, 0, 7)]
    image = dataset[0, 0].image[None]
    model.eval()
    normal = (image / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    with torch.no_grad():
        logits, boxes = model(normal)
    scores, labels, corners = (x[0] for x in postprocess(logits, boxes, torch.tensor([dataset[0, 0].original_size_hw])))
    results = to_results(images[1][0])
    for row, score, label, (left, top, right, bottom) in zip(
        results, scores.tolist(), labels.tolist(), corners.tolist(), strict=True
    ):
        assert row["category_id"] == dataset.annotations.category_ids[label]
        assert row["score"] == pytest.approx(score, abs=1e-6)
        assert row["bbox"] == pytest.approx([left, top, right - left, bottom - top], abs=1e-4)
    assert np.array_equal(from_results(json.loads(json.dumps(results))), images[1][0])


def test_rounding_moves_no_number_that_one_would_see(tmp_path):
    """Of float32 detections of COCO's own example, most of them a little beside where they were."""
    path, found = published(tmp_path)
    moved = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        exact = found.copy()
        exact[:, 1:5] += rng.normal(0, 0.01, (len(found), 4)) * found[:, [3, 4, 3, 4]]
        exact[:, 5] = (found[:, 5] + rng.normal(0, 1e-3, len(found))).clip(0, 1)
        exact[:, 1:6] = exact[:, 1:6].astype(np.float32)
        rounded = exact.copy()
        rounded[:, 1:5] = rounded[:, 1:5].round(PIXEL_DECIMALS)
        rounded[:, 5] = rounded[:, 5].round(SCORE_DECIMALS)
        numbers = [np.array(list(compute_coco_metrics(path, rows).values())) for rows in (exact, rounded)]
        moved.append(np.abs(numbers[0] - numbers[1]).max())
    assert max(moved) < 1e-4


def test_every_decoder_layer_has_its_detections(model, dataset):
    every = detect_all(model, dataset, 1, Process(0, 1, CPU), every_layer=True)
    assert every.shape == (2, 60, 7)
    assert np.array_equal(every[-1], detect_all(model, dataset, 1, Process(0, 1, CPU))[0])
    assert not np.array_equal(every[0], every[1])
    assert np.array_equal(every[..., 0], np.tile(np.repeat(dataset.annotations.image_ids, 5), (2, 1)))


@pytest.mark.parametrize("every_layer", [False, True])
def test_no_images_give_no_detections(model, dataset, every_layer):
    nothing = replace(dataset.annotations, image_ids=np.zeros(0, dtype=np.int64))
    empty = CocoDataset(nothing, dataset.archive, dataset.transform)
    assert detect_all(model, empty, 1, Process(0, 1, CPU), every_layer=every_layer).shape == (1 + every_layer, 0, 7)
    assert to_results(np.zeros((0, 7))) == []
    assert from_results([]).shape == (0, 7)


@pytest.mark.parametrize("config", ["group", "frozen"])
@pytest.mark.parametrize("multiple", [1, 48])
def test_the_number_of_processes_changes_no_bit(dataset, multiple, config):
    torch.manual_seed(0)
    model = build_model(replace(TINY_MODEL, backbone_norm=config), len(dataset.annotations.category_ids)).eval()
    expected = detect_all(model, dataset, multiple, Process(0, 1, CPU))
    for num_processes in (2, 5, 20):
        parts = [
            list(detect_each(model, dataset, range(rank, len(dataset), num_processes), multiple, CPU))
            for rank in range(num_processes)
        ]
        for rank in range(num_processes):

            class Joined(Process):
                """One of several processes, whose peers have answered already."""

                def all_gather(self, value, parts=parts, rank=rank):
                    assert all(map(np.array_equal, value, parts[rank]))
                    return parts

            assert np.array_equal(detect_all(model, dataset, multiple, Joined(rank, num_processes, CPU)), expected)


def test_progress_counts_every_image(model, dataset):
    counts = []
    detect_all(model, dataset, 1, Process(0, 1, CPU), counts.append)
    assert sum(counts) == len(dataset)


def test_detections_of_a_model_can_be_judged(model, dataset, drawn):
    metrics = compute_coco_metrics(drawn / "instances_val.json", detect_all(model, dataset, 1, Process(0, 1, CPU))[-1])
    assert 0 <= metrics["AP"] < 0.5
