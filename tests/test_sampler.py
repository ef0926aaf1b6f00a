import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detr.sampler import EpochSampler


def epoch_of(num_samples, batch_size, num_processes, epoch=0, step=0, seed=0):
    """Global batches: the shares of all processes, in the order of ranks."""
    samplers = [EpochSampler(num_samples, batch_size, seed, rank, num_processes) for rank in range(num_processes)]
    for sampler in samplers:
        sampler.start(epoch, step)
    shares = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(share) for share in shares]
    return [[key for part in parts for key in part] for parts in zip(*shares, strict=True)]


@settings(deadline=None, derandomize=True, database=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 60), st.integers(0, 3))
def test_the_order_is_the_same_for_any_number_of_processes(num_processes, share, extra, epoch):
    batch_size = num_processes * share
    num_samples = batch_size + extra
    batches = epoch_of(num_samples, batch_size, num_processes, epoch)
    assert batches == epoch_of(num_samples, batch_size, 1, epoch)
    assert len(batches) == num_samples // batch_size
    assert all(len(batch) == batch_size for batch in batches)
    keys = [key for batch in batches for key in batch]
    assert len(set(keys)) == len(keys)
    assert all(key[0] == epoch and 0 <= key[1] < num_samples for key in keys)


def test_a_sampler_goes_on_where_it_is_told_to():
    whole = epoch_of(50, 8, 2, epoch=3)
    for step in range(len(whole) + 1):
        assert epoch_of(50, 8, 2, epoch=3, step=step) == whole[step:]


def test_epochs_and_seeds_shuffle_differently_and_repeatably():
    orders = {
        (seed, epoch): tuple(key[1] for batch in epoch_of(32, 8, 1, epoch, seed=seed) for key in batch)
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    }
    assert len(set(orders.values())) == 6
    assert all(sorted(order) == list(range(32)) for order in orders.values())
    assert orders[1, 2] == tuple(key[1] for batch in epoch_of(32, 8, 4, 2, seed=1) for key in batch)


def test_every_sample_is_seen_in_the_long_run():
    seen = {key[1] for epoch in range(20) for batch in epoch_of(11, 4, 2, epoch) for key in batch}
    assert seen == set(range(11))


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(ValueError, match="train.batch_size is 10, not divisible by 4 processes; use a multiple of 4"):
        EpochSampler(100, 10, 0, 0, 4)


@pytest.mark.parametrize("num_samples", [0, 7])
def test_a_batch_larger_than_the_data_is_refused(num_samples):
    with pytest.raises(ValueError, match=f"train.batch_size is 8, but there are only {num_samples} training images"):
        EpochSampler(num_samples, 8, 0, 0, 1)
