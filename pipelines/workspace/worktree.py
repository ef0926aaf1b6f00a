"""Git worktrees to run in, so that nobody's working directory is touched; on `runs/...` branches that stay."""

import errno
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from pipelines.locks import hold_lock
from pipelines.params import read_yaml, to_yaml
from pipelines.workspace.cache import find_cache, read_settings, write_settings
from pipelines.workspace.git import check_repository, git, resolve_commit, unlock
from pipelines.workspace.overrides import make_paths_absolute
from pipelines.workspace.processes import WORKTREE, read_environment, stop

BRANCHES = "runs/"
RESULTS = "Results of run"  # begins what is committed with them; a branch without is removed


@contextmanager
def hold_run_lock(root: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Holds the project's run lock; a second run says so and waits. The lock dies with its process."""

    def say(holder: str) -> None:
        log(f"another run ({holder}) is under way in {root}; waiting for it to end")

    with hold_lock(root / "scratch" / "run.lock", say):
        yield


@contextmanager
def make_worktree(
    root: Path, name: str, ref: str, parameters: Callable[[Path], Any], note: str = ""
) -> Iterator[tuple[Path, str]]:
    """A git worktree at `ref` with `parameters(it)` as its params.yaml, the DVC cache and scratch/ shared; its branch.

    params.yaml is committed first, on the branch `runs/NAME`, so that what is registered names the commit that made
    it; when the block ends well, dvc.lock follows, and the evaluation is kept in `scratch/runs/NAME`. A run of the
    same code and parameters that was killed is taken over, on its branch and with what it has made. The worktree is
    removed in any case, the branch where it holds no results, as before `keep_results`: what a run has made until then
    is in DVC's cache, where the same run finds it again. The run lock must be held. Raises ValueError.
    """
    if not re.fullmatch(r"\w[\w.-]*", name) or ".." in name:
        raise ValueError(f"{name!r} names no run; use letters, digits, '-', '_' and '.'")
    check_repository(root)
    commit = resolve_commit(root, ref)
    place, branch = _folder(root) / name, f"{BRANCHES}{name}"
    left = _left_behind(root)
    try:
        _add(root, place, commit)
        document = parameters(place)
        make_paths_absolute(document, root)
        (place / "params.yaml").write_text(to_yaml(document), encoding="utf-8")
        taken_over = False
        for other in left:
            if not taken_over and _is_same_run(other, place, commit):
                _remove(root, place)
                place, branch, taken_over = other, git(other, "branch", "--show-current"), True
                _mend(place)
            else:
                _settle(root, other)
        _share_settings(root, place)
        if not taken_over:
            (place / "scratch").symlink_to(root / "scratch")
            git(place, "switch", "--quiet", "--create", branch)
            quoted = "\n".join(f"> {line}" for line in note.splitlines())  # no line of it is a trailer
            _commit(place, "params.yaml", f"Parameters of run {name}\n\n{quoted}".rstrip())
        yield place, branch
        keep_results(place)
        name = branch.removeprefix(BRANCHES)
        kept = root / "scratch" / "runs" / name
        shutil.copytree(place / "artifacts" / "evaluate", kept, dirs_exist_ok=True)
        shutil.copy(place / "artifacts" / "register" / "version.json", kept)
    finally:
        _settle(root, place)


def keep_results(place: Path) -> None:
    """Commits dvc.lock of a worktree where it has changed, and in any case once, so that its branch stays."""
    branch = git(place, "branch", "--show-current")
    if git(place, "status", "--porcelain", "--", "dvc.lock") or not _has_results(place, branch):
        _commit(place, "dvc.lock", f"{RESULTS} {branch.removeprefix(BRANCHES)}")


def _has_results(root: Path, branch: str) -> bool:
    return (
        git(root, "log", "-1", "--format=%s", f"refs/heads/{branch}", "--")
        == f"{RESULTS} {branch.removeprefix(BRANCHES)}"
    )


@contextmanager
def worktree_at(root: Path, name: str, commit: str) -> Iterator[Path]:
    """A git worktree at a commit, on no branch and with a scratch/ of its own; it is removed in any case.

    It has the DVC cache and the remotes of `root`, as they are today. The run lock must be held.
    """
    place = _folder(root) / name
    for other in _left_behind(root):
        if not _branch(other):
            _remove(root, other)
    try:
        _add(root, place, commit)
        _share_settings(root, place)
        yield place
    finally:
        _remove(root, place)


def settle_left_behind(root: Path) -> None:
    """Settles the worktrees of runs that were killed. The run lock must be held."""
    for other in _left_behind(root):
        _settle(root, other)


def _add(root: Path, place: Path, commit: str) -> None:
    try:
        git(root, "worktree", "add", "--detach", str(place), commit)
    except ValueError as error:
        _remove(root, place)
        if "unable to write" in str(error) or os.strerror(errno.ENOSPC) in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place)) from error
        raise


def _folder(root: Path) -> Path:
    return (root / "scratch" / "worktrees").resolve()


def _left_behind(root: Path) -> list[Path]:
    """The worktrees of runs that were killed, whose processes are ended first: the run lock is ours."""
    unlock(root)
    folder = _folder(root)
    with suppress(ValueError):  # the clone has moved since
        git(root, "worktree", "repair", *map(str, folder.glob("*")))
    listed = git(root, "worktree", "list", "--porcelain").splitlines()
    known = {Path(line.removeprefix("worktree ")) for line in listed if line.startswith("worktree ")}
    left = {path for path in known if path.parent == folder} | {*folder.glob("*")}
    everyone = psutil.process_iter() if left else ()
    stop([process for process in everyone if Path(read_environment(process).get(WORKTREE, "/")) in left], seconds=0)
    return sorted(left)


def _branch(place: Path) -> str:
    """The `runs/...` branch of a worktree, or nothing where it is on none or broken."""
    try:
        branch = git(place, "branch", "--show-current") if (place / ".git").is_file() else ""
    except ValueError:
        return ""
    return branch if branch.startswith(BRANCHES) else ""


def _is_same_run(other: Path, place: Path, commit: str) -> bool:
    """Whether a worktree that was left behind has the code of `commit` and the parameters of `place`, all committed."""
    branch = _branch(other)
    if not branch:
        return False
    try:
        changed = git(other, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock")
        changed += git(
            other, "diff", "--name-only", commit, f"refs/heads/{branch}", "--", ".", ":!dvc.lock", ":!params.yaml"
        )
        return not changed and (other / "params.yaml").read_text(encoding="utf-8") == (place / "params.yaml").read_text(
            encoding="utf-8"
        )
    except (ValueError, OSError):
        return False


def _mend(place: Path) -> None:
    """Removes what killed processes of git and DVC have left in a worktree that would stop the next ones."""
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA  # type: ignore[import-untyped]
    from voluptuous import Invalid

    own = _own_git(place)
    branch = own.parent.parent / "refs" / "heads" / _branch(place)
    for lock in (*own.glob("*.lock"), branch.with_name(f"{branch.name}.lock")):
        lock.unlink(missing_ok=True)
    shutil.rmtree(place / ".dvc" / "tmp", ignore_errors=True)
    try:
        COMPILED_LOCKFILE_SCHEMA(read_yaml(place / "dvc.lock"))
    except (ValueError, Invalid):  # torn, or not there yet
        (place / "dvc.lock").unlink(missing_ok=True)
        with suppress(ValueError):
            git(place, "checkout", "--", "dvc.lock")


def _own_git(place: Path) -> Path:
    """Git's folder of a worktree, which is removed with it."""
    return Path(git(place, "rev-parse", "--absolute-git-dir"))


def find_refresh_mark(place: Path) -> Path:
    """A file of a worktree that names the flow run which has downloaded in it again."""
    return _own_git(place) / "refreshed"


def _settle(root: Path, place: Path) -> None:
    """Removes a worktree. Its branch stays where it holds results; what has changed of them since is committed."""
    branch = _branch(place)
    if branch:
        with suppress(ValueError):
            _mend(place)
            if _has_results(root, branch):
                keep_results(place)
    _remove(root, place)
    if branch and not _has_results(root, branch):
        git(root, "branch", "-D", branch)


def _remove(root: Path, place: Path) -> None:
    """Removes a worktree, whatever is left of it."""
    shutil.rmtree(place, ignore_errors=True)
    with suppress(ValueError):  # where git does not know it
        git(root, "worktree", "remove", "--force", "--force", str(place))


def _share_settings(root: Path, place: Path) -> None:
    """Gives a worktree the DVC cache and the remotes of `root`, with what may be needed to enter them."""
    site = _own_git(place) / "dvc"  # goes with it, unlike /var/tmp/dvc
    own = {"cache": {"dir": str(find_cache(root))}, "core": {"site_cache_dir": str(site)}}
    ours = read_settings(root)
    write_settings(place / ".dvc" / "config.local", ours.load_one("repo"), ours.load_one("local"), own)


def apply(place: Path, diff: Path, but: Collection[str]) -> None:
    """Applies a file of `git diff` to a worktree, without the files `but`. Raises ValueError where it does not fit."""
    if diff.read_bytes().strip():
        exclude = (f"--exclude={name}" for name in but)
        git(place, "apply", "--whitespace=nowarn", *exclude, str(diff.resolve()))


def _commit(place: Path, file: str, message: str) -> None:
    """Commits one file, under a name of ours where the person has not told git theirs."""
    env: dict[str, str] = {}
    try:
        git(place, "config", "user.email")
        for ident in ("GIT_AUTHOR_IDENT", "GIT_COMMITTER_IDENT"):
            git(place, "var", ident)  # refuses where a name is missing
    except ValueError:
        for role in ("AUTHOR", "COMMITTER"):
            env |= {f"GIT_{role}_NAME": "pipelines", f"GIT_{role}_EMAIL": "pipelines@localhost"}
    git(place, "add", "--force", file)  # a person may ignore *.lock
    git(place, "commit", "--quiet", "--allow-empty", "--no-gpg-sign", "-m", message, env=env)
