from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detr.sampler import TrainSampler
from detr.transforms import TrainTransform
from tests.detr.test_transforms import PAPER

SIZES_HW = ((480, 640), (640, 480), (427, 640), (500, 375), (333, 500), (640, 640), (320, 640))


def drawn_sizes(num_samples, epoch):
    return np.random.default_rng(epoch).integers(40, 200, (num_samples, 2))


def paper_sizes(num_samples, epoch):
    sizes_hw = np.array([SIZES_HW[index % len(SIZES_HW)] for index in range(num_samples)])
    return TrainTransform(PAPER, seed=0).view_sizes(sizes_hw, epoch)


def samplers_of(
    num_samples, batch_size, micro_batch, num_processes=1, *, epochs=1, seed=0, step=0, window=0, sizes=None
):
    view_sizes = partial(sizes or drawn_sizes, num_samples)
    return [
        TrainSampler(num_samples, batch_size, micro_batch, epochs, seed, rank, num_processes, step, window, view_sizes)
        for rank in range(num_processes)
    ]


def steps_of(*arguments, **options):
    """Of every step its micro-batches in the order of their numbers, dealt back from all processes."""
    samplers = samplers_of(*arguments, **options)
    passes = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(own) for own in passes]
    sources = [iter(own) for own in passes]
    micro_batches = samplers[0].micro_batches
    assert sum(sampler.share for sampler in samplers) == micro_batches
    return [
        [next(sources[number % len(samplers)]) for number in range(micro_batches)]
        for _ in range(sum(map(len, passes)) // micro_batches)
    ]


def images_of(steps):
    return [index for step in steps for micro_batch in step for _, index in micro_batch]


@st.composite
def trainings(draw):
    micro_batch, micro_batches = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    batch_size = micro_batch * micro_batches
    num_samples = batch_size * draw(st.integers(1, 4)) + draw(st.integers(0, batch_size - 1))
    options = {"epochs": draw(st.integers(1, 3)), "seed": draw(st.integers(0, 9)), "window": draw(st.integers(0, 40))}
    return num_samples, batch_size, micro_batch, options


@settings(deadline=None, derandomize=True, database=None)
@given(trainings(), st.integers(1, 6))
def test_any_number_of_processes_computes_the_same_micro_batches(training, num_processes):
    num_samples, batch_size, micro_batch, options = training
    alone = steps_of(num_samples, batch_size, micro_batch, **options)
    num_processes = min(num_processes, batch_size // micro_batch)
    assert steps_of(num_samples, batch_size, micro_batch, num_processes, **options) == alone


@settings(deadline=None, derandomize=True, database=None)
@given(trainings())
def test_an_epoch_has_every_image_once_but_for_an_incomplete_last_batch(training):
    num_samples, batch_size, micro_batch, options = training
    steps = steps_of(num_samples, batch_size, micro_batch, **options)
    steps_per_epoch = num_samples // batch_size
    assert len(steps) == options["epochs"] * steps_per_epoch
    for epoch in range(options["epochs"]):
        own = steps[epoch * steps_per_epoch : (epoch + 1) * steps_per_epoch]
        assert {len(part) for step in own for part in step} == {micro_batch}
        assert {key[0] for step in own for part in step for key in part} == {epoch}
        images = images_of(own)
        assert len(set(images)) == len(images) == steps_per_epoch * batch_size
        assert set(images) <= set(range(num_samples))


@settings(deadline=None, derandomize=True, database=None)
@given(trainings(), st.data())
def test_a_sampler_goes_on_from_any_step(training, data):
    num_samples, batch_size, micro_batch, options = training
    steps = steps_of(num_samples, batch_size, micro_batch, **options)
    step = data.draw(st.integers(0, len(steps)))
    num_processes = data.draw(st.integers(1, batch_size // micro_batch))
    assert steps_of(num_samples, batch_size, micro_batch, num_processes, step=step, **options) == steps[step:]


@settings(deadline=None, derandomize=True, database=None)
@given(trainings())
def test_grouping_moves_images_within_their_window_only(training):
    num_samples, batch_size, micro_batch, options = training
    grouped = images_of(steps_of(num_samples, batch_size, micro_batch, **options))
    shuffled = images_of(steps_of(num_samples, batch_size, micro_batch, **options | {"window": 0}))
    run = max(1, options["window"] // batch_size) * batch_size
    epoch = num_samples // batch_size * batch_size
    for start in range(0, len(shuffled), epoch):
        for first in range(start, start + epoch, run):
            part = slice(first, min(first + run, start + epoch))
            assert set(grouped[part]) == set(shuffled[part])


def padding_ratio(steps, sizes_hw):
    sizes = sizes_hw[np.array(images_of(steps)).reshape(-1, len(steps[0][0]))]
    return (sizes.max(1).prod(1) * sizes.shape[1]).sum() / sizes.prod(2).sum()


@pytest.mark.parametrize(("micro_batch", "most"), [(4, 1.06), (8, 1.12)])
def test_grouping_saves_most_of_the_padding_of_the_papers_views(micro_batch, most):
    sizes_hw = paper_sizes(2048, 0)
    options = {"sizes": paper_sizes}
    assert padding_ratio(steps_of(2048, 64, micro_batch, **options), sizes_hw) > 1.4
    assert 1 <= padding_ratio(steps_of(2048, 64, micro_batch, window=512, **options), sizes_hw) < most


@pytest.mark.parametrize("window", [64, 512])
def test_batches_of_groups_are_as_mixed_as_those_of_the_shuffle(window):
    log_pixels = np.log(paper_sizes(8192, 0).prod(1))

    def spread_of_batches(window):
        images = images_of(steps_of(8192, 64, 4, sizes=paper_sizes, window=window))
        return log_pixels[images].reshape(-1, 64).mean(1).std()

    assert spread_of_batches(window) <= 1.001 * spread_of_batches(0)


@pytest.mark.parametrize("num_processes", [2, 4, 8])
def test_grouping_gives_processes_about_as_many_pixels(num_processes):
    sizes_hw = paper_sizes(2048, 0)

    def of_the_busiest(window):
        steps = steps_of(2048, 64, 4, sizes=paper_sizes, window=window)
        padded = sizes_hw[np.array(images_of(steps)).reshape(-1, 16, 4)].max(2).prod(2)  # [steps, micro-batches]
        each = np.stack([padded[:, rank::num_processes].sum(1) for rank in range(num_processes)])
        return each.max(0).sum() / each.mean(0).sum()

    assert of_the_busiest(512) < 1 + (of_the_busiest(0) - 1) / 2


def test_epochs_and_seeds_shuffle_differently_and_repeatably():
    for window in (0, 16):
        orders = [
            tuple(images_of(steps_of(32, 8, 4, epochs=3, seed=seed, window=window)[start : start + 4]))
            for seed in (0, 1)
            for start in (0, 4, 8)
        ]
        assert len(set(orders)) == 6
        assert all(sorted(order) == list(range(32)) for order in orders)
        assert orders[5] == tuple(images_of(steps_of(32, 8, 4, epochs=3, seed=1, window=window)[8:]))


@pytest.mark.parametrize("window", [0, 4, 11])
def test_every_image_is_seen_in_the_long_run(window):
    assert set(images_of(steps_of(11, 4, 2, epochs=20, window=window))) == set(range(11))


def test_an_uneven_deal_gives_some_processes_a_micro_batch_less():
    samplers = samplers_of(50, 20, 4, 3, epochs=2)
    assert [sampler.share for sampler in samplers] == [2, 2, 1]
    assert [len(sampler) for sampler in samplers] == [8, 8, 4]


def test_sizes_are_asked_for_when_their_epoch_comes():
    asked = []

    def view_sizes(epoch):
        asked.append(epoch)
        return drawn_sizes(16, epoch)

    keys = iter(TrainSampler(16, 8, 4, 3, 0, 0, 1, first_step=3, window=8, view_sizes=view_sizes))
    next(keys)
    assert asked == [1]
    assert len(list(keys)) == 5
    assert asked == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 10, 4, 1), "train.batch_size is 10, not divisible by train.micro_batch 4; use a multiple of 4"),
        ((0, 8, 8, 1), "train.batch_size is 8, but there are only 0 training images"),
        ((7, 8, 8, 1), "train.batch_size is 8, but there are only 7 training images"),
        (
            (100, 16, 8, 4),
            "train.batch_size 16 in micro-batches of 8 feeds 2 processes, not 4; lower train.micro_batch to 4 or less",
        ),
        (
            (100, 2, 1, 4),
            "train.batch_size 2 in micro-batches of 1 feeds 2 processes, not 4; "
            "raise train.batch_size to 4 or more, or start fewer processes",
        ),
    ],
)
def test_what_cannot_be_dealt_is_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        samplers_of(*arguments)
