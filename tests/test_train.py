import math
import os
import resource
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from detr.checkpoint import load_state, save_state
from detr.coco import CocoDataset, ImageArchive, load_annotations
from detr.diagnosis import NotFiniteError, first_non_finite
from detr.distributed import Process
from detr.model import build_model
from detr.train import _sampler, build_optimizer, compiled, fit, learning_rate_factor
from detr.transforms import TrainTransform, TransformConfig
from tests.conftest import TINY_MODEL, TINY_TRAIN

CPU = Process(0, 1, torch.device("cpu"))
TINY = replace(TINY_MODEL, dropout=0.1)
CONFIG = replace(
    TINY_TRAIN,
    seed=3,
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


def rows_of(reports):
    return [report.row for report in reports if report.row]


def undisturbed(dataset, config=CONFIG):
    model = new_model()
    return rows_of(fit(model, dataset, config, CPU)), model.state_dict()


@pytest.fixture(scope="module")
def reference(drawn):
    """Rows and weights of a training that nothing disturbs."""
    annotations = load_annotations(drawn / "instances_train.json")
    transform = TrainTransform(CONFIG.transform, CONFIG.seed)
    return undisturbed(CocoDataset(annotations, ImageArchive(drawn / "train.zip"), transform))


def assert_same_bits(weights, expected):
    assert weights.keys() == expected.keys()
    assert [key for key in weights if not torch.equal(weights[key], expected[key])] == []


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
    message = rf"not finite; .*; images \d+(, \d+){{3}}, first in {layer}; at step 1 of epoch 0$"
    with pytest.raises(FloatingPointError, match=message):
        list(fit(model, dataset, CONFIG, CPU))
    assert not any(module._forward_hooks for module in model.modules())


def test_images_that_are_not_finite_are_told_from_layers():
    images = torch.full((1, 3, 64, 64), torch.nan)
    assert first_non_finite(new_model(), images, None) == "input"


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


@pytest.mark.parametrize(("change", "processes"), [({"max_skipped": 1}, 1), ({"batch_size": 12}, 2)])
def test_batch_norm_refuses_what_its_statistics_cannot_do(dataset, change, processes):
    sampler = partial(_sampler, dataset, new_model(config=replace(TINY, backbone_norm="batch")))
    with pytest.raises(ValueError, match="model.backbone_norm is batch: its statistics need"):
        sampler(replace(CONFIG, **change), Process(0, processes, CPU.device), 0)


def test_memory_that_runs_out_names_the_size_and_what_to_lower(dataset):
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
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
    """Whoever reads the sixth picture dies."""

    def __getitem__(self, key):
        if key[1] == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(key)


def test_a_loader_process_that_dies_is_named_with_its_image(dataset, monkeypatch):
    monkeypatch.setenv("DETR_WORKERS", "1")
    deadly = Deadly(dataset.annotations, dataset.archive, dataset.transform)
    image_id = int(dataset.annotations.image_ids[5])
    with pytest.raises(
        RuntimeError, match=rf"a loader process died at image {image_id} \(.*\); if memory ran out, lower DETR"
    ):
        list(fit(new_model(), deadly, CONFIG, CPU))


def test_one_compiled_graph_serves_all_shapes_though_the_first_is_square(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    runner = compiled(new_model(config=TINY_MODEL))
    for batch, height, width in ((3, 96, 96), (4, 64, 96), (2, 96, 64), (3, 96, 96)):
        runner(torch.rand(batch, 3, height, width), torch.zeros(batch, height, width, dtype=torch.bool))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_one_compiled_graph_serves_all_shapes(dataset, monkeypatch):
    """Without the last stage, whose C++ takes minutes to build."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, expected = new_model(config=TINY_MODEL), new_model(config=TINY_MODEL)
    config = replace(CONFIG, log_steps=1)
    rows = rows_of(fit(model, dataset, replace(config, compile=True), CPU))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch._dynamo.utils.counters["graph_break"] == {}
    for row, other in zip(rows, rows_of(fit(expected, dataset, config, CPU)), strict=True):
        assert row == pytest.approx(other, rel=1e-3)
    assert model.state_dict().keys() == expected.state_dict().keys()


def test_deterministic_algorithms_are_on_when_asked_for(dataset, reference):
    try:
        rows, weights = undisturbed(dataset, replace(CONFIG, deterministic=True))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert rows == reference[0]
    assert_same_bits(weights, reference[1])


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
        ({"micro_batch": 0}, "train.micro_batch is 0, expected at least 1"),
        ({"max_skipped": -1}, "train.max_skipped is -1, expected a number that is not negative"),
        ({"ema_decay": 1.0}, "train.ema_decay is 1.0, expected a fraction"),
        ({"keep": "first"}, r"train.keep is 'first', expected one of \['last', 'best'\]"),
        ({"keep": "best"}, "train.keep is 'best', which needs train.evaluate_epochs of 1 or more"),
        ({"patience": 2}, "train.patience is 2, which needs train.evaluate_epochs of 1 or more"),
    ],
)
def test_impossible_trainings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


@pytest.mark.parametrize("batch_size", [28, 1000])
def test_a_batch_larger_than_the_data_is_refused(dataset, batch_size):
    with pytest.raises(ValueError, match=f"train.batch_size is {batch_size}, but there are only 24 training images"):
        next(fit(new_model(), dataset, replace(CONFIG, batch_size=batch_size), CPU))


def test_half_precision_trains_with_float32_weights_and_losses(dataset):
    rows = {}
    for precision in ("bfloat16", "float32"):
        model = new_model()
        (rows[precision], *_) = rows_of(fit(model, dataset, replace(CONFIG, precision=precision, epochs=1), CPU))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert rows["bfloat16"]["loss"] != rows["float32"]["loss"]
    assert rows["bfloat16"]["loss"] == pytest.approx(rows["float32"]["loss"], rel=0.05)
