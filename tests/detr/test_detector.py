"""One call that asks a trained model about a picture answers as evaluation does."""

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from detr import Detector
from detr.checkpoint import load_model
from detr.coco import CocoDataset, load_annotations
from detr.detect import detect_each
from detr.detector import Detections
from detr.images import open_images
from detr.pixels import decode_pixels
from detr.transforms import EvalTransform
from tests import registered

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(drawn, tmp_path_factory):
    return registered.write_model(tmp_path_factory.mktemp("trained"), registered.categories(drawn))


@pytest.fixture(scope="module")
def detector(folder):
    return Detector.load(folder)


def evaluated(folder, drawn, size_multiple=None):
    """What evaluation finds in each validation picture [Q, 7]."""
    model, _, size = load_model(folder)
    record = load_annotations(drawn / "instances_val.json")
    dataset = CocoDataset(record, open_images(drawn / "val.zip"), EvalTransform(size.short, size.max_size))
    return [rows[0] for rows in detect_each(model, dataset, range(12), size_multiple or size.size_multiple, CPU)]


def as_rows(found: Detections):
    return np.concatenate([found.boxes_xyxy, found.scores[:, None]], axis=1)


def test_detections_are_those_of_the_evaluation_by_falling_score(detector, folder, drawn):
    ids = [category.id for category in detector.categories]
    for data, rows in zip(registered.pictures(drawn), evaluated(folder, drawn), strict=True):
        found = detector(data, threshold=0.0)
        rows = rows[np.argsort(-rows[:, 5], kind="stable")]
        rows[:, 3:5] += rows[:, 1:3]
        np.testing.assert_allclose(as_rows(found), rows[:, 1:6], atol=0.02)
        assert [ids[label] for label in found.labels] == rows[:, 6].tolist()
        assert found.names == tuple(detector.categories[label].name for label in found.labels)


def test_the_padding_that_the_model_was_trained_with_matters(folder, drawn):
    pairs = zip(evaluated(folder, drawn), evaluated(folder, drawn, size_multiple=50), strict=True)
    assert any(np.abs(mine[:, 5] - other[:, 5]).max() > 1e-3 for mine, other in pairs)


def test_a_path_its_bytes_and_its_pixels_have_one_answer(detector, drawn, tmp_path):
    data = registered.pictures(drawn)[0]
    path = tmp_path / "picture.jpg"
    path.write_bytes(data)
    pixels = decode_pixels(data)
    pixels.flags.writeable = False
    answers = [as_rows(detector(given, 0.0)) for given in (path, str(path), data, pixels)]
    assert all(np.array_equal(answers[0], answer) for answer in answers)


def test_the_threshold_keeps_the_surest(detector, drawn):
    data = registered.pictures(drawn)[1]
    every, some = detector(data, 0.0), detector(data, float(np.median(detector(data, 0.0).scores)))
    assert 0 < len(some.scores) < len(every.scores)
    assert np.array_equal(as_rows(some), as_rows(every)[: len(some.scores)])
    assert detector(data).names == detector(data, 0.5).names
    nothing = detector(data, 1.0)
    assert (nothing.boxes_xyxy.shape, nothing.names) == ((0, 4), ())


def test_what_is_no_picture_is_told(detector, tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, "WEBP")
    (tmp_path / "a.webp").write_bytes(file.getvalue())
    for given, message in (
        (tmp_path / "a.webp", f"{tmp_path}/a.webp is a WEBP picture, expected a JPEG or PNG; convert it"),
        (file.getvalue(), "it is a WEBP picture, expected a JPEG or PNG; convert it"),
        (np.zeros((3, 9, 9), np.uint8), "it is uint8 of shape (3, 9, 9), expected uint8 of (h, w, 3)"),
        (np.zeros((9, 9, 3)), "it is float64 of shape (9, 9, 3), expected uint8 of (h, w, 3)"),
        (np.zeros((0, 9, 3), np.uint8), "it is uint8 of shape (0, 9, 3), expected uint8 of (h, w, 3)"),
        (np.zeros((9, 9), np.uint8), "it is uint8 of shape (9, 9), expected uint8 of (h, w, 3)"),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            detector(given)
    with pytest.raises(FileNotFoundError, match="nothing"):
        detector(tmp_path / "nothing.jpg")


def test_a_picture_of_any_shape_is_answered(detector):
    for height, width in ((1, 1), (1, 20_000), (20_000, 1), (20_000, 3)):
        found = detector(np.zeros((height, width, 3), np.uint8), threshold=0.0)
        assert len(found.scores) > 0
        assert (found.boxes_xyxy[:, 2:] <= [width, height]).all()
