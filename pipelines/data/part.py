"""A file that is on its way: what has come so far, and where it came from."""

import hashlib
import os
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from types import TracebackType

import msgspec

from pipelines.files import write_json
from pipelines.progress import Progress

BLOCK = 1 << 20


class Stopped(Exception):
    """Another file failed, or the person gave up."""


@dataclass(frozen=True)
class Origin:
    """What a server says of the file that it sends; empty where it says nothing."""

    size: int
    etag: str
    last_modified: str

    @property
    def validator(self) -> str:
        """For If-Range, or nothing: a weak ETag does not promise the same bytes."""
        return self.etag if self.etag.startswith('"') else self.last_modified

    def differs(self, other: "Origin") -> bool:
        return any(
            mine and theirs and mine != theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)
        )


UNKNOWN = Origin(0, "", "")


class Part:
    """The first bytes of a file, on disk, with their running digest; their origin is kept in a file beside them.

    It outlives its process. What there is already is hashed when it is opened. `append` and `say` serve one
    thread; `stop`, set by another, ends it by Stopped.
    """

    def __init__(self, path: Path, bar: Progress, stop: threading.Event) -> None:
        self.path, self.bar, self.stop = path, bar, stop
        self.record = path.with_suffix(".json")
        self.origin, self.size, self.digest = UNKNOWN, 0, hashlib.sha256()
        with suppress(FileNotFoundError, msgspec.DecodeError):
            self.origin = msgspec.json.decode(self.record.read_bytes(), type=Origin)
        path.touch()
        with path.open("rb") as file:
            for block in iter(lambda: file.read(BLOCK), b""):
                self._count(block)
        self.file = path.open("ab")
        self._show()

    def __enter__(self) -> "Part":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.file.close()
        if not self.size:
            self.path.unlink()
            self.record.unlink(missing_ok=True)

    def append(self, block: bytes) -> None:
        self.file.write(block)
        self.file.flush()
        self._count(block)

    def restart(self, origin: Origin) -> None:
        """Begins anew with bytes of `origin`. The old file is left whole to whoever has another name for it."""
        self.file.close()
        self.path.unlink()
        write_json(self.record, asdict(origin))
        self.file = self.path.open("ab")
        self.origin, self.size, self.digest = origin, 0, hashlib.sha256()
        self._show()

    def sync(self) -> None:
        os.fsync(self.file.fileno())

    def say(self, line: str) -> None:
        """A line that does not tear the bars on a terminal."""
        if self.bar.bar:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def _count(self, block: bytes) -> None:
        if self.stop.is_set():
            raise Stopped
        self.digest.update(block)
        self.size += len(block)
        self.bar.update(len(block))

    def _show(self) -> None:
        """From here on, rate and time left are those of the bytes that come."""
        self.bar.initial = self.bar.n = self.bar.last_print_n = self.size
        self.bar.total = self.origin.size or self.bar.total
