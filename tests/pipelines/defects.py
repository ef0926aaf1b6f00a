"""Defects to plant in a dataset, each with what must be found of it."""

import json
import warnings
import zipfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Dataset:
    """A dataset in memory, to break: `json[split]` and `files[split]`, pairs of name and bytes."""

    def __init__(self, folder):
        self.json = {
            s: json.loads((folder / f"instances_{s}.json").read_text(encoding="utf-8")) for s in ("train", "val")
        }
        self.files = {}
        for split in self.json:
            with zipfile.ZipFile(folder / f"{split}.zip") as archive:
                self.files[split] = [(name, archive.read(name)) for name in archive.namelist()]
        self.compressed = set()
        self.damaged = {}

    def write(self, folder):
        folder.mkdir()
        for split, document in self.json.items():
            (folder / f"instances_{split}.json").write_text(json.dumps(document), encoding="utf-8")
            with zipfile.ZipFile(folder / f"{split}.zip", "w") as archive, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a name that is there already
                for name, data in self.files[split]:
                    kind = zipfile.ZIP_DEFLATED if (split, name) in self.compressed else zipfile.ZIP_STORED
                    archive.writestr(name, data, kind)
        for old, new in self.damaged.items():
            data = (folder / "train.zip").read_bytes()
            assert data.count(old) == 1
            (folder / "train.zip").write_bytes(data.replace(old, new))
        return folder

    def __getitem__(self, key):
        kind, index = key
        return self.json["train"][kind][index]

    def picture(self, index):
        return self.files["train"][index][1]

    def set_picture(self, index, data):
        self.files["train"][index] = self.files["train"][index][0], data


class Defect(NamedTuple):
    change: Callable  # breaks a dataset
    rule: str  # what it breaks, as "table rule"
    level: str
    ids: Callable  # the ids that must be reported, of the dataset before
    count: Any  # how many rows break the rule, or of the dataset before, where they are not as many as the ids
    also: set[str]  # the other rules that it must break


def planting(defects: dict[str, Defect]) -> Callable:
    """A decorator `defect(title, rule, ...)` that puts into `defects` what breaks a dataset."""

    def defect(
        title: str,
        rule: str,
        level: str = "error",
        table: str = "train_images",
        ids: Callable | None = None,
        count: int | None = None,
        also: Iterable[str] = (),
    ) -> Callable:
        def register(change: Callable) -> Callable:
            assert title not in defects
            defects[title] = Defect(change, f"{table} {rule}", level, ids, count, set(also))
            return change

        return register

    return defect


def image(*indices):
    return lambda d: [d["images", k]["id"] for k in indices]


def annotation(*indices):
    return lambda d: [d["annotations", k]["id"] for k in indices]


def fixed(*ids):
    return lambda d: list(ids)


def setting(kind, index, **values):
    return lambda d: d[kind, index].update(values)


def without(kind, index, key):
    return lambda d: d[kind, index].pop(key)
