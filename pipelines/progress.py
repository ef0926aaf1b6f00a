"""How far something has come, as a person reads it."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

CLEAR = "\r\x1b[J"  # of a terminal: its line, and the bars that are drawn below


def print_error(text: str) -> None:
    """Prints the error that ends a command, in the place of a bar that it leaves."""
    print(f"{CLEAR * sys.stderr.isatty()}error: {text}", file=sys.stderr, flush=True)


class Progress(tqdm):
    """A bar with the time left on a terminal; elsewhere a plain line every ten seconds."""

    def __init__(
        self, iterable: Iterable[Any] | None = None, desc: str = "", total: float = 0, unit: str = "it"
    ) -> None:
        self.bar = sys.stderr.isatty()
        super().__init__(
            iterable, desc, total, unit=unit, file=sys.stderr, dynamic_ncols=True, mininterval=0.1 if self.bar else 10
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if self.bar:
            return bool(super().display(msg, pos))
        if self.n or self.n == self.total:
            print(msg or str(self), file=sys.stderr, flush=True)
        return True

    def say(self, line: str) -> None:
        """Prints a line, above the bar where there is one."""
        if self.bar:
            self.write(line)
        else:
            print(line, flush=True)

    def close(self) -> None:
        if self.bar or getattr(self, "disable", False):
            super().close()
            return
        self.disable = True
        self._decr_instances(self)
        print(str(self), file=sys.stderr, flush=True)
