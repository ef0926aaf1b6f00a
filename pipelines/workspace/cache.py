"""DVC's cache: where it is, and its garbage."""

import json
import tempfile
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipelines.params import read_yaml
from pipelines.workspace.dvc import call
from pipelines.workspace.git import git


def find_cache(root: Path) -> Path:
    """Where DVC keeps its cache, by the settings of the project, the person and the machine. Raises ValueError."""
    return Path(read_settings(root)["cache"].get("dir") or root / ".dvc" / "cache").resolve()


def require_cache(root: Path) -> None:
    """Raises ValueError where DVC can keep nothing in its cache, or give nothing of it to the working tree."""
    from dvc.fs import localfs  # type: ignore[import-untyped]
    from dvc_objects.fs.generic import test_links

    cache, kinds = find_cache(root), read_settings(root)["cache"].get("type") or ["copy"]
    try:
        can = test_links(kinds, localfs, str(cache / "files" / "md5"), localfs, str(root / ".dvc" / "tmp" / "link"))
    except OSError as error:
        raise ValueError(
            f"the DVC cache is {cache}, expected a folder to write in ({error.strerror}); mend that, or take another: "
            "dvc cache dir --local FOLDER"
        ) from error
    if not can:
        raise ValueError(
            f"the DVC cache {cache} gives {root} nothing by {', '.join(kinds)}, which cache.type allows alone; let it "
            "copy too: dvc config --local cache.type reflink,hardlink,symlink,copy"
        )


def read_settings(root: Path) -> Any:
    from dvc.config import Config, ConfigError  # type: ignore[import-untyped]

    try:
        return Config(str(root / ".dvc"))
    except ConfigError as error:
        said = " ".join(str(error).split())
        raise ValueError(f"the settings of DVC, of {root}/.dvc or of this user, cannot be read: {said}") from error


def write_settings(file: Path, *some: Mapping[str, Any]) -> None:
    """Writes settings as DVC reads them, later ones over earlier; its own writer takes letters of ASCII alone."""
    from configobj import ConfigObj  # type: ignore[import-untyped]
    from dvc.config import _pack_named, merge

    settings: dict[str, Any] = {"remote": {}, "machine": {}, "db": {}}
    for one in some:
        merge(settings, one)
    file.parent.mkdir(exist_ok=True)
    with file.open("wb") as opened:
        ConfigObj(_pack_named(settings), encoding="utf-8").write(opened)


def collect_garbage(root: Path, locks: Mapping[str, str], log: Callable[[str], None], dry: bool = False) -> int:
    """Removes from the DVC cache what neither the working tree, nor a commit, nor one of `locks` names.

    `locks` are texts of dvc.lock by name. Gives the bytes that it freed or, when `dry`, would free. Entries of the run
    cache whose outputs are gone go too: DVC leaves them for ever. Raises StageFailed.
    """
    cache, listed = find_cache(root), set[Path]()

    def take(line: str) -> None:
        if dry and line.startswith("Removing "):
            listed.add(Path(line.removeprefix("Removing ")))
        else:
            log(line)

    before = count_bytes(cache)
    command = ["dvc", "--wait-for-lock", "gc", "--force", *["--dry"] * dry, "--workspace", "--all-commits"]
    with tempfile.TemporaryDirectory() as folder:
        if locks:
            _name_all(Path(folder), cache, locks)
            command += ["--projects", folder]
        call(command, root, take)
    dead = [entry for entry in cache.glob("runs/*/*/*") if not _can_restore(entry, cache, listed)]
    if dry:
        return sum(count_bytes(path) for path in (*listed, *dead))
    for entry in dead:
        entry.unlink(missing_ok=True)
        with suppress(OSError):  # where another entry is left
            entry.parent.rmdir()
            entry.parent.parent.rmdir()
    return before - count_bytes(cache)


def _name_all(project: Path, cache: Path, locks: Mapping[str, str]) -> None:
    """Makes a DVC project that names all outputs in `locks`, for --projects of `dvc gc`."""
    git(project, "init", "--quiet", "--template=")  # --all-commits asks every project for its commits
    own = {"cache": {"dir": str(cache)}, "core": {"site_cache_dir": str(project / ".dvc" / "site")}}
    write_settings(project / ".dvc" / "config", own)
    for name, text in locks.items():
        stages = (YAML(typ="safe").load(text) or {}).get("stages", {}).values()
        made = [out for stage in stages for out in stage.get("outs", []) if _in_cache(cache, out).exists()]
        kept = ("md5", "hash", "size", "nfiles")
        outs = [{"path": str(k)} | {key: out[key] for key in kept if key in out} for k, out in enumerate(made)]
        (project / name).mkdir()
        (project / name / "outs.dvc").write_text(json.dumps({"outs": outs}), encoding="utf-8")


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


def count_bytes(path: Path) -> int:
    """The bytes of a file, or of all files in a folder; what links lead to is not counted."""
    files = (one for one in (path, *path.rglob("*")) if one.is_symlink() or one.is_file())
    return sum(one.lstat().st_size for one in files)
