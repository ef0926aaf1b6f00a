"""Processes that were started long ago, found by what is in their environment, and their end."""

import time
from collections.abc import Sequence
from contextlib import suppress

import psutil


def environment(process: psutil.Process) -> dict[str, str]:
    """The environment of a process; empty where it is not ours to read, or gone."""
    try:
        return dict(process.environ())
    except (psutil.Error, OSError):
        return {}


def stop(processes: Sequence[psutil.Process], seconds: float) -> None:
    """Ends processes: SIGTERM, if they get any time for it, and SIGKILL for what is left then."""
    for send, patience in ((psutil.Process.terminate, seconds), (psutil.Process.kill, 10)):
        deadline = time.monotonic() + patience
        for process in processes if patience else ():
            with suppress(psutil.Error):
                send(process)
        while time.monotonic() < deadline and any(map(is_alive, processes)):
            time.sleep(0.05)
    psutil.wait_procs(processes, timeout=0)  # those that this process started are not left as zombies


def is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
