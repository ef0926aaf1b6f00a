import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from detr.checkpoint import load_state, save_state
from detr.coco import CocoDataset, ImageArchive, load_annotations
from detr.distributed import Process
from detr.loss import LossConfig
from detr.matcher import MatcherConfig
from detr.model import build_model
from detr.train import TrainConfig, build_optimizer, first_non_finite, fit, learning_rate_factor
from detr.transforms import TrainTransform, TransformConfig
from tests.conftest import TINY_MODEL

CPU = Process(0, 1, torch.device("cpu"))
TINY = replace(TINY_MODEL, dropout=0.1)
CONFIG = TrainConfig(
    seed=3,
    initial_weights="none",
    epochs=3,
    batch_size=8,
    lr=1e-3,
    lr_backbone=1e-4,
    weight_decay=1e-4,
    schedule="cosine",
    lr_drop_epoch=0,
    warmup_steps=2,
    clip_norm=0.1,
    precision="float32",
    size_multiple=32,
    log_steps=2,
    evaluate_epochs=0,
    checkpoint_minutes=0.0,
    matcher=MatcherConfig(1.0, 5.0, 2.0),
    loss=LossConfig(1.0, 5.0, 2.0, 0.1, auxiliary=True),
    transform=TransformConfig((64, 80), 96, flip=0.5, crop=0.5, crop_scales=(80,), crop_range=(48, 80)),
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def dataset(drawn):
    annotations = load_annotations(drawn / "instances_train.json")
    return CocoDataset(annotations, ImageArchive(drawn / "train.zip"), TrainTransform(CONFIG.transform, CONFIG.seed))


def new_model(seed=0, config=TINY):
    torch.manual_seed(seed)
    return build_model(config, 8)


def undisturbed(dataset, config=CONFIG):
    model = new_model()
    return [report.row for report in fit(model, dataset, config, CPU)], model.state_dict()


@pytest.fixture(scope="module")
def reference(drawn):
    """Rows and weights of a training that nothing disturbs."""
    annotations = load_annotations(drawn / "instances_train.json")
    transform = TrainTransform(CONFIG.transform, CONFIG.seed)
    return undisturbed(CocoDataset(annotations, ImageArchive(drawn / "train.zip"), transform))


def assert_same_bits(weights, expected):
    assert weights.keys() == expected.keys()
    assert [key for key in weights if not torch.equal(weights[key], expected[key])] == []


def test_reports_come_every_log_steps_and_at_the_end_of_every_epoch(dataset):
    reports = list(fit(new_model(), dataset, CONFIG, CPU))
    assert [(r.epoch, r.step, r.epoch_done) for r in reports] == [
        (0, 2, False), (0, 3, True), (1, 4, False), (1, 6, True), (2, 8, False), (2, 9, True),
    ]  # fmt: skip
    assert {r.total_steps for r in reports} == {9}
    names = {"loss_class", "loss_box", "loss_giou", "cardinality_error"}
    expected = {"epoch", "step", "lr", "loss", "grad_norm", "class_error"} | names | {f"{n}_layer0" for n in names}
    for report in reports:
        assert report.row.keys() == expected
        assert all(math.isfinite(value) for value in report.row.values())
        assert report.images_per_second > 0
        last = learning_rate_factor(report.step - 1, 3, CONFIG)
        assert report.row["lr"] == CONFIG.lr * last
        parts = sum(
            report.row[name + layer] * weight
            for name, weight in (("loss_class", 1), ("loss_box", 5), ("loss_giou", 2))
            for layer in ("", "_layer0")
        )
        assert report.row["loss"] == pytest.approx(parts, rel=1e-4)


def test_training_lowers_the_loss(dataset):
    gentle = TransformConfig((64,), 64, flip=0.0, crop=0.0, crop_scales=(), crop_range=(0, 0))
    config = replace(CONFIG, epochs=10, log_steps=100, lr=2e-3, lr_backbone=2e-3, clip_norm=1.0, transform=gentle)
    dataset = CocoDataset(dataset.annotations, dataset.archive, TrainTransform(gentle, 0))
    losses = [report.row["loss"] for report in fit(new_model(), dataset, config, CPU)]
    assert losses[-1] < 0.9 * losses[0]


def test_two_runs_are_the_same_to_the_bit_and_another_seed_is_not(dataset, reference):
    rows, weights = reference
    torch.manual_seed(99)
    rows_again, weights_again = undisturbed(dataset)
    assert rows_again == rows
    assert_same_bits(weights_again, weights)
    assert undisturbed(dataset, replace(CONFIG, seed=4))[0] != rows


def test_worker_processes_change_nothing(dataset, monkeypatch):
    config = replace(CONFIG, epochs=1)
    expected = undisturbed(dataset, config)[0]
    monkeypatch.setenv("DETR_WORKERS", "2")
    assert undisturbed(dataset, config)[0] == expected


@pytest.mark.parametrize("stop", [2, 3, 8, 9])
def test_a_resumed_training_ends_in_the_same_bits(dataset, reference, tmp_path, stop):
    rows, weights = reference
    kept = []
    for report in fit(new_model(), dataset, CONFIG, CPU):
        kept.append(report.row)
        if report.step == stop:
            save_state(report.state(), tmp_path / "state")
            break
    other = new_model(seed=1)
    torch.rand(17)
    kept += [report.row for report in fit(other, dataset, CONFIG, CPU, load_state(tmp_path / "state"))]
    assert kept == rows
    assert_same_bits(other.state_dict(), weights)


def test_what_the_caller_does_between_reports_changes_nothing(dataset, reference):
    rows, weights = reference
    model, seen = new_model(), []
    for report in fit(model, dataset, CONFIG, CPU):
        seen.append(report.row)
        model.eval()
        torch.rand(5)
        report.state()
    assert seen == rows
    assert_same_bits(model.state_dict(), weights)


def test_log_steps_change_no_weight(dataset):
    config = replace(CONFIG, epochs=1)
    assert_same_bits(undisturbed(dataset, replace(config, log_steps=1))[1], undisturbed(dataset, config)[1])


def without_objects(dataset):
    record = dataset.annotations
    empty = replace(
        record, boxes_xyxy=record.boxes_xyxy[:0], labels=record.labels[:0], starts=np.zeros_like(record.starts)
    )
    return CocoDataset(empty, dataset.archive, dataset.transform)


def test_images_without_any_object_are_trained_on(dataset):
    rows, _ = undisturbed(without_objects(dataset), replace(CONFIG, epochs=1))
    assert all(row["loss_box"] == row["loss_giou"] == row["class_error"] == 0 < row["loss_class"] for row in rows)


@pytest.mark.parametrize("objects", [True, False])
@pytest.mark.parametrize(
    "layer",
    ["backbone.layer2.0.conv1", "transformer.encoder.layers.0.linear2", "transformer.decoder.norm", "class_embed"],
)
def test_predictions_that_are_not_finite_name_step_images_and_layer(dataset, objects, layer):
    dataset = dataset if objects else without_objects(dataset)
    model = new_model()
    next(model.get_submodule(layer).parameters()).data.view(-1)[0] = torch.nan
    message = rf"not finite; .* at step 1 of epoch 0, images \d+(, \d+){{7}}, first in {layer}$"
    with pytest.raises(FloatingPointError, match=message):
        list(fit(model, dataset, CONFIG, CPU))
    assert not any(module._forward_hooks for module in model.modules())


def test_images_that_are_not_finite_are_told_from_layers():
    images = torch.full((1, 3, 64, 64), torch.nan)
    assert first_non_finite(new_model(), images, None) == "input"


def test_labels_that_the_model_lacks_name_step_and_images(dataset):
    torch.manual_seed(0)
    model = build_model(TINY, 1)
    message = r"has label \d, the model's are 0..0; .*; at step 1 of epoch 0, images \d+(, \d+){7}"
    with pytest.raises(ValueError, match=message):
        list(fit(model, dataset, CONFIG, CPU))


def test_a_learning_rate_that_is_far_too_high_is_an_error_not_a_model(dataset):
    config = replace(CONFIG, lr=1e30, lr_backbone=1e30, warmup_steps=0)
    with pytest.raises(FloatingPointError, match=r"lower train\.lr"):
        list(fit(new_model(), dataset, config, CPU))


def test_backbone_and_transformer_have_learning_rates_of_their_own():
    model = new_model()
    model.backbone.conv1.requires_grad_(False)
    others, backbone = build_optimizer(model, CONFIG).param_groups
    assert (others["base_lr"], backbone["base_lr"]) == (CONFIG.lr, CONFIG.lr_backbone)
    assert others["weight_decay"] == backbone["weight_decay"] == CONFIG.weight_decay
    groups = [{id(p) for p in group["params"]} for group in (others, backbone)]
    frozen = id(model.backbone.conv1.weight)
    assert groups[1] == {id(p) for p in model.backbone.parameters()} - {frozen}
    assert groups[0] | groups[1] == {id(p) for p in model.parameters()} - {frozen}


def test_a_backbone_rate_of_zero_leaves_the_backbone_as_it_was(dataset):
    config = replace(CONFIG, epochs=1, lr_backbone=0.0)
    model = new_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    list(fit(model, dataset, config, CPU))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert not any(key.startswith("backbone.") for key in changed)
    assert {"class_embed.weight", "query_embed.weight", "input_proj.weight"} <= changed


def test_the_cosine_schedule_warms_up_and_falls_to_nothing():
    config = replace(CONFIG, warmup_steps=4, epochs=10)
    factors = [learning_rate_factor(step, 3, config) for step in range(30)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[4:] == sorted(set(factors[4:]), reverse=True)
    assert factors[17] == pytest.approx(0.5)
    assert 0 < factors[-1] < 0.01


@pytest.mark.parametrize("warmup_steps", [0, 1000])
def test_a_schedule_that_never_warms_up_or_never_ends_to_is_defined(warmup_steps):
    config = replace(CONFIG, warmup_steps=warmup_steps)
    assert all(0 < learning_rate_factor(step, 3, config) <= 1 for step in range(9))


def test_the_step_schedule_drops_once_to_a_tenth():
    config = replace(CONFIG, schedule="step", warmup_steps=2, epochs=4, lr_drop_epoch=3)
    assert [learning_rate_factor(step, 3, config) for step in range(12)] == [0.5] + [1.0] * 8 + [0.1] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "linear"}, r"train.schedule is 'linear', expected one of \['cosine', 'step'\]"),
        ({"precision": "float16"}, r"train.precision is 'float16', expected one of \['float32', 'bfloat16'\]"),
        ({"epochs": 0}, "train.epochs is 0, expected at least 1"),
        ({"batch_size": 0}, "train.batch_size is 0, expected at least 1"),
        ({"log_steps": 0}, "train.log_steps is 0, expected at least 1"),
        ({"lr": -1e-4}, "train.lr is -0.0001, expected a number that is not negative"),
        ({"clip_norm": math.nan}, "train.clip_norm is nan, expected a number"),
        ({"size_multiple": 0}, "train.size_multiple is 0, expected at least 1"),
    ],
)
def test_impossible_trainings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


@pytest.mark.parametrize("batch_size", [25, 1000])
def test_a_batch_larger_than_the_data_is_refused(dataset, batch_size):
    with pytest.raises(ValueError, match=f"train.batch_size is {batch_size}, but there are only 24 training images"):
        next(fit(new_model(), dataset, replace(CONFIG, batch_size=batch_size), CPU))


def test_half_precision_trains_with_float32_weights_and_losses(dataset):
    rows = {}
    for precision in ("bfloat16", "float32"):
        model = new_model()
        rows[precision] = next(fit(model, dataset, replace(CONFIG, precision=precision), CPU)).row
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert rows["bfloat16"]["loss"] != rows["float32"]["loss"]
    assert rows["bfloat16"]["loss"] == pytest.approx(rows["float32"]["loss"], rel=0.05)
