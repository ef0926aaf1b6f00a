"""Versions of the data: what each one holds.

Nothing here knows where old files are kept: `opened(version, path)` yields one as a seekable binary file.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, TypeVar

import numpy as np
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from detr.annotation_file import Document, Entries, column, parse
from pipelines.data.layout import DATA, FILES

T = TypeVar("T")
Table = dict[str, np.ndarray]  # a column per name, a row per entry; one column is `id`
SPLITS = ("train", "val")
PASSED = "artifacts/validate/passed.json"


@dataclass(frozen=True)
class DataFile:
    md5: str
    size: int  # bytes


@dataclass(frozen=True)
class DataVersion:
    """The four data files as a dvc.lock names them."""

    commit: str  # short; empty for the working tree
    date: str  # of the commit
    files: dict[str, DataFile]
    validated: bool  # whether the passed.json of that dvc.lock is about these files

    @property
    def content(self) -> tuple[str, ...]:
        """What two versions of the same data have in common."""
        return tuple(self.files[name].md5 for name in FILES)

    @property
    def title(self) -> str:
        return format_title(self.commit, self.date)


Opened = Callable[[DataVersion, str], AbstractContextManager[BinaryIO]]


def read_version(lock: str, commit: str, date: str) -> DataVersion | None:
    """The version of the data that the text of a dvc.lock names, or None where it names none."""
    try:
        stages = YAML(typ="safe").load(lock)["stages"]
        made = {out["path"]: DataFile(out["md5"], out["size"]) for out in stages["download"]["outs"]}
        files = {name: made[f"{DATA}/{name}"] for name in FILES}
        judged = {dep["path"]: dep.get("md5") for dep in stages.get("validate", {"deps": []})["deps"]}
    except (YAMLError, AttributeError, KeyError, TypeError):
        return None
    return DataVersion(commit, date, files, all(judged.get(f"{DATA}/{n}") == f.md5 for n, f in files.items()))


def describe(version: DataVersion, opened: Opened, known: dict[str, Any]) -> dict[str, Any]:
    """A version as JSON: commit, date, digest, and per split its counts and bytes.

    Counts are taken from `known`, by the MD5 of an annotation file, and added there. What cannot be had is None, and
    `problem` says why. The digest is that of passed.json, None for data that did not pass.
    """
    row: dict[str, Any] = {"commit": version.commit or None, "date": version.date or None, "digest": None}
    row |= {"problem": None, "files": {name: asdict(file) for name, file in version.files.items()}}
    for split in SPLITS:
        row[split] = dict.fromkeys(Entries.__struct_fields__)
        row[split]["bytes"] = sum(file.size for name, file in version.files.items() if split in name)
    try:
        for split in SPLITS:
            name = f"instances_{split}.json"
            md5 = version.files[name].md5
            if md5 not in known:
                held = read(version, name, opened, Entries)
                known[md5] = {kind: len(getattr(held, kind)) for kind in Entries.__struct_fields__}
            row[split] |= known[md5]
        if version.validated:
            with opened(version, PASSED) as file:
                row["digest"] = json.load(file)["data"]
    except ValueError as error:
        row["problem"] = str(error)
    return row


def read(version: DataVersion, name: str, opened: Opened, kind: type[T]) -> T:
    """An annotation file of a version. Raises ValueError for one that is another or not in COCO's format."""
    with opened(version, f"{DATA}/{name}") as file:
        data = file.read()
    if hashlib.md5(data, usedforsecurity=False).hexdigest() != version.files[name].md5:
        raise ValueError(f"{DATA}/{name} of {version.title} is not what dvc.lock names; put it back: dvc checkout")
    return parse(data, kind, f"{DATA}/{name} of {version.title}")


def tabulate(document: Document, name: str) -> dict[str, Table]:
    """The tables `images`, `annotations` and `categories`. Raises ValueError for values that are not as expected."""

    def integers(kind: str, *keys: str) -> Table:
        return {key: np.array(column(document, kind, key, name), dtype=np.int64) for key in keys}

    def reals(key: str) -> np.ndarray:
        return np.array(column(document, "annotations", key, name), dtype=np.float64)

    sizes = integers("images", "id", "height", "width")
    texts = [_texts(column(document, *key, name)) for key in (("images", "file_name"), ("categories", "name"))]
    return {
        "images": {
            "id": sizes["id"],
            "file_name": texts[0],
            "size": np.stack([sizes["height"], sizes["width"]], axis=1),
        },
        "annotations": integers("annotations", "id", "category_id", "image_id", "iscrowd")
        | {"bbox": reals("bbox").reshape(-1, 4), "area": reals("area")},
        "categories": integers("categories", "id") | {"name": texts[1]},
    }


def _texts(texts: Any) -> np.ndarray:
    return np.array([*texts], dtype=object)


def add_pictures(images: Table, version: DataVersion, name: str, opened: Opened) -> Table:
    """The table with CRC-32 and length of each picture [N, 2], from the zip's directory; -1 where there is none."""
    try:
        with opened(version, f"{DATA}/{name}") as file, zipfile.ZipFile(file) as archive:
            members = {info.filename: (info.CRC, info.file_size) for info in archive.infolist()}
    except zipfile.BadZipFile as error:
        raise ValueError(f"{DATA}/{name} of {version.title} is not a whole zip file ({error})") from error
    for path in list(members):
        members.setdefault(path.rpartition("/")[2], members[path])
    found = [members.get(path, (-1, -1)) for path in images["file_name"]]
    return images | {"picture": np.array(found, dtype=np.int64).reshape(-1, 2)}


def format_overview(rows: list[dict[str, Any]]) -> str:
    """Described versions as an aligned table, and below it why something in it is not known."""
    lines = [["  commit", "date", "digest", *Entries.__struct_fields__, "bytes"]]
    for row in rows:
        pairs = [[row[split][name] for split in SPLITS] for name in (*Entries.__struct_fields__, "bytes")]
        counts = ["/".join("?" if number is None else str(number) for number in pair) for pair in pairs]
        mark = "* " if row["current"] else "  "
        lines.append([mark + (row["commit"] or "-"), row["date"] or "-", (row["digest"] or "-")[:12], *counts])
    notes = ["* what dvc.lock names here; counts and bytes of train/val"]
    notes += [f"? {row['problem']}" for row in rows if row["problem"]]
    if not all(row["commit"] for row in rows):
        notes.append("- is in no commit yet: git add dvc.lock && git commit")
    return "\n".join([align_columns(lines), "", *notes])


def format_title(commit: str | None, date: str | None) -> str:
    return f"{commit} ({date})" if commit else "the working tree"


def align_columns(lines: list[list[str]]) -> str:
    """A table of text: the first column flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))])
        for first, *rest in lines
    )
