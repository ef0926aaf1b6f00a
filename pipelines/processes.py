"""Processes and their end: what runs here in a group of its own, and what was started long ago, found by its mark."""

import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from pipelines.stage import own_environment

STOP_SECONDS = 15  # for a training to finish its step and save its state; Prefect kills a cancelled run after 30
WORKTREE = "DETR_WORKTREE"  # in the environment of what we start: the directory that it works in


@contextmanager
def group(
    command: list[str], root: Path, lines: deque[str], extra: Mapping[str, str]
) -> Iterator[subprocess.Popen[str]]:
    """The command in a process group of its own, which does not outlive the block."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    env = {**own_environment(), "PATH": path, "PYTHONUNBUFFERED": "1", WORKTREE: str(root), **extra}
    errors, follower = subprocess.STDOUT, None
    if sys.stderr.isatty():
        master, errors = pty.openpty()
        termios.tcsetwinsize(errors, termios.tcgetwinsize(sys.stderr.fileno()))
        follower = threading.Thread(target=_follow, args=(master, lines), daemon=True)
    process = subprocess.Popen(
        command,
        cwd=root,
        env=env,
        stdout=subprocess.PIPE,
        stderr=errors,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    if follower:
        os.close(errors)
        follower.start()
    try:
        yield process
        process.wait()
    finally:
        _stop_group(process)
        if process.stdout:
            process.stdout.close()
        if follower:
            follower.join(timeout=5)


def _follow(master: int, lines: deque[str]) -> None:
    """Copies what comes from a pseudo-terminal to ours, and keeps its lines."""
    rest = ""
    while True:
        try:
            data = os.read(master, 4096)
        except OSError:
            data = b""
        if not data:
            os.close(master)
            return
        sys.stderr.buffer.write(data)
        sys.stderr.flush()
        *whole, rest = (rest + data.decode(errors="replace")).replace("\r", "\n").split("\n")
        plain = (re.sub(r"\x1b\[[0-9;]*m", "", line) for line in whole)
        lines.extend(line for line in plain if line.startswith(("error: ", "ERROR: ")))


def _stop_group(process: subprocess.Popen[str]) -> None:
    """Ends every process of the group: SIGTERM, and SIGKILL for what is left after STOP_SECONDS."""
    deadline = time.monotonic() + STOP_SECONDS
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not _signal_group(process.pid, number):
            break
        while time.monotonic() < deadline and _signal_group(process.pid, 0):
            process.poll()
            time.sleep(0.1)
    process.wait()


def _signal_group(group: int, number: int) -> bool:
    """Sends a signal (0: none) to a process group; whether there was one."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


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
