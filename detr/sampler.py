"""The order of samples."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


class TrainSampler(Sampler[list[tuple[int, int]]]):
    """Micro-batches of keys (epoch, index) of one process, for a whole training.

    An epoch is a shuffle keyed by (seed, epoch) without its last, incomplete batch. A global batch is a run of it, cut
    into `micro_batches` runs of `micro_batch` images; the m-th goes to process m modulo `num_processes`. So what passes
    through the model together is the same for any number of processes. `first_step` counts over all epochs.

    With a `window`, images of like shapes go together: that many images of the shuffle, rounded to batches, are cut
    into micro-batches by `view_sizes(epoch)` [N, 2], the (height, width) of each image in that epoch. Of every run of
    like micro-batches each step gets one, drawn at random, so batches have all shapes; and those of a step stand so
    that every process has about as many pixels.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        micro_batch: int,
        epochs: int,
        seed: int,
        rank: int,
        num_processes: int,
        first_step: int = 0,
        window: int = 0,
        view_sizes: Callable[[int], np.ndarray] | None = None,
    ) -> None:
        if batch_size % micro_batch:
            raise ValueError(
                f"train.batch_size is {batch_size}, not divisible by train.micro_batch {micro_batch}; "
                f"use a multiple of {micro_batch}"
            )
        if num_samples < batch_size:
            raise ValueError(f"train.batch_size is {batch_size}, but there are only {num_samples} training images")
        self.micro_batches = batch_size // micro_batch
        if num_processes > self.micro_batches:
            remedy = f"lower train.micro_batch to {batch_size // num_processes} or less"
            if num_processes > batch_size:
                remedy = f"raise train.batch_size to {num_processes} or more, or start fewer processes"
            raise ValueError(
                f"train.batch_size {batch_size} in micro-batches of {micro_batch} feeds {self.micro_batches} "
                f"processes, not {num_processes}; {remedy}"
            )
        self.num_samples, self.batch_size, self.micro_batch, self.epochs = num_samples, batch_size, micro_batch, epochs
        self.seed, self.rank, self.num_processes, self.first_step = seed, rank, num_processes, first_step
        self.view_sizes = view_sizes if window else None
        self.window_size = max(1, window // batch_size) * batch_size

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.batch_size

    @property
    def share(self) -> int:
        """The number of micro-batches of this process in every step."""
        return len(range(self.rank, self.micro_batches, self.num_processes))

    def __len__(self) -> int:
        return (self.epochs * self.steps_per_epoch - self.first_step) * self.share

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first_epoch, skipped = divmod(self.first_step, self.steps_per_epoch)
        for epoch in range(first_epoch, self.epochs):
            passes = self._epoch(epoch)
            for step in range(skipped, self.steps_per_epoch):
                for index in range(self.rank, self.micro_batches, self.num_processes):
                    yield [(epoch, image) for image in passes[step * self.micro_batches + index].tolist()]
            skipped = 0

    def _epoch(self, epoch: int) -> np.ndarray:
        """The images of every micro-batch of the epoch [steps * micro_batches, micro_batch], in their order."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.num_samples, generator=generator)[: self.steps_per_epoch * self.batch_size].numpy()
        if self.view_sizes is None:
            return order.reshape(-1, self.micro_batch)
        sizes_hw = self.view_sizes(epoch)
        grouped = []
        for window in np.split(order, range(self.window_size, len(order), self.window_size)):
            parts = np.stack(group_alike(window, sizes_hw, self.micro_batch)).reshape(
                self.micro_batches, -1, self.micro_batch
            )
            turns = torch.rand(parts.shape[:2], generator=generator).argsort(1).numpy()  # [micro_batches, steps]
            grouped.append(np.take_along_axis(parts, turns[:, :, None], axis=1).swapaxes(0, 1))
        steps = np.concatenate(grouped)  # [steps, micro_batches, micro_batch]
        places = np.argsort(sizes_hw[steps].max(2).prod(2), axis=1, kind="stable")  # [steps, micro_batches], by pixels
        half = self.micro_batches // 2
        places[:, half:] = places[:, half:][:, ::-1]  # the smallest meets the largest, however many processes deal
        return np.take_along_axis(steps, places[:, :, None], axis=1).reshape(-1, self.micro_batch)


def group_alike(images: np.ndarray, sizes_hw: np.ndarray, micro_batch: int) -> list[np.ndarray]:
    """The `images` [n] in parts of `micro_batch`: halved across the side in which they differ most, and so on."""
    if len(images) <= micro_batch:
        return [images]
    sizes = sizes_hw[images]  # [n, 2]
    side = np.argmax(sizes.max(0) / sizes.min(0))
    images = images[np.argsort(sizes[:, side], kind="stable")]
    half = len(images) // micro_batch // 2 * micro_batch
    return [*group_alike(images[:half], sizes_hw, micro_batch), *group_alike(images[half:], sizes_hw, micro_batch)]
