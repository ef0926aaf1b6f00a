"""Whether the source of the data is what it was at the last look; nothing is fetched."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines import params
from pipelines.data.layout import FILES
from pipelines.data.looks import describe_changes, look
from pipelines.files import write_json
from pipelines.workspace.git import git, resolve_commit
from pipelines.workspace.history import read_data_version


@contextmanager
def watch(root: Path, preset: str | None, ref: str, check: Callable[[Any], None]) -> Iterator[list[str] | None]:
    """What changed since the last look at the data of `ref` with `preset`, in words; None at the first look.

    It is remembered when the block ends well. `check` is given the parameters before a file is looked at. Raises
    ValueError or OSError where something cannot be looked at, which is no change.
    """
    name = hashlib.sha256(json.dumps([preset, ref]).encode()).hexdigest()[:16]
    path = root / "scratch" / "watch" / f"{name}.json"
    commit = resolve_commit(root, ref)
    document = read_parameters(root, preset, commit)
    check(document)
    now = look(root, document) | {"dvc.lock": read_lock(root, commit)}
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError:
        raise ValueError(f"{path} is damaged; remove it, and the next look is the first") from None
    yield None if before is None else describe_changes(before, now)
    write_json(path, now)


def read_parameters(root: Path, preset: str | None, commit: str) -> Any:
    """params.yaml of a commit with one of its presets on top; nothing is checked out."""
    listed = git(root, "ls-tree", "--name-only", commit, "--", "params.yaml", "presets/").splitlines()
    with tempfile.TemporaryDirectory() as folder:
        for name in listed:
            copy = Path(folder, name)
            copy.parent.mkdir(exist_ok=True)
            copy.write_text(git(root, "show", f"{commit}:./{name}"), encoding="utf-8")
        return params.merge_parameters(Path(folder), preset, [])


def read_lock(root: Path, commit: str) -> dict[str, str]:
    """The MD5s of the data that dvc.lock of a commit names, by file."""
    try:
        version = read_data_version(root, commit)
    except ValueError:
        return {}
    return {name: version.files[name].md5 for name in FILES}
