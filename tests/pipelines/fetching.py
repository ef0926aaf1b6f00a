"""A process that fetches from a bad line, and what it fetches."""

import hashlib
import random
import threading
from pathlib import Path

from pipelines.data.fetch import Remote, ask_sizes, claim, fetch_all
from pipelines.data.part import Part
from pipelines.progress import Progress

CONTENT = random.Random(0).randbytes(10_000)
OTHER = random.Random(1).randbytes(9_000)
SUM = hashlib.sha256(CONTENT).hexdigest()


def get(folder: Path, *addresses: str, sha256: str = "", keep: bool = False) -> bytes:
    """What a process that fetches one file has at the end. With `keep` it fails later and leaves its files."""
    remote = Remote(addresses, sha256)
    try:
        with claim([remote], folder):
            data = fetch_all([remote], folder, ask_sizes([remote]))[remote.url].read_bytes()
            if keep:
                raise InterruptedError
            return data
    except InterruptedError:
        return data


def kept(folder: Path) -> list[str]:
    """The endings of the files that are there."""
    return sorted(path.suffix for path in folder.iterdir())


def part_in(folder: Path) -> Part:
    return Part(folder / "a.part", Progress(None, "a", 1, "B"), threading.Event())
