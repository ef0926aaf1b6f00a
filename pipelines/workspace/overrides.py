"""Parameters that come from a form, a schedule or a command line: merged, checked, confined to the project's files."""

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from pipelines.data.sources import split_place
from pipelines.params import check_section, merge_parameters, to_yaml
from pipelines.redaction import refuse_password
from pipelines.stage import quote_error

DATA_ROOTS = "DETR_DATA_ROOTS"  # in a worker's environment: folders outside the project that parameters may name
MOST_VALUES = 10_000  # of params.yaml
NAMES = ("shapes", "none", "imagenet")  # of sources and weights that are no files


def check_parameters(root: Path, preset: str | None, overrides: Collection[str]) -> Any:
    """`merge_parameters` for overrides from anywhere, to be committed. Raises ValueError, whatever they hold."""
    try:
        document = merge_parameters(root, preset, overrides)
        _check_values(document if preset or overrides else {})
        to_yaml(document)
    except ValueError:
        raise
    except Exception as error:  # of YAML's parser and writer, which raise much
        said = quote_error(error, 200)
        raise ValueError(f"one of {[text[:100] for text in overrides]} is not valid YAML: {said}") from error
    return document


def _check_values(document: Any) -> None:
    """Raises ValueError for URLs with passwords, and for more values than anyone writes.

    A few letters of YAML are billions of values where aliases refer to aliases.
    """
    todo, number = [("params.yaml", document)], 0
    while todo:
        (key, value), number = todo.pop(), number + 1
        if number > MOST_VALUES:
            raise ValueError(f"{key} has more than {MOST_VALUES} values; write them without YAML's aliases (&, *)")
        if isinstance(value, dict):
            todo += [(str(name), one) for name, one in value.items()] + [(key, name) for name in value]
        elif isinstance(value, list | tuple | set):
            todo += [(key, one) for one in value]
        elif isinstance(value, str):
            refuse_password(key, value)


def confine(document: Any, root: Path) -> None:
    """Raises ValueError where params name a file outside of `root` and of the folders of DETR_DATA_ROOTS."""
    allowed = [root.resolve(), *(Path(x).resolve() for x in os.environ.get(DATA_ROOTS, "").split(os.pathsep) if x)]

    def check(key: str, place: str) -> None:
        if "://" in place:
            raise ValueError(f"{key} is {place!r}; of URLs only http:// and https:// work: mount it, and give its path")
        try:
            path = (root / split_place(place, root)[0]).resolve()
            inside = [one.resolve() for one in path.iterdir()] if path.is_dir() else []
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long, no name at all
            raise ValueError(f"{key} is {place[:200]!r}, no path that can be followed: {error}") from error
        for one in (path, *inside):
            if not any(one.is_relative_to(folder) for folder in allowed):
                leads = f", which leads to {one}" if one != Path(os.path.normpath(root / place)) else ""
                raise ValueError(
                    f"{key} is {place!r}{leads}, outside of the project; put it into the project, or have the "
                    f"worker's {DATA_ROOTS} name its folder"
                )

    _each_place(document, check)


def make_paths_absolute(document: Any, root: Path, worktree: Path | None = None) -> None:
    """Makes the local files that params name independent of the directory that a run works in.

    Those that lie in `worktree`, where one is given, stay as they are.
    """

    def absolute(key: str, place: str) -> str:
        if worktree and (worktree / split_place(place, worktree)[0]).exists():
            return place
        return str((root / place).resolve())

    _each_place(document, absolute)


def _each_place(document: Any, visit: Callable[[str, str], str | None]) -> None:
    """Calls `visit` with the key and the value of every file that params name, which becomes what it returns.

    Raises ValueError for params of another version of the project, which lack a key that names files.
    """

    def visited(key: str, place: str) -> str:
        if place in NAMES or place.lower().startswith(("http://", "https://")):
            return place
        return visit(key, place) or place

    download = check_section(document, "download", {"source": str | dict[str, str], "sha256": dict[str, str]})
    model = check_section(document, "model", {"backbone_weights": str})
    train = check_section(document, "train", {"initial_weights": str})
    if isinstance(download["source"], dict):
        download["source"] = {name: visited(f"download.source.{name}", x) for name, x in download["source"].items()}
    else:
        download["source"] = visited("download.source", download["source"])
    download["sha256"] = {visited("download.sha256", x): digest for x, digest in download["sha256"].items()}
    model["backbone_weights"] = visited("model.backbone_weights", model["backbone_weights"])
    if "/" in train["initial_weights"] or Path(train["initial_weights"]).suffix:  # others are names
        train["initial_weights"] = visited("train.initial_weights", train["initial_weights"])
