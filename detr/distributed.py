"""What this process is among its peers, as torchrun tells it."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class PeerLostError(RuntimeError):
    """The connection to another process has ended; why is that one's own error."""


@contextmanager
def name_lost_peer() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^\[\S+\] ", "", str(error).partition("\n")[0]).partition(". This is")[0]
        raise PeerLostError(
            f"the connection to another process is lost ({reason}); see the output of the other hosts"
        ) from error


@dataclass(frozen=True)
class Process:
    """rank of num_processes, and the device that this one computes on. The methods raise PeerLostError."""

    rank: int
    num_processes: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, value: Tensor) -> Tensor:
        """The sum of `value` over all processes, in place; every process must call it."""
        if self.num_processes > 1:
            with name_lost_peer():
                dist.all_reduce(value)
        return value

    def broadcast(self, value: Any) -> Any:
        """The main process's picklable `value`, in every process."""
        if self.num_processes == 1:
            return value
        values = [value]
        with name_lost_peer():
            dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def all_gather(self, value: Any) -> list[Any]:
        """Every process's picklable `value`, in the order of ranks."""
        if self.num_processes == 1:
            return [value]
        values: list[Any] = [None] * self.num_processes
        with name_lost_peer():
            dist.all_gather_object(values, value)
        return values


def read_num_threads() -> int:
    """OMP_NUM_THREADS, of which a list is legal: for each level of nesting one; 1 where it is not set."""
    text = os.environ.get("OMP_NUM_THREADS") or "1"
    first = text.partition(",")[0].strip()
    if not first.isdecimal() or not int(first):
        raise ValueError(f"OMP_NUM_THREADS is {text!r}, expected a number of threads, 1 or more")
    return int(first)


@contextmanager
def join_process_group() -> Iterator[Process]:
    """Joins the process group that torchrun's environment names, NCCL on GPUs and gloo on CPUs, and leaves it.

    Without torchrun it is a group of one. On a CPU each process computes with OMP_NUM_THREADS threads,
    one unless set: a second thread speeds a small model up by nothing and changes the bits.
    """
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(read_num_threads())
    if num_processes > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    try:
        yield Process(int(os.environ.get("RANK", "0")), num_processes, device)
    finally:
        if num_processes > 1:
            dist.destroy_process_group()
