"""Locks between processes, which die with their process."""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def hold_lock(path: Path, say: Callable[[str], None] | None = None, seconds: float = -1) -> Iterator[None]:
    """Holds the lock of the file `path`, which names the process that holds it.

    Where another process has it, `say(that process)` is called once before waiting, at most `seconds` unless negative.
    Raises TimeoutError, whose text is that process, when the time is over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = read_holder(path)
        if say:
            say(holder)
        try:
            lock.acquire(timeout=seconds)
        except Timeout:
            raise TimeoutError(holder) from None
    try:
        path.write_text(f"process {os.getpid()} on {platform.node()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def read_holder(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() or "that just begins"


def is_held(path: Path) -> bool:
    """Returns whether a process holds the lock of the file `path`."""
    lock = FileLock(path, fallback_to_soft=False)
    if not path.is_file():
        return False
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False
