"""A training gives rows and weights that are the same to the bit, stopped and resumed or not."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from detr.checkpoint import load_state, save_state
from detr.coco import CocoDataset
from detr.optimizer import build_optimizer, flatten_gradients, learning_rate_factor
from detr.train import fit
from detr.transforms import TrainTransform, TransformConfig
from tests.detr.trainings import (
    CONFIG,
    CPU,
    TINY,
    assert_same_bits,
    dataset_of,
    new_model,
    rows_of,
    undisturbed,
    without_objects,
)


@pytest.fixture
def dataset(drawn):
    return dataset_of(drawn)


@pytest.fixture(scope="module")
def reference(drawn):
    """Rows and weights of a training that nothing disturbs."""
    return undisturbed(dataset_of(drawn))


def test_a_report_comes_at_the_start_and_after_every_step_and_rows_as_often_as_asked(dataset):
    reports = list(fit(new_model(), dataset, CONFIG, CPU))
    assert [(r.epoch, r.step, r.epoch_done) for r in reports] == [
        (0, 0, False), (0, 1, False), (0, 2, False), (0, 3, True), (1, 4, False), (1, 5, False), (1, 6, True),
        (2, 7, False), (2, 8, False), (2, 9, True),
    ]  # fmt: skip
    assert [r.step for r in reports if r.row] == [2, 3, 4, 6, 8, 9]
    assert {r.total_steps for r in reports} == {9}
    names = {"loss_class", "loss_box", "loss_giou", "cardinality_error"}
    expected = {"epoch", "step", "lr", "lr_backbone", "loss", "grad_norm", "class_error", "padding_ratio", "skipped"}
    expected |= names | {f"{name}_layer0" for name in names}
    for report in reports:
        if not report.row:
            continue
        assert report.row.keys() == expected
        assert all(math.isfinite(value) for value in report.row.values())
        assert report.images_per_second > 0
        assert 0 <= report.data_wait <= 1
        assert report.row["padding_ratio"] >= 1
        assert report.row["skipped"] == 0
        last = learning_rate_factor(report.step - 1, 3, CONFIG)
        assert (report.row["lr"], report.row["lr_backbone"]) == (CONFIG.lr * last, CONFIG.lr_backbone * last)
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
    losses = [row["loss"] for row in rows_of(fit(new_model(), dataset, config, CPU))]
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


@pytest.mark.parametrize("stop", range(10))
def test_a_training_resumed_after_any_step_ends_in_the_same_bits(dataset, reference, tmp_path, stop):
    rows, weights = reference
    kept = []
    for report in fit(new_model(), dataset, CONFIG, CPU):
        kept += rows_of([report])
        if report.step == stop:
            save_state(report.state(), tmp_path / "state")
            break
    other = new_model(seed=1)
    torch.rand(17)
    reports = list(fit(other, dataset, CONFIG, CPU, load_state(tmp_path / "state")))
    assert (reports[0].step, reports[0].row, reports[0].epoch_done) == (stop, None, stop in (3, 6, 9))
    assert kept + rows_of(reports) == rows
    assert_same_bits(other.state_dict(), weights)


def test_asked_to_stop_it_ends_after_the_step(dataset, reference):
    asked = iter([False, False, True])
    reports = list(fit(new_model(), dataset, CONFIG, CPU, stop=lambda: next(asked)))
    assert [(report.step, report.stopping) for report in reports] == [(0, False), (1, False), (2, False), (3, True)]
    assert rows_of(reports) == reference[0][:2]


def test_what_the_caller_does_between_reports_changes_nothing(dataset, reference):
    rows, weights = reference
    model, seen = new_model(), []
    for report in fit(model, dataset, CONFIG, CPU):
        seen += rows_of([report])
        model.eval()
        torch.rand(5)
        report.state()
    assert seen == rows
    assert_same_bits(model.state_dict(), weights)


def test_log_steps_change_no_weight(dataset):
    config = replace(CONFIG, epochs=1)
    assert_same_bits(undisturbed(dataset, replace(config, log_steps=1))[1], undisturbed(dataset, config)[1])


def test_images_without_any_object_are_trained_on(dataset):
    rows, _ = undisturbed(without_objects(dataset), replace(CONFIG, epochs=1))
    assert all(row["loss_box"] == row["loss_giou"] == 0 < row["loss_class"] for row in rows)
    assert all(math.isnan(row["class_error"]) for row in rows)


def test_steps_without_objects_do_not_count_in_the_class_error(dataset):
    record = without_objects(dataset).annotations
    starts = np.where(np.arange(len(record.starts)) > 5, 1, 0)  # image 5 has one
    one = replace(record, boxes_xyxy=np.array([[9, 9, 60, 60]], np.float32), labels=np.array([1]), starts=starts)
    some = CocoDataset(one, dataset.archive, dataset.transform)
    config = replace(CONFIG, epochs=1, transform=replace(CONFIG.transform, crop=0.0))
    errors = [row["class_error"] for row in undisturbed(some, replace(config, log_steps=1))[0]]
    assert [math.isnan(error) for error in errors].count(False) == 1 < len(errors)
    (row,) = undisturbed(some, replace(config, log_steps=100))[0]
    assert row["class_error"] in errors


def test_averaged_weights_are_what_the_report_shows_and_go_through_a_resume(dataset, tmp_path):
    config = replace(CONFIG, ema_decay=0.9)
    model, expected = new_model(), None
    for report in fit(model, dataset, config, CPU):
        now = {name: value.detach().clone() for name, value in model.state_dict().items()}
        if report.step == 1:
            expected = now
        elif report.step > 1:
            expected = {name: 0.9 * value + 0.1 * now[name] for name, value in expected.items()}
        if report.step == 4:
            save_state(report.state(), tmp_path / "state")
    shown = report.model.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(shown[name], value, rtol=1e-4, atol=1e-6)
    assert not torch.equal(shown["class_embed.weight"], model.class_embed.weight)
    *_, last = fit(new_model(seed=1), dataset, config, CPU, load_state(tmp_path / "state"))
    assert_same_bits(last.model.state_dict(), shown)
    plain = new_model()
    list(fit(plain, dataset, CONFIG, CPU))
    assert_same_bits(model.state_dict(), plain.state_dict())


def test_clipping_can_be_turned_off(dataset):
    weights = [undisturbed(dataset, replace(CONFIG, epochs=1, clip_norm=norm))[1] for norm in (0.0, 1e9, 0.1)]
    assert_same_bits(weights[0], weights[1])
    assert not torch.equal(weights[0]["class_embed.weight"], weights[2]["class_embed.weight"])


def test_deterministic_algorithms_are_on_when_asked_for(dataset, reference):
    try:
        rows, weights = undisturbed(dataset, replace(CONFIG, deterministic=True))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert rows == reference[0]
    assert_same_bits(weights, reference[1])


@pytest.mark.parametrize("norm", ["group", "frozen"])
def test_a_backbone_rate_of_zero_freezes_the_backbone(dataset, tmp_path, norm):
    """No gradient of it enters the norm that is clipped, the optimizer keeps nothing for it."""
    config = replace(CONFIG, epochs=1, lr_backbone=0.0, clip_norm=0.0, log_steps=1)
    model = new_model(config=replace(TINY, backbone_norm=norm))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for report in fit(model, dataset, config, CPU):
        if report.step == 1:
            others = [p.grad for name, p in model.named_parameters() if not name.startswith("backbone.")]
            norm_of_others = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in others]))
            assert report.row["grad_norm"] == pytest.approx(float(norm_of_others), rel=1e-5)
            assert all(p.grad is None for p in model.backbone.parameters())
            assert len(report.state()["optimizer"]["state"]) == len(others)
            save_state(report.state(), tmp_path / "state")
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert not any(key.startswith("backbone.") for key in changed)
    assert {"class_embed.weight", "query_embed.weight", "input_proj.weight"} <= changed
    resumed = new_model(seed=1, config=replace(TINY, backbone_norm=norm))
    list(fit(resumed, dataset, config, CPU, load_state(tmp_path / "state")))
    assert_same_bits(resumed.state_dict(), model.state_dict())


def test_a_gradient_that_is_no_longer_the_trainings_is_an_error_not_a_step(dataset):
    model = new_model()
    reports = fit(model, dataset, CONFIG, CPU)
    for _ in range(2):
        next(reports)
    model.zero_grad(set_to_none=False)
    next(reports)
    before = model.query_embed.weight.clone()
    model.zero_grad()
    with pytest.raises(RuntimeError, match=r"gradient of backbone\.conv1\.weight .* do not call zero_grad\(\)"):
        next(reports)
    assert torch.equal(model.query_embed.weight, before)


def test_an_optimizer_that_clears_its_gradients_detaches_them():
    model = new_model()
    optimizer, gradient = build_optimizer(model, CONFIG), flatten_gradients(model)
    sum(p.square().sum() for p in model.parameters()).backward()
    gradient.expect_attached()
    assert torch.equal(gradient.views[-1][2], 2 * gradient.views[-1][1])
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="does not lie in the flat gradient"):
        gradient.expect_attached()


def test_half_precision_trains_with_float32_weights_and_losses(dataset):
    rows = {}
    for precision in ("bfloat16", "float32"):
        model = new_model()
        (rows[precision], *_) = rows_of(fit(model, dataset, replace(CONFIG, precision=precision, epochs=1), CPU))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert rows["bfloat16"]["loss"] != rows["float32"]["loss"]
    assert rows["bfloat16"]["loss"] == pytest.approx(rows["float32"]["loss"], rel=0.05)
