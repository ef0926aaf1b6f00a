"""The versions of the data in the history of dvc.lock, and their files."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from pipelines.data.versions import DataVersion, read_version
from pipelines.stage import quote_error
from pipelines.workspace.git import git, resolve_commit


def list_data_versions(root: Path) -> tuple[list[DataVersion], DataVersion | None]:
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


def read_data_version(root: Path, ref: str | None) -> DataVersion:
    """The data of a commit, or, without one, of the working tree. Raises ValueError where there is none."""
    if ref is None:
        version = _locked_at(root)
    else:
        try:
            commit = resolve_commit(root, ref)
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
        lock = git(root, "show", f"{commit}:./dvc.lock") if commit else (root / "dvc.lock").read_text(encoding="utf-8")
    except (ValueError, FileNotFoundError):
        return None
    return read_version(lock, commit, date)


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
            reason = quote_error(error)
            raise ValueError(f"{path} of {version.title} cannot be read (remote: {remote}): {reason}") from error
        yield file
