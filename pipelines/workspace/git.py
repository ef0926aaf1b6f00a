"""Git, called as a command, here alone: no variable and no setting of a person changes what it says."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pipelines.locks import hold_lock
from pipelines.redaction import redact
from pipelines.surroundings import own_environment

STALE_SECONDS = 60  # after which a lock of git is that of a killed process: it holds one for less than a second
FETCH_SECONDS = 600  # after which a remote does not answer
SETTINGS = (
    f"core.hooksPath={os.devnull}",  # hooks may ask or fail
    f"diff.orderFile={os.devnull}",
    "apply.ignoreWhitespace=no",
    "color.ui=false",
    "commit.cleanup=whitespace",
    "core.safecrlf=false",
    "core.quotePath=false",
    "core.splitIndex=false",  # DVC reads no index of this kind, nor the next
    "index.skipHash=false",
    "diff.suppressBlankEmpty=false",
    "i18n.commitEncoding=UTF-8",
    "i18n.logOutputEncoding=UTF-8",
    "log.follow=false",
    "log.showSignature=false",
    "status.showUntrackedFiles=normal",
)


def git(root: Path, *arguments: str, seconds: float | None = None, env: Mapping[str, str] | None = None) -> str:
    """What git prints, stripped; names that are no UTF-8 have surrogates. Raises ValueError with git's own words."""
    return run_git(root, *arguments, seconds=seconds, env=env).decode(errors="surrogateescape").strip()


def run_git(
    root: Path,
    *arguments: str,
    seconds: float | None = None,
    env: Mapping[str, str] | None = None,
    given: bytes | None = None,
) -> bytes:
    """What git prints when it is `given` something to read. Raises ValueError with git's own words, in one line."""
    own = {"GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    settings = (word for setting in SETTINGS for word in ("-c", setting))
    pipe, none, said = subprocess.PIPE, subprocess.DEVNULL, f"git {' '.join(arguments)}"
    try:
        process = subprocess.Popen(
            ["git", *settings, *arguments],
            cwd=root,
            stdin=none if given is None else pipe,
            stdout=pipe,
            stderr=pipe,
            env=own_environment() | own | dict(env or {}),
            start_new_session=True,
        )
    except OSError as error:
        remedy = "install git" if root.is_dir() else f"{root} is no folder"
        raise ValueError(f"{said} cannot be started: {error.strerror or error}; {remedy}") from error
    with process:
        try:
            output, errors = process.communicate(given, timeout=seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # and what speaks with the remote for it
            if isinstance(error, subprocess.TimeoutExpired):
                raise ValueError(f"{said} did not end within {seconds:.0f} seconds in {root}") from None
            raise
    if process.returncode:
        words = " ".join(errors.decode(errors="replace").split())
        raise ValueError(redact(f"{said} failed in {root}: {words}"))
    return output


def check_repository(root: Path) -> None:
    """Raises ValueError, with what to do, where git or DVC cannot work in a worktree of the project in `root`."""
    try:
        top = Path(git(root, "rev-parse", "--show-toplevel"))
    except ValueError as error:
        remedy = "; clone the project with git" if "not a git repository" in str(error) else ""
        raise ValueError(f"a run in a worktree needs git: {error}{remedy}") from error
    inside = f"a folder of the repository {top}" if top.resolve() != root.resolve() else ""
    if not inside and (above := git(root, "rev-parse", "--show-superproject-working-tree")):
        inside = f"a submodule of {above}"
    if inside:
        raise ValueError(
            f"{root} is {inside}, where DVC cannot work in a worktree; clone the project to a folder of its own, or "
            "run it in place, without overrides"
        )
    try:
        git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    except ValueError:
        raise ValueError(f"{root} has no commit yet; make one: git add --all && git commit") from None
    git(root, "rev-parse", "--verify", "HEAD^{commit}")  # says where the clone is damaged


def unlock(root: Path) -> None:
    """Waits for the locks of git's references to go, and removes those that killed processes have left."""
    common = Path(git(root, "rev-parse", "--path-format=absolute", "--git-common-dir"))
    for lock in (common / "packed-refs.lock", common / "config.lock", *(common / "refs").rglob("*.lock")):
        with suppress(FileNotFoundError):
            while time.time() - lock.stat().st_mtime < STALE_SECONDS:
                time.sleep(0.2)
            lock.unlink()


def resolve_commit(root: Path, commit: str) -> str:
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
        with hold_lock(root / "scratch" / "fetch.lock"):
            unlock(root)
            git(root, "fetch", "--quiet", "--end-of-options", remote, seconds=seconds)


def is_dirty(root: Path) -> bool:
    """Whether files differ from HEAD that a worktree would lack; dvc.lock is a result."""
    return bool(git(root, "status", "--porcelain", "--", ".", ":!dvc.lock"))
