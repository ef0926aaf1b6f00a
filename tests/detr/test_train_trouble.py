"""Trouble in a training is named with its step, images and layer: numbers that are not finite, labels, memory, loaders."""

import gc
import math
import multiprocessing
import os
import re
import resource
import signal
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from detr.checkpoint import build_model
from detr.coco import CocoDataset
from detr.diagnosis import NotFiniteError, find_first_non_finite
from detr.optimizer import learning_rate_factor
from detr.train import build_sampler, fit
from detr.transforms import TrainTransform, TransformConfig
from pipelines.stage import explain
from tests.damage import png
from tests.detr.trainings import (
    CONFIG,
    CPU,
    TINY,
    dataset_of,
    new_model,
    rows_of,
    without_objects,
)


@pytest.fixture
def dataset(drawn):
    return dataset_of(drawn)


@pytest.mark.parametrize("objects", [True, False])
@pytest.mark.parametrize(
    "layer",
    ["backbone.layer2.0.conv1", "transformer.encoder.layers.0.linear2", "transformer.decoder.norm", "class_embed"],
)
def test_predictions_that_are_not_finite_name_step_images_and_layer(dataset, objects, layer):
    dataset = dataset if objects else without_objects(dataset)
    model = new_model()
    next(model.get_submodule(layer).parameters()).data.view(-1)[0] = torch.nan
    message = rf"not finite; .*; images \d+(, \d+){{3}}, first in {layer}; at step 1 of epoch 0$"
    with pytest.raises(FloatingPointError, match=message):
        list(fit(model, dataset, CONFIG, CPU))
    assert not any(module._forward_hooks for module in model.modules())


def test_images_that_are_not_finite_are_told_from_layers():
    images = torch.full((1, 3, 64, 64), torch.nan)
    assert find_first_non_finite(new_model(), images, None) == "input"


def test_labels_that_the_model_lacks_name_step_and_images(dataset):
    torch.manual_seed(0)
    model = build_model(TINY, 1)
    message = r"has label \d, the model's are 0..0; .*; at step 1, images \d+(, \d+){3}"
    with pytest.raises(ValueError, match=message):
        list(fit(model, dataset, CONFIG, CPU))


def test_a_learning_rate_that_is_far_too_high_is_an_error_with_evidence_not_a_model(dataset):
    config = replace(CONFIG, lr=1e30, lr_backbone=1e30, warmup_steps=0)
    model = new_model()
    with pytest.raises(NotFiniteError, match=r"lower train\.lr") as error:
        list(fit(model, dataset, config, CPU))
    evidence = error.value.evidence
    step = evidence["state"]["step"]
    assert len(evidence["image_ids"]) == 8
    assert f"at step {step + 1} of epoch 0" in str(error.value)
    assert evidence["gradient_norms"].keys() == {name for name, _ in model.named_parameters()}
    assert evidence["measured"].keys() >= {"loss", "loss_giou", "grad_norm"}


def poison(model, where, bad_steps):
    """Makes predictions or gradients of the steps (from 0, two micro-batches each) not a number."""
    calls = iter(range(1000))

    def spoil(value):
        return value * torch.nan if next(calls) // 2 in bad_steps else value

    if where == "prediction":
        return model.bbox_embed.register_forward_hook(lambda module, inputs, output: spoil(output))
    return model.input_proj.weight.register_hook(spoil)


def test_single_bad_steps_are_left_out_and_counted_when_the_parameter_says_so(dataset):
    config = replace(CONFIG, max_skipped=2, log_steps=1)
    model = new_model()
    poison(model, "gradient", {1, 4})
    rows = rows_of(fit(model, dataset, config, CPU))
    assert [row["skipped"] for row in rows] == [0, 1, 1, 1, 2, 2, 2, 2, 2]
    assert [math.isnan(row["loss"]) for row in rows] == [False, True, False, False, True] + [False] * 4
    assert [row["lr"] for row in rows] == [CONFIG.lr * learning_rate_factor(step, 3, CONFIG) for step in range(9)]
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize("where", ["prediction", "gradient"])
def test_one_bad_step_too_many_ends_the_training_with_evidence(dataset, where):
    model = new_model()
    poison(model, where, {1, 2})
    reports = fit(model, dataset, replace(CONFIG, max_skipped=1), CPU)
    with pytest.raises(NotFiniteError, match=r"images \d+(, \d+)+.*; at step 3 of epoch 0") as error:
        list(reports)
    evidence = error.value.evidence
    assert (evidence["state"]["step"], evidence["state"]["skipped"]) == (2, 1)
    assert len(evidence["image_ids"]) == 8
    assert evidence["gradient_norms"].keys() == {name for name, _ in model.named_parameters()}
    bad = {name for name, norm in evidence["gradient_norms"].items() if not math.isfinite(norm)}
    assert bad == ({"input_proj.weight"} if where == "gradient" else set())


def test_memory_that_runs_out_names_the_size_and_what_to_lower(dataset):
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    large = TransformConfig((3000,), 3000, flip=0.0, crop=0.0, crop_scales=(), crop_range=(0, 0))
    dataset = CocoDataset(dataset.annotations, dataset.archive, TrainTransform(large, 0))
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**30, before[1]))
    message = "out of memory with 4 images padded to 3008x3008 .* lower train.micro_batch, which is 4"
    try:
        with pytest.raises(RuntimeError, match=message):
            list(fit(new_model(), dataset, CONFIG, CPU))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Deadly(CocoDataset):
    """Whoever reads picture number `deadly` dies."""

    def __getitem__(self, key):
        if key[1] == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(key)


@pytest.fixture
def _no_garbage_collection():
    """Torch tells of a dead loader wherever this process just is: in a callback of the collector it would be lost."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_garbage_collection")
@pytest.mark.parametrize("number", [0, 1, 2], ids=["no batch is on its way", "one is", "two are"])
def test_a_loader_process_that_dies_is_named_with_its_image(dataset, monkeypatch, number):
    monkeypatch.setenv("DETR_WORKERS", "1")
    dataset = Deadly(dataset.annotations, dataset.archive, dataset.transform)
    micro_batch = list(build_sampler(dataset, CONFIG, CPU, 0))[number]
    dataset.deadly = micro_batch[2][1]
    image_id = int(dataset.annotations.image_ids[dataset.deadly])
    with pytest.raises(
        RuntimeError, match=rf"a loader process died at image {image_id} \(.*\); if memory ran out, lower DETR"
    ):
        list(fit(new_model(), dataset, CONFIG, CPU))


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_damaged_picture_is_named_in_one_line(source, monkeypatch, workers):
    monkeypatch.setenv("DETR_WORKERS", workers)
    with zipfile.ZipFile(source / "train.zip") as archive:
        names = archive.namelist()
    with zipfile.ZipFile(source / "train.zip", "w") as archive:
        for name in names:
            archive.writestr(name, png(96, 96, 8, 2)[:-13] + b"\0" + png(96, 96, 8, 2)[-12:])
    with pytest.raises(ValueError, match="IDAT") as error:
        list(fit(new_model(), dataset_of(source), CONFIG, CPU))
    assert re.fullmatch(r"\S+\.jpg is damaged: the checksum of its chunk IDAT is wrong", explain(error.value))
    assert not multiprocessing.active_children()
