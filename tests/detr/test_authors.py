"""Equality with the authors' code: recorded numbers always, the code itself where it is installed."""

import random

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import ks_2samp

from benchmarks import authors
from detr.batch import IMAGENET_STD, normalize
from detr.boxes import xyxy_to_cxcywh
from detr.train_config import TrainConfig
from detr.transforms import EvalTransform, apply_view, draw_view
from pipelines.params import from_document, merge_parameters
from tests import golden
from tests.running import ROOT

present = pytest.mark.skipif(
    not (authors.FOLDER / "models").is_dir(), reason="the authors' code is absent: python benchmarks/authors.py"
)


@pytest.mark.parametrize("dtype", golden.TOLERANCE, ids=str)
def test_equal_to_the_recorded_numbers(dtype):
    """The other variants, and the code itself, are in tests/slow/test_authors.py."""
    recorded = load_file(golden.FOLDER / "detr-r50.safetensors")
    golden.assert_equal(golden.digest(golden.ours("detr-r50", dtype)), recorded, dtype)


PAPER = from_document(merge_parameters(ROOT, "coco-detr-r50", []), "train", TrainConfig).transform


def our_view(index):
    """Size, boxes_cxcywh in fractions and labels of a view of the scene with given draws, with its pixels."""
    picture, boxes, labels = golden.scene(index)
    view = draw_view(random.Random(index), picture.shape[:2], PAPER)
    image, boxes, labels = apply_view(torch.from_numpy(picture).permute(2, 0, 1), boxes, labels, view)
    height, width = image.shape[1:]
    return image, xyxy_to_cxcywh(boxes) / torch.tensor([width, height, width, height]), labels


def test_equal_draws_give_the_authors_views():
    recorded = load_file(golden.FOLDER / "transforms.safetensors")
    views = [our_view(index) for index in range(golden.NUM_DRAWS)]
    assert [list(image.shape[1:]) for image, _, _ in views] == recorded["sizes"].tolist()
    assert [len(labels) for _, _, labels in views] == recorded["counts"].tolist()
    assert torch.equal(torch.cat([labels for _, _, labels in views]), recorded["labels"])
    torch.testing.assert_close(torch.cat([boxes for _, boxes, _ in views]), recorded["boxes"], rtol=1e-6, atol=1e-7)


def test_free_draws_have_the_authors_distribution():
    """Heights, widths and numbers of boxes that are left: two-sample Kolmogorov-Smirnov."""
    recorded = load_file(golden.FOLDER / "transforms.safetensors")["free"]
    rows = []
    for index in range(len(recorded)):
        size_hw, boxes, labels = golden.objects(index)
        view = draw_view(random.Random(f"free {index}"), size_hw, PAPER)
        _, _, labels = apply_view(torch.zeros(3, *size_hw, dtype=torch.uint8), boxes, labels, view)
        rows.append([*view.size_hw, len(labels)])
    for ours, theirs in zip(zip(*rows, strict=True), recorded.T.tolist(), strict=True):
        assert ks_2samp(ours, theirs).pvalue > 1e-3


def test_the_evaluation_image_is_the_authors():
    """Within one level of 255, which is how far two roundings of one resampling are apart."""
    picture, boxes, labels = golden.scene(0)
    image, _, _ = EvalTransform(800, 1333)(torch.from_numpy(picture).permute(2, 0, 1), boxes, labels)
    expected = load_file(golden.FOLDER / "transforms.safetensors")["evaluation"]
    assert (normalize(image[None]).flatten()[::97] - expected).abs().max() < 1.001 / 255 / min(IMAGENET_STD)


@present
def test_pixels_are_the_authors_but_for_the_second_resampling():
    for index in range(10):
        theirs, target = golden.their_transform("train", index, random.Random(index))
        image, boxes, labels = our_view(index)
        assert image.shape == theirs.shape
        assert torch.equal(labels, target["labels"])
        torch.testing.assert_close(boxes, target["boxes"], rtol=1e-6, atol=1e-7)
        difference = (normalize(image[None])[0] - theirs).abs() * min(IMAGENET_STD) * 255
        assert difference.mean() < 2  # levels of 255; a pixel of the original is up to 3 levels from the next
