"""Processes and their end: what runs here in a group of its own, and what was started long ago, found by its mark."""

import codecs
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

from pipelines.progress import CLEAR
from pipelines.surroundings import own_environment

# These begin the last line of a stage that failed, what DVC says to that, and what it says of locks after a stop.
ERRORS = ("error: ", "ERROR: ", "WARNING: Process '")
STOP_SECONDS = 15  # for a training to finish its step and save its state; Prefect kills a cancelled run after 30
WORKTREE = "DETR_WORKTREE"  # in the environment of what we start: the directory that it works in

running: set[int] = set()  # the process groups that `start_group` has started
drawing = threading.Lock()  # held by who writes to the terminal while bars may be drawn there


def start_tied(module: list[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A Python module in a session of its own, which hears nothing of what ends us, and ends when we have ended."""
    command = [sys.executable, "-m", "pipelines.workspace.tied", *module]
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, start_new_session=True)


@contextmanager
def start_group(
    command: list[str], root: Path, lines: deque[str], extra: Mapping[str, str], bars: bool = True
) -> Iterator[subprocess.Popen[str]]:
    """The command in a process group of its own, which does not outlive the block.

    On a terminal what it writes to stderr, as its progress bars, is shown there, unless there are to be no `bars`.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    env = {**own_environment(), "PATH": path, "PYTHONUNBUFFERED": "1", WORKTREE: str(root), **extra}
    errors, follower = subprocess.STDOUT, None
    if bars and sys.stderr.isatty():
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
    running.add(process.pid)
    if follower:
        os.close(errors)
        follower.start()
    try:
        yield process
        process.wait()
    finally:
        stop_group(process)
        running.discard(process.pid)
        if process.stdout:
            process.stdout.close()
        if follower:
            follower.join(timeout=5)


def _follow(master: int, lines: deque[str]) -> None:
    """Copies what comes from a pseudo-terminal to ours, but errors, and keeps its lines."""
    decoder, rest, shown = codecs.getincrementaldecoder("utf-8")("replace"), "", 0
    while True:
        try:
            data = os.read(master, 4096)
        except OSError:
            data = b""
        *whole, rest = re.split(r"(?<=\n)|(?<=\r)(?=[^\n])", rest + decoder.decode(data, not data))
        with drawing:
            for line in whole if data else [*whole, rest]:
                if not is_error(line):
                    sys.stderr.write(line[shown:])
                if line.strip() and (line.endswith("\n") or not data):
                    lines.append(strip_codes(line))
                shown = 0
            if data and not is_error(rest, so_far=True):
                sys.stderr.write(rest[shown:])
                shown = len(rest)
            sys.stderr.flush()
        if not data:
            os.close(master)
            return


@contextmanager
def clear_bars() -> Iterator[None]:
    """Clears a terminal of the bars that are drawn below what is to be printed there."""
    with drawing:
        if sys.stderr.isatty():
            sys.stderr.write(CLEAR)
            sys.stderr.flush()
        yield


def strip_codes(line: str) -> str:
    """A line of a terminal without its colours and its end."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).rstrip()


def is_error(line: str, so_far: bool = False) -> bool:
    """Whether a line is the error of a stage or of DVC, or may become it with what is still to come."""
    said = strip_codes(line)
    return said.startswith(ERRORS) or (so_far and any(error.startswith(said) for error in ERRORS))


def stop_group(process: subprocess.Popen[str]) -> None:
    """Ends every process of the group: SIGTERM, and SIGKILL for what is left after STOP_SECONDS."""
    deadline = time.monotonic() + STOP_SECONDS
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not signal_group(process.pid, number):
            break
        while time.monotonic() < deadline and signal_group(process.pid, 0):
            process.poll()
            time.sleep(0.1)
    process.wait()


def kill_running() -> None:
    """Kills all that `start_group` has started; what waits for it goes on."""
    for leader in tuple(running):
        signal_group(leader, signal.SIGKILL)


def signal_group(group: int, number: int) -> bool:
    """Sends a signal (0: none) to a process group; whether there was one."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def read_environment(process: psutil.Process) -> dict[str, str]:
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
