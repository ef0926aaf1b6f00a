"""What MLflow keeps of a registered version, to be put beside that of another."""

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.data.versions import DataVersion, read_version
from pipelines.labels import ABSENT
from pipelines.registry import tracking

COUNTS = re.compile(r"(train|val)\.(images|annotations|crowds|images_without_objects|(class|area)\..*)")


@dataclass(frozen=True)
class Version:
    """What MLflow keeps of a registered version; what one of an older release lacks is empty."""

    number: int
    aliases: list[str]
    run_id: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]
    classes: dict[str, float]  # AP by name, of those with objects
    statistics: dict[str, int]  # counts of the data
    data: DataVersion | None
    detections: Path | None

    @property
    def title(self) -> str:
        return f"{self.number} ({', '.join(self.aliases)})" if self.aliases else str(self.number)

    @property
    def held_out(self) -> tuple[str, ...]:
        """What versions judged on the same images and annotations have in common."""
        if self.data is None:
            return (self.tags.get("val_digest", f"of version {self.number}"),)
        return tuple(self.data.files[name].md5 for name in ("instances_val.json", "val.zip"))


def read(client: Any, name: str, folder: Path, with_detections: bool = True) -> Version:
    """A version by number or alias, its artifacts fetched into `folder`. Raises ValueError where there is none."""
    version = client.get_model_version(tracking.MODEL, str(tracking.find_version(client, name).version))
    run = client.get_run(version.run_id).data
    place = folder / version.run_id
    place.mkdir(exist_ok=True)  # two versions may be of one run

    def fetched(path: str) -> Path | None:
        return tracking.fetch_artifact(client, version.run_id, path, place)

    tags = {key: value for key, value in version.tags.items() if not key.startswith("mlflow.")}
    own = {key: float(value) for key, value in tags.items() if re.fullmatch(r"A[PR]\w*", key)}
    lock, statistics, table = (fetched(p) for p in ("dvc.lock", "validate/statistics.json", "evaluate/per_class.csv"))
    held = tracking.flatten(json.loads(statistics.read_text(encoding="utf-8"))) if statistics else {}
    return Version(
        int(version.version),
        sorted(version.aliases),
        version.run_id,
        {key: value for key, value in tags.items() if key not in run.metrics and key not in own},
        run.params,
        {key: value for key, value in (run.metrics | own).items() if value != ABSENT},
        read_per_class(table) if table else {},
        {key: value for key, value in held.items() if COUNTS.fullmatch(key)},
        read_version(lock.read_text(encoding="utf-8"), "", "") if lock else None,
        fetched("evaluate/detections.json") if with_detections else None,
    )


def read_per_class(path: Path) -> dict[str, float]:
    with path.open(newline="", encoding="utf-8") as file:
        return {row["name"]: float(row["AP"]) for row in csv.DictReader(file) if float(row["AP"] or ABSENT) != ABSENT}


def find_unequal(sides: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The values, by name, that are not the same on all sides, None where there is none."""
    names = dict.fromkeys(name for side in sides for name in side)
    rows = {name: [side.get(name) for side in sides] for name in names}
    return {name: row for name, row in rows.items() if any(value != row[0] for value in row)}


def format_value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)[: 12 if re.fullmatch(r"[0-9a-f]{40,64}", str(value)) else 60]


def format_signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"
