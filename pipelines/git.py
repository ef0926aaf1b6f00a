"""Git, called as a command."""

import fcntl
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from pipelines.redaction import hidden

STALE_SECONDS = 60  # after which a lock of git is that of a killed process: it holds one for less than a second
FETCH_SECONDS = 600  # after which a remote does not answer


def git(root: Path, *arguments: str, seconds: float | None = None) -> str:
    """What git prints; a person's hooks, which may ask or fail, do not run. Raises ValueError."""
    env = os.environ | {"GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-c", f"core.hooksPath={os.devnull}", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=root, stdout=pipe, stderr=pipe, encoding="utf-8", env=env, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # and what speaks with the remote for it
            if isinstance(error, subprocess.TimeoutExpired):
                said = f"git {' '.join(arguments)} did not end within {seconds:.0f} seconds in {root}"
                raise ValueError(said) from None
            raise
    if process.returncode:
        raise ValueError(hidden(f"git {' '.join(arguments)} failed in {root}: {errors.strip()}"))
    return output.strip()


def unlock(root: Path) -> None:
    """Waits for the locks of git's references to go, and removes those that killed processes have left."""
    common = Path(git(root, "rev-parse", "--path-format=absolute", "--git-common-dir"))
    for lock in (common / "packed-refs.lock", common / "config.lock", *(common / "refs").rglob("*.lock")):
        with suppress(FileNotFoundError):
            while time.time() - lock.stat().st_mtime < STALE_SECONDS:
                time.sleep(0.2)
            lock.unlink()


def full_commit(root: Path, commit: str) -> str:
    """The full name of a commit. Raises ValueError where this clone has no such commit."""
    try:
        if commit.startswith(("-", "^")):
            raise ValueError
        return git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{commit}}")
    except ValueError:
        raise ValueError(f"{commit!r} is no commit, branch or tag here; git log --oneline --all lists them") from None


def fetch(root: Path, ref: str, seconds: float = FETCH_SECONDS) -> None:
    """Fetches the remote that a ref like `origin/main` begins with, one at a time.

    Raises ValueError where it does not answer.
    """
    remote = ref.partition("/")[0]
    if "/" in ref and remote in git(root, "remote").splitlines():
        (root / "scratch").mkdir(exist_ok=True)
        with (root / "scratch" / "fetch.lock").open("a", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            unlock(root)
            git(root, "fetch", "--quiet", "--end-of-options", remote, seconds=seconds)


def is_dirty(root: Path) -> bool:
    """Whether files differ from HEAD that a worktree would lack; dvc.lock is a result."""
    return bool(git(root, "status", "--porcelain", "--", ".", ":!dvc.lock"))
