"""The only module that calls DVC and git: runs stages, reads versions of the data."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, unquote

from ruamel.yaml import YAML

from pipelines.params import read_yaml
from pipelines.stage import QUIET
from pipelines.versions import DataVersion, locked

STOP_SECONDS = 15  # for a training to finish its step and save its state; Prefect kills a cancelled run after 30
NUM_LINES = 50  # of a stage's output that are kept of a failure
SECRET = re.compile(  # in a variable's name
    r"KEY|TOKEN|SECRET|PASS|_PWD|CREDENTIAL|AUTH(?!ORS?(_|$))|WEBHOOK|CONNECTION_STRING|DSN", re.IGNORECASE
)
USER_IN_URL = re.compile(r"(?<=://)[^/\s'\"?#]+@")
PASSWORD_IN_URL = re.compile(r"://[^/\s:@]*:([^/\s]+)@|https?://([^/\s:@]+)@")  # or a token in its place
SHORTEST_SECRET = 6  # shorter ones would make holes in every text
STALE_SECONDS = 60  # after which a lock of git is that of a killed process: it holds one for less than a second
WORKTREE = "DETR_WORKTREE"  # in the environment of what we start: the directory that it works in


class StageFailed(RuntimeError):
    """A stage ended with a code that is not 0; the message is the stage's own, `lines` the last of its output."""

    def __init__(self, message: str, lines: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.lines = list(lines)


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

    command = ["dvc", "--wait-for-lock", "repro", "--single-item", stage, *["--force"] * force, *options]
    try:
        _call(command, root, notice, env)
    except StageFailed as failure:
        raise StageFailed(f"{stage}: {failure}", failure.lines) from None
    return outcome


def hidden(text: str) -> str:
    """Text without users and passwords in URLs, and without what the environment holds of secrets.

    These are the variables with the name of a secret, line by line, and passwords in the URLs of others.
    """
    text = USER_IN_URL.sub("", text)
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def _secrets() -> set[str]:
    """What must not be shown, as it is and as it stands in a URL or in JSON."""
    found = {line.strip() for name, value in os.environ.items() if SECRET.search(name) for line in value.splitlines()}
    for value in os.environ.values():
        found |= {unquote(password or token) for password, token in PASSWORD_IN_URL.findall(value)}
    written = (lambda text: quote(text, safe=""), quote, lambda text: json.dumps(text)[1:-1])
    found |= {write(secret) for secret in found for write in written}
    return {secret for secret in found if len(secret) >= SHORTEST_SECRET}


def check(root: Path) -> None:
    """Has the code in `root` check its params.yaml. Raises StageFailed with the message that names the key."""
    _call(["pipelines", "params"], root, lambda line: None)


def cache_folder(root: Path) -> Path:
    """Where DVC keeps its cache, by the settings of the project, the person and the machine."""
    from dvc.config import Config  # type: ignore[import-untyped]

    return Path(Config(str(root / ".dvc"))["cache"].get("dir") or root / ".dvc" / "cache").resolve()


def collect_garbage(root: Path, locks: Mapping[str, str], log: Callable[[str], None], dry: bool = False) -> int:
    """Removes from the DVC cache what neither the working tree, nor a commit, nor one of `locks` names.

    `locks` are texts of dvc.lock by name. Gives the bytes that it freed or, when `dry`, would free. Entries of the run
    cache whose outputs are gone go too: DVC leaves them for ever. Raises StageFailed.
    """
    cache, listed = cache_folder(root), set[Path]()

    def take(line: str) -> None:
        if dry and line.startswith("Removing "):
            listed.add(Path(line.removeprefix("Removing ")))
        else:
            log(line)

    before = bytes_in(cache)
    command = ["dvc", "--wait-for-lock", "gc", "--force", *["--dry"] * dry, "--workspace", "--all-commits"]
    with tempfile.TemporaryDirectory() as folder:
        if locks:
            _name_all(Path(folder), cache, locks)
            command += ["--projects", folder]
        _call(command, root, take)
    dead = [entry for entry in cache.glob("runs/*/*/*") if not _can_restore(entry, cache, listed)]
    if dry:
        return sum(bytes_in(path) for path in (*listed, *dead))
    for entry in dead:
        entry.unlink(missing_ok=True)
        with suppress(OSError):  # where another entry is left
            entry.parent.rmdir()
            entry.parent.parent.rmdir()
    return before - bytes_in(cache)


def _name_all(project: Path, cache: Path, locks: Mapping[str, str]) -> None:
    """Makes a DVC project that names all outputs in `locks`, for --projects of `dvc gc`."""
    from dvc.config import Config

    git(project, "init", "--quiet")  # --all-commits asks every project for its commits
    (project / ".dvc").mkdir()
    with Config(str(project / ".dvc"), validate=False).edit("repo") as settings:
        settings["cache"]["dir"] = str(cache)
    for name, text in locks.items():
        stages = YAML(typ="safe").load(text)["stages"].values()
        made = [out for stage in stages for out in stage.get("outs", []) if _in_cache(cache, out).exists()]
        kept = ("md5", "hash", "size", "nfiles")
        outs = [{"path": str(k)} | {key: out[key] for key in kept if key in out} for k, out in enumerate(made)]
        (project / name).mkdir()
        (project / name / "outs.dvc").write_text(json.dumps({"outs": outs}))


def _in_cache(cache: Path, out: Mapping[str, str]) -> Path:
    """The file in the cache of an output in a dvc.lock; that of a folder is the list of its files."""
    md5 = out.get("md5", "none")
    return cache / ("files/md5" if "hash" in out else "") / md5[:2] / md5[2:]


def _can_restore(entry: Path, cache: Path, gone: Collection[Path]) -> bool:
    """Whether the outputs that an entry of the run cache names are in the cache."""
    try:
        places = [_in_cache(cache, out) for out in read_yaml(entry)["outs"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return all(place.exists() and place not in gone for place in places)


def bytes_in(path: Path) -> int:
    """The bytes of a file, or of all files in a folder; what links lead to is not counted."""
    files = (one for one in (path, *path.rglob("*")) if one.is_symlink() or one.is_file())
    return sum(one.lstat().st_size for one in files)


def _call(module: list[str], root: Path, log: Callable[[str], None], env: Mapping[str, str] | None = None) -> None:
    """Runs a Python module in `root`. Raises StageFailed."""
    lines: deque[str] = deque(maxlen=NUM_LINES)
    with _process([sys.executable, "-m", *module], root, lines, env or {}) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip():
                lines.append(hidden(line.rstrip()))
                log(lines[-1])
    if process.returncode:
        for prefix in ("error: ", "ERROR: ", ""):  # of a stage, of DVC, of neither
            if said := [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]:
                raise StageFailed(said[-1], lines)
        raise StageFailed(f"exit code {process.returncode}", lines)


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


def git(root: Path, *arguments: str) -> str:
    env = os.environ | {"GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0"}
    answer = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False, env=env)
    if answer.returncode:
        raise ValueError(hidden(f"git {' '.join(arguments)} failed in {root}: {answer.stderr.strip()}"))
    return answer.stdout.strip()


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


def fetch(root: Path, ref: str) -> None:
    """Fetches the remote that a ref like `origin/main` begins with. Raises ValueError where it does not answer."""
    remote = ref.partition("/")[0]
    if "/" in ref and remote in git(root, "remote").splitlines():
        unlock(root)
        git(root, "fetch", "--quiet", "--end-of-options", remote)


def obtain(stage: str, outs: Collection[str], place: Path, log: Callable[[str], None]) -> str:
    """Puts what dvc.lock names as outputs of a stage in place: from the `cache`, or from the `remote` and the cache.

    Nothing, said, where neither has all of it.
    """
    for where, verb in (("cache", "checkout"), ("remote", "pull")):
        failure = ""
        try:
            _call(["dvc", "--wait-for-lock", verb, stage], place, lambda line: None)
        except StageFailed as error:
            failure = str(error)
        missing = [out for out in outs if not (place / out).exists()]
        if not failure and not missing:
            return where
        log(f"{stage}: not whole in the DVC {where}: {failure or ', '.join(missing)}")
    return ""


def is_dirty(root: Path) -> bool:
    """Whether files differ from HEAD that a worktree would lack; dvc.lock is a result."""
    return bool(git(root, "status", "--porcelain", "--", ".", ":!dvc.lock"))


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
            commit = full_commit(root, ref)
        except ValueError:
            raise ValueError(f"{ref!r} is no commit here; list those with data: python -m pipelines data") from None
        version = _locked_at(root, *_dated(root, "--max-count=1", commit)[0])
    if version is None:
        raise ValueError(f"dvc.lock of {ref or 'the working tree'} names no data; run dvc repro and commit dvc.lock")
    return version


def _dated(root: Path, *arguments: str) -> list[list[str]]:
    """Short name and date of the commits that `git log` lists."""
    lines = git(root, "log", "--no-show-signature", "--format=%h %cs", *arguments).splitlines()
    return [line.split() for line in lines]


def _locked_at(root: Path, commit: str = "", date: str = "") -> DataVersion | None:
    """The data that the dvc.lock of a commit, or of the working tree, names; None where there is no such file."""
    try:
        lock = git(root, "show", f"{commit}:./dvc.lock") if commit else (root / "dvc.lock").read_text()
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
