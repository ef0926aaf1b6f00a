"""What a training is told: learning rates, their schedules, and what cannot be meant."""

import math
from dataclasses import replace

import pytest

from detr.optimizer import build_optimizer, learning_rate_factor
from detr.train import fit
from tests.detr.trainings import (
    CONFIG,
    CPU,
    dataset_of,
    new_model,
)


@pytest.fixture
def dataset(drawn):
    return dataset_of(drawn)


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
        ({"epochs": 0}, "train.epochs is 0, expected a number of at least 1"),
        ({"batch_size": 0}, "train.batch_size is 0, expected a number of at least 1"),
        ({"log_steps": 0}, "train.log_steps is 0, expected a number of at least 1"),
        ({"lr": -1e-4}, "train.lr is -0.0001, expected a number of at least 0"),
        ({"clip_norm": math.nan}, "train.clip_norm is nan, expected a finite number of at least 0"),
        ({"size_multiple": 0}, "train.size_multiple is 0, expected a number of at least 1"),
        ({"micro_batch": 0}, "train.micro_batch is 0, expected a number of at least 1"),
        ({"max_skipped": -1}, "train.max_skipped is -1, expected a number of at least 0"),
        ({"ema_decay": 1.0}, "train.ema_decay is 1.0, expected a number of at least 0 and below 1"),
        ({"keep": "first"}, r"train.keep is 'first', expected one of \['last', 'best'\]"),
        ({"keep": "best"}, "train.keep is 'best', which needs evaluations, and train.evaluate_epochs is 0"),
        ({"patience": 2}, "train.patience is 2, which needs evaluations, and train.evaluate_epochs is 0"),
        ({"keep": "best", "evaluate_epochs": 4}, "train.evaluate_epochs is 4; expected 1 to 3, train.epochs"),
        ({"batch_size": 2}, "train.batch_size is 2, expected a multiple of train.micro_batch, 4; lower"),
        ({"batch_size": 10}, "train.batch_size is 10, expected a multiple of train.micro_batch, 4; lower"),
        ({"schedule": "step"}, "train.lr_drop_epoch is 0 with train.schedule step, which would train at a tenth"),
        ({"seed": -1}, "train.seed is -1, expected a number of at least 0 and below 1099511627776"),
        ({"seed": 2**62}, "train.seed is 4611686018427387904, expected a number of at least 0 and below 1099511627776"),
    ],
)
def test_impossible_trainings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("matcher", {"box_cost": -1.0}, "train.matcher.box_cost is -1.0, expected a number of at least 0"),
        ("matcher", {"giou_cost": math.inf}, "train.matcher.giou_cost is inf, expected a finite number of at least 0"),
        ("matcher", {"class_cost": 0, "box_cost": 0, "giou_cost": 0}, "train.matcher has costs of 0 alone"),
        (
            "loss",
            {"no_object_weight": math.nan},
            "train.loss.no_object_weight is nan, expected a finite number of at least 0",
        ),
        ("loss", {"class_weight": 0, "box_weight": 0, "giou_weight": 0}, "train.loss has weights of 0 alone"),
    ],
)
def test_costs_and_weights_that_cannot_be_meant_are_refused(part, change, message):
    with pytest.raises(ValueError, match=message):
        replace(getattr(CONFIG, part), **change)


@pytest.mark.parametrize("batch_size", [28, 1000])
def test_a_batch_larger_than_the_data_is_refused(dataset, batch_size):
    with pytest.raises(ValueError, match=f"train.batch_size is {batch_size}, but there are only 24 training images"):
        next(fit(new_model(), dataset, replace(CONFIG, batch_size=batch_size), CPU))
