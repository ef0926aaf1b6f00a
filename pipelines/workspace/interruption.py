"""Ctrl-C, SIGTERM and SIGHUP: a command ends what it has started, says so in one line, exits with 128 + the signal."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from pipelines.progress import CLEAR
from pipelines.workspace.processes import kill_running, running

HURRY_SECONDS = 5.0  # after a second signal, until this process ends whatever it is doing, as after a third
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
asked: list[int] = []  # the signals that came


@contextmanager
def heed_signals() -> Iterator[None]:
    """Has the first signal raise KeyboardInterrupt, whose message is printed; the second kills what is running.

    A signal that is ignored stays so, as SIGHUP under nohup. After the block there is nothing left to stop, and a
    signal ends the process as it is.
    """
    for number in SIGNALS:
        listen(number)
    try:
        yield
    except KeyboardInterrupt as stop:
        try:
            print(CLEAR * sys.stderr.isatty() + (str(stop) or "stopped"), file=sys.stderr, flush=True)
        except OSError:  # the terminal is closed, which the interpreter would find again at its end
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1)
            os.dup2(nothing, 2)
        sys.exit(128 + (asked[0] if asked else signal.SIGINT))
    finally:
        for number in SIGNALS:
            listen(number, signal.SIG_DFL)


def listen(number: int, handler: Any = None) -> None:
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, handler if handler is not None else _take)


def _take(number: int, frame: object) -> None:
    asked.append(number)
    if len(asked) == 1:
        if running and sys.stderr.isatty():
            said = f"{CLEAR}stopping after this step; Ctrl-C again does not wait for it\n"
            os.write(2, said.encode())  # where this came, print may be at work
        raise KeyboardInterrupt
    kill_running()
    if len(asked) > 2:
        _end_at_once()
    end = threading.Timer(HURRY_SECONDS, _end_at_once)
    end.daemon = True
    end.start()


def _end_at_once() -> None:
    """Ends this process and what it has started."""
    kill_running()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            child.kill()
    os._exit(128 + asked[0])
