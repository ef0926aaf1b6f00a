"""The order of samples."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of keys (epoch, index) for one process, from a shuffle keyed by (seed, epoch).

    A global batch is a run of the shuffled order, and each process takes its equal share of it, so the
    order of samples is the same for any number of processes. The last, incomplete batch is dropped.
    `start(epoch, step)` sets where to begin, for an exact resume.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, rank: int, num_processes: int) -> None:
        if batch_size % num_processes:
            raise ValueError(
                f"train.batch_size is {batch_size}, not divisible by {num_processes} processes; "
                f"use a multiple of {num_processes}"
            )
        if num_samples < batch_size:
            raise ValueError(f"train.batch_size is {batch_size}, but there are only {num_samples} training images")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.share = rank, batch_size // num_processes
        self.epoch = self.first_step = 0

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.batch_size

    def start(self, epoch: int, step: int) -> None:
        self.epoch, self.first_step = epoch, step

    def __len__(self) -> int:
        return self.steps_per_epoch - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.num_samples, generator=generator).tolist()
        for step in range(self.first_step, self.steps_per_epoch):
            first = step * self.batch_size + self.rank * self.share
            yield [(self.epoch, index) for index in order[first : first + self.share]]
