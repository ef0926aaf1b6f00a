"""Batches from worker processes, ahead of the step that takes them, on its device."""

import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from detr.batch import Batch, Sample, collate
from detr.coco import CocoDataset

DEATH_SECONDS = 10.0  # until Linux has told of the end of a worker whose connection has ended


class _Watched(Dataset[Sample]):
    """A dataset that notes in shared memory what each worker is reading: rows (pid, image id) [W, 2]."""

    def __init__(self, dataset: CocoDataset, num_workers: int) -> None:
        self.dataset = dataset
        self.reading = torch.zeros(num_workers, 2, dtype=torch.int64).share_memory_()

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        if worker := get_worker_info():
            image_id = int(self.dataset.annotations.image_ids[key[1]])
            self.reading[worker.id] = torch.tensor([os.getpid(), image_id])
        return self.dataset[key]


class Loader:
    """The padded batches of keys (epoch, index), on `device`.

    DETR_WORKERS processes read ahead, by default this process's share of the CPU cores with a GPU, and none without.
    They leave signals to their parent.
    """

    def __init__(
        self,
        dataset: CocoDataset,
        batches: Sequence[list[tuple[int, int]]] | Sampler[list[tuple[int, int]]],
        size_multiple: int,
        device: torch.device,
    ) -> None:
        on_gpu = device.type == "cuda"
        share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        asked = os.environ.get("DETR_WORKERS") or str(share if on_gpu else 0)
        if not asked.isdecimal():
            raise ValueError(f"DETR_WORKERS is {asked!r}, expected a number of loader processes, 0 or more")
        num_workers = int(asked)
        self.device = device
        self.watched = _Watched(dataset, num_workers)
        self.loader: DataLoader[Any] = DataLoader(
            self.watched,
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=partial(collate, size_multiple=size_multiple),
            pin_memory=on_gpu,
            worker_init_fn=_leave_signals_to_the_parent,
        )

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        try:
            for batch in batches:
                yield batch.to(self.device)
        except (ConnectionError, EOFError):  # of a worker that died, which torch tells of a moment later
            raise
        except Exception:
            if isinstance(batches, _MultiProcessingDataLoaderIter):
                batches._shutdown_workers()  # collected later, with the traceback, they would stay, and heed no signal
            raise

    @contextmanager
    def explain_deaths(self) -> Iterator[None]:
        """Names the image at which a worker died: torch raises RuntimeError for that wherever its parent just is.

        Where a batch was on its way, the connection that ends is an error of its own before that.
        """
        try:
            try:
                yield
            except (ConnectionError, EOFError):
                time.sleep(DEATH_SECONDS)  # which torch interrupts
                raise
        except RuntimeError as error:
            died = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))
            if died is None:
                raise
            pids = {int(pid) for pid in died[1].split(",")}
            images = [str(image_id) for pid, image_id in self.watched.reading.tolist() if pid in pids]
            reason = str(error).splitlines()[0].strip()
            raise RuntimeError(
                f"a loader process died at image {', '.join(images) or 'unknown'} ({reason}); "
                "if memory ran out, lower DETR_WORKERS"
            ) from error


def _leave_signals_to_the_parent(worker: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
