"""The only module that calls DVC and git: runs stages, and keeps other people's working directories untouched."""

import errno
import fcntl
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from pipelines.params import read_yaml, to_yaml
from pipelines.stage import QUIET
from pipelines.versions import DataVersion, locked

STOP_SECONDS = 60  # enough for a training to finish its step and save its state
WORKTREE = "DETR_WORKTREE"  # in the environment of what we start: the directory that it works in


class StageFailed(RuntimeError):
    """A stage ended with a code that is not 0; the message is the stage's own."""


def stages(root: Path) -> list[str]:
    """The stages of dvc.yaml in the order in which they stand, which is the order in which they run."""
    return list(read_yaml(root / "dvc.yaml")["stages"])


def reproduce(
    stage: str,
    root: Path,
    log: Callable[[str], None],
    force: bool = False,
    options: Collection[str] = (),
    env: Mapping[str, str] | None = None,
) -> str:
    """Runs one stage by `dvc repro --single-item`: `ran`, `restored` from the run cache, or `unchanged`.

    Every line that DVC and the stage print goes to `log` as it comes; on a terminal their progress bars are
    drawn there. An interruption ends every process of the stage. Raises StageFailed.
    """
    outcome = "unchanged"

    def notice(line: str) -> None:
        nonlocal outcome
        log(line)
        if line.startswith("Running stage"):
            outcome = "ran"
        elif "is cached - skipping run" in line:
            outcome = "restored"

    failure = _dvc(root, ["repro", "--single-item", stage, *["--force"] * force, *options], notice, env or {})
    if failure:
        raise StageFailed(f"{stage}: {failure}")
    return outcome


def _dvc(root: Path, arguments: list[str], log: Callable[[str], None], env: Mapping[str, str]) -> str:
    """Runs a command of DVC; why it failed, or nothing."""
    lines: deque[str] = deque(maxlen=50)
    with _process([sys.executable, "-m", "dvc", "--wait-for-lock", *arguments], root, lines, env) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip():
                lines.append(line.rstrip())
                log(line.rstrip())
    if not process.returncode:
        return ""
    said = [line for line in lines if line.startswith("error: ")] or [line for line in lines if line.strip()][-1:]
    return said[-1].removeprefix("error: ") if said else f"exit code {process.returncode}"


@contextmanager
def _process(
    command: list[str], root: Path, lines: deque[str], extra: Mapping[str, str]
) -> Iterator[subprocess.Popen[str]]:
    """The command in a process group of its own, which does not outlive the block."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    env = {**os.environ, **QUIET, "PATH": path, "PYTHONUNBUFFERED": "1", WORKTREE: str(root), **extra}
    errors, follower = subprocess.STDOUT, None
    if sys.stderr.isatty():
        master, errors = pty.openpty()
        termios.tcsetwinsize(errors, termios.tcgetwinsize(sys.stderr.fileno()))
        follower = threading.Thread(target=_follow, args=(master, lines), daemon=True)
    process = subprocess.Popen(
        command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
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


def _git(root: Path, *arguments: str) -> str:
    answer = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise ValueError(f"git {' '.join(arguments)} failed in {root}: {answer.stderr.strip()}")
    return answer.stdout.strip()


@contextmanager
def only_one(root: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Holds the project's run lock; a second run says so and waits. The lock dies with its process."""
    (root / "scratch").mkdir(exist_ok=True)
    with (root / "scratch" / "run.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            log(f"another run (process {lock.read().strip()}) is under way in {root}; waiting for it to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def absolute_paths(document: Any, root: Path, worktree: Path | None = None) -> None:
    """Makes the local files that params name independent of the directory that a run works in.

    Those that lie in `worktree`, where one is given, stay as they are.
    """

    def absolute(place: str) -> str:
        name = place.partition("#")[0]
        local = "://" not in name and name not in ("shapes", "none", "imagenet")
        local = local and not (worktree and (worktree / name).exists())
        return str((root / place).resolve()) if local else place

    source = document["download"]["source"]
    if isinstance(source, dict):
        document["download"]["source"] = {key: absolute(place) for key, place in source.items()}
    else:
        document["download"]["source"] = absolute(source)
    document["download"]["sha256"] = {absolute(place): sum_ for place, sum_ in document["download"]["sha256"].items()}
    document["model"]["backbone_weights"] = absolute(document["model"]["backbone_weights"])
    initial = document["train"]["initial_weights"]
    if (root / initial).exists():
        document["train"]["initial_weights"] = absolute(initial)


@contextmanager
def worktree(root: Path, name: str, document: Any) -> Iterator[Path]:
    """A git worktree at HEAD with `document` as its params.yaml, the DVC cache and scratch/ shared.

    params.yaml is committed first, on the branch `runs/NAME`, so that what is registered names the commit that
    made it; when the block ends well, dvc.lock follows, and the evaluation is kept in `scratch/runs/NAME`. The
    worktree is removed in any case, the branch when nothing was registered.
    """
    place = _cleared(root) / name
    _git(root, "worktree", "add", "-b", f"runs/{name}", str(place), "HEAD")
    try:
        absolute_paths(document, root)
        (place / "params.yaml").write_text(to_yaml(document))
        _share_settings(root, place)
        (place / "scratch").symlink_to(root / "scratch")
        _commit(place, "params.yaml", f"Parameters of run {name}")
        yield place
        _commit(place, "dvc.lock", f"Results of run {name}")
        shutil.copytree(place / "artifacts" / "evaluate", root / "scratch" / "runs" / name)
    finally:
        registered = (place / "artifacts" / "register" / "version.json").exists()
        _remove(root, place)
        if not registered:
            _git(root, "branch", "-D", f"runs/{name}")


@contextmanager
def worktree_at(root: Path, name: str, commit: str) -> Iterator[Path]:
    """A git worktree at a commit, on no branch and with a scratch/ of its own; it is removed in any case.

    It has the DVC cache and the remotes of `root`, as they are today.
    """
    place = _cleared(root) / name
    try:
        try:
            _git(root, "-c", f"core.hooksPath={os.devnull}", "worktree", "add", "--detach", str(place), commit)
        except ValueError as error:
            if "unable to write" in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place)) from error
            raise
        _share_settings(root, place)
        yield place
    finally:
        _remove(root, place)


def _cleared(root: Path) -> Path:
    """The folder of our worktrees, without those of runs that were killed, and their processes: the lock is ours."""
    import psutil

    folder = root.resolve() / "scratch" / "worktrees"
    listed = _git(root, "worktree", "list", "--porcelain").splitlines()
    known = {Path(line.removeprefix("worktree ")) for line in listed if line.startswith("worktree ")}
    left = {path for path in known if path.parent == folder} | {*folder.glob("*")}
    orphans = []
    for process in psutil.process_iter() if left else ():
        with suppress(psutil.Error):
            if Path(process.environ().get(WORKTREE, "/")) in left:
                process.kill()
                orphans.append(process)
    psutil.wait_procs(orphans, timeout=10)
    for path in left:
        _remove(root, path)
    return folder


def _remove(root: Path, place: Path) -> None:
    """Removes a worktree, whatever is left of it."""
    shutil.rmtree(place, ignore_errors=True)
    with suppress(ValueError):  # where git does not know it
        _git(root, "worktree", "remove", "--force", str(place))


def _share_settings(root: Path, place: Path) -> None:
    """Gives a worktree the DVC cache and the remotes of `root`, with what may be needed to enter them."""
    from dvc.config import Config, ConfigError, merge  # type: ignore[import-untyped]

    try:
        ours = Config(str(root / ".dvc"))
        with Config(str(place / ".dvc"), validate=False).edit("local") as settings:
            for level in ("repo", "local"):
                merge(settings, ours.load_one(level))
            settings["cache"].setdefault("dir", str(root / ".dvc" / "cache"))
    except ConfigError as error:
        raise ValueError(f"the settings of DVC in {root}/.dvc cannot be read: {error}") from error


def apply(place: Path, diff: Path, but: Collection[str]) -> None:
    """Applies a file of `git diff` to a worktree, without the files `but`. Raises ValueError where it does not fit."""
    if diff.read_bytes().strip():
        exclude = (f"--exclude={name}" for name in but)
        _git(place, "apply", "--whitespace=nowarn", *exclude, str(diff.resolve()))


def full_commit(root: Path, commit: str) -> str:
    """The full name of a commit. Raises ValueError where this clone has no such commit."""
    return _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{commit}}")


def obtain(stage: str, outs: Collection[str], place: Path, log: Callable[[str], None]) -> str:
    """Puts what dvc.lock names as outputs of a stage in place: from the `cache`, or from the `remote` and the cache.

    Nothing, said, where neither has all of it.
    """
    for where, verb in (("cache", "checkout"), ("remote", "pull")):
        failure = _dvc(place, [verb, stage], lambda _: None, {})
        missing = [out for out in outs if not (place / out).exists()]
        if not failure and not missing:
            return where
        log(f"{stage}: not whole in the DVC {where}: {failure or ', '.join(missing)}")
    return ""


def _commit(place: Path, file: str, message: str) -> None:
    """Commits one file, under a name of ours where the person has not told git theirs."""
    known = subprocess.run(["git", "config", "user.email"], cwd=place, capture_output=True, check=False).returncode == 0
    identity = () if known else ("-c", "user.name=pipelines", "-c", "user.email=pipelines@localhost")
    _git(place, "add", file)
    _git(place, *identity, "commit", "--quiet", "--allow-empty", "--no-verify", "--no-gpg-sign", "-m", message)


def is_dirty(root: Path) -> bool:
    """Whether files differ from HEAD that a worktree would lack; parameters are merged in, dvc.lock is a result."""
    return bool(_git(root, "status", "--porcelain", "--", ".", ":!dvc.lock", ":!params.yaml", ":!presets"))


def data_versions(root: Path) -> tuple[list[DataVersion], DataVersion | None]:
    """Every distinct content of the data in the history of dvc.lock, newest first, and the one of the working tree.

    Each stands at the first commit that has it, or, where none has, at the working tree.
    """
    found: dict[tuple[str, ...], DataVersion] = {}
    for commit, date in reversed(_dated(root, "--full-history", "--date-order", "--", "dvc.lock")):
        if version := _locked_at(root, commit, date):
            found.setdefault(version.content, version)
    here = _locked_at(root)
    if here:
        here = found.setdefault(here.content, here)
    if not found:
        raise ValueError("no dvc.lock names any data, here or in a commit of this branch; run dvc repro and commit it")
    return list(found.values())[::-1], here


def data_version(root: Path, ref: str | None) -> DataVersion:
    """The data of a commit, or, without one, of the working tree. Raises ValueError where there is none."""
    if ref is None:
        version = _locked_at(root)
    else:
        try:
            if ref.startswith(("-", "^")):
                raise ValueError
            commit = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
        except ValueError:
            raise ValueError(f"{ref!r} is no commit here; list those with data: python -m pipelines data") from None
        version = _locked_at(root, *_dated(root, "--max-count=1", commit)[0])
    if version is None:
        raise ValueError(f"dvc.lock of {ref or 'the working tree'} names no data; run dvc repro and commit dvc.lock")
    return version


def _dated(root: Path, *arguments: str) -> list[list[str]]:
    """Short name and date of the commits that `git log` lists."""
    lines = _git(root, "log", "--no-show-signature", "--format=%h %cs", *arguments).splitlines()
    return [line.split() for line in lines]


def _locked_at(root: Path, commit: str = "", date: str = "") -> DataVersion | None:
    """The data that the dvc.lock of a commit, or of the working tree, names; None where there is no such file."""
    try:
        lock = _git(root, "show", f"{commit}:./dvc.lock") if commit else (root / "dvc.lock").read_text()
    except (ValueError, FileNotFoundError):
        return None
    return locked(lock, commit, date)


@contextmanager
def open_version(root: Path, version: DataVersion, path: str) -> Iterator[BinaryIO]:
    """A file of a version, seekable: from the working tree if it is that one's, the DVC cache, or the remote.

    Raises ValueError where it is in none of them.
    """
    import dvc.api  # type: ignore[import-untyped]
    from dvc.exceptions import PathMissingError  # type: ignore[import-untyped]
    from dvc.repo import Repo  # type: ignore[import-untyped]

    with ExitStack() as stack:
        remote = None  # that of today, which the settings of an old commit may lack
        try:
            remote = stack.enter_context(Repo(str(root))).config["core"].get("remote")
            rev = version.commit or None
            file = stack.enter_context(dvc.api.open(path, repo=str(root), rev=rev, remote=remote, mode="rb"))
        except PathMissingError:
            hint = f"nor in the remote {remote}; push it from where it is: dvc push --all-commits"
            hint = hint if remote else "and there is no remote; add one: dvc remote add --default NAME URL"
            raise ValueError(f"{path} of {version.title} is not in the DVC cache {hint}") from None
        except Exception as error:  # of the remote's own library too
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{path} of {version.title} cannot be read (remote: {remote}): {reason}") from error
        yield file
