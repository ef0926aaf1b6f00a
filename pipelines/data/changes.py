"""What changed between two versions of the data: image by image, annotation by annotation, class by class."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from detr.annotation_file import Document, Entries
from pipelines.data.layout import DATA
from pipelines.data.versions import (
    SPLITS,
    DataVersion,
    Opened,
    Table,
    add_pictures,
    align_columns,
    format_title,
    read,
    tabulate,
)

NUM_IDS = 10  # printed of each kind of change


def find_changes(old: DataVersion, new: DataVersion, opened: Opened) -> dict[str, Any]:
    """What changed from one version to another, per split, as JSON.

    Images, annotations and categories are told apart by id. An image is altered where its file name, its size or the
    picture (CRC-32 and length) differs, an annotation where its box, category, image, area or crowd flag does. In
    `classes` an annotation that changed its category is altered in both. Raises ValueError for files that cannot be
    had or are no COCO files.
    """
    document: dict[str, Any] = {
        name: {"commit": version.commit or None, "date": version.date or None}
        for name, version in (("old", old), ("new", new))
    }
    for split in SPLITS:
        annotations, archive = f"instances_{split}.json", f"{split}.zip"
        before = after = tabulate(read(old, annotations, opened, Document), f"{DATA}/{annotations} of {old.title}")
        if old.files[annotations] != new.files[annotations]:
            after = tabulate(read(new, annotations, opened, Document), f"{DATA}/{annotations} of {new.title}")
        if old.files[archive] != new.files[archive]:
            before = before | {"images": add_pictures(before["images"], old, archive, opened)}
            after = after | {"images": add_pictures(after["images"], new, archive, opened)}
        document[split] = _compare(before, after)
    return document


@dataclass(frozen=True)
class Change:
    """Rows of two tables of entries, told apart by id."""

    added: np.ndarray  # rows of the new table
    removed: np.ndarray  # rows of the old one
    altered: tuple[np.ndarray, np.ndarray]  # the same entries' rows of the old and of the new one
    fields: dict[str, int]  # how many of the altered differ in a column


def _change(old: Table, new: Table) -> Change:
    _, in_old, in_new = np.intersect1d(old["id"], new["id"], return_indices=True)
    unequal = {name: old[name][in_old] != new[name][in_new] for name in new if name != "id"}
    unequal = {name: rows.any(axis=1) if rows.ndim > 1 else rows for name, rows in unequal.items()}
    altered = np.logical_or.reduce([*unequal.values()])
    return Change(
        np.flatnonzero(~np.isin(new["id"], old["id"])),
        np.flatnonzero(~np.isin(old["id"], new["id"])),
        (in_old[altered], in_new[altered]),
        {name: int(rows.sum()) for name, rows in unequal.items()},
    )


def _compare(before: dict[str, Table], after: dict[str, Table]) -> dict[str, Any]:
    """A split of `find_changes`."""
    changes = {name: _change(before[name], after[name]) for name in before}
    document: dict[str, Any] = {}
    for name, change in changes.items():
        old, new = before[name]["id"], after[name]["id"]
        document[name] = {"before": len(old), "after": len(new)}
        ids = {"added": new[change.added], "removed": old[change.removed], "altered": new[change.altered[1]]}
        document[name] |= {kind: np.sort(found).tolist() for kind, found in ids.items()} | {"fields": change.fields}
    names = [dict(zip(t["categories"]["id"].tolist(), t["categories"]["name"], strict=True)) for t in (before, after)]
    document["categories"]["names"] = [
        {"id": key, "before": names[0].get(key), "after": names[1].get(key)}
        for key in sorted({*names[0], *names[1]})
        if names[0].get(key) != names[1].get(key)
    ]
    document["classes"] = _classes(before["annotations"], after["annotations"], changes["annotations"], names)
    return document


def _classes(old: Table, new: Table, change: Change, names: list[dict[int, str]]) -> list[dict[str, Any]]:
    """The change of the annotations class by class, of every id that a category or an annotation has."""
    was, now = old["category_id"], new["category_id"]
    known = names[0] | names[1]
    keys = np.unique(np.concatenate([np.array([*known], dtype=np.int64), was, now]))

    def tally(category_ids: np.ndarray) -> np.ndarray:
        return np.bincount(np.searchsorted(keys, category_ids), minlength=len(keys))

    left, joined = (ids[rows] for ids, rows in zip((was, now), change.altered, strict=True))
    columns = {
        "before": tally(was),
        "after": tally(now),
        "added": tally(now[change.added]),
        "removed": tally(was[change.removed]),
        "altered": tally(joined) + tally(left[left != joined]),
    }
    return [
        {"id": int(key), "name": known.get(int(key)), **{name: int(column[k]) for name, column in columns.items()}}
        for k, key in enumerate(keys)
    ]


def report(document: dict[str, Any]) -> str:
    """What `find_changes` returns as text: per split counts, classes, and the first ids of each kind of change."""
    columns = ("before", "after", "added", "removed", "altered")
    parts = [f"from {format_title(**document['old'])} to {format_title(**document['new'])}"]
    for split in SPLITS:
        lines, kinds = [[split, *columns]], document[split]
        for name in Entries.__struct_fields__:
            values = (kinds[name][column] for column in columns)
            lines.append([name, *(str(len(v) if isinstance(v, list) else v) for v in values)])
        lines += [[f"  {c['id']} {c['name'] or '?'}", *(str(c[name]) for name in columns)] for c in kinds["classes"]]
        parts += ["", align_columns(lines)]
        for name in ("images", "annotations"):
            for kind in columns[2:]:
                if ids := kinds[name][kind]:
                    shown = ", ".join(map(str, ids[:NUM_IDS])) + ", ..." * (len(ids) > NUM_IDS)
                    why = ", ".join(f"{field} {n}" for field, n in kinds[name]["fields"].items() if n)
                    parts.append(f"{name} {kind}{f' ({why})' if kind == 'altered' else ''}: {shown}")
        for c in kinds["categories"]["names"]:
            verb = "is new" if c["before"] is None else "is gone" if c["after"] is None else f"is now {c['after']}"
            parts.append(f"category {c['id']} {c['before'] or c['after']} {verb}")
    return "\n".join(parts)
