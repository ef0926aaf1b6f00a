"""Registered versions side by side: `python -m pipelines compare [VERSIONS]`."""

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from detr.bootstrap import Matches, bootstrap_ap, can_be_certain, find_interval, match_detections
from pipelines import params
from pipelines.data.layout import DATA
from pipelines.figures import EvaluateParams, save_figure
from pipelines.files import write_json
from pipelines.labels import make_drawable
from pipelines.registry import aliases, tracking
from pipelines.registry.lineage import read_commit
from pipelines.registry.markdown import format_table as markdown
from pipelines.registry.version import Version, find_unequal, format_signed, format_value, read

FOLDER = Path("scratch/comparisons")
METRICS = ("AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_100")
COST = re.compile(r"(train/)?(parameters_millions|gflops|images_per_second|\w+_(seconds|minutes|hours|gb))")
OF_ITSELF = {  # tags that are another's for every version, or shown elsewhere
    "data_digest", "decision", "decision_reason", "detections_sha256", "dvc_lock_sha256", "fingerprint",
    "params_sha256", "run_id", "val_digest", "weights_sha256",
}  # fmt: skip
NUM_CLASSES = 5  # of the largest gains and losses that are printed
NUM_BARS = 20  # of those that are drawn


def compare(root: Path, versions: list[str]) -> str:
    """The comparison of versions, by number or alias, with the first of them, as Markdown.

    None stand for champion and challenger, or the champion before where there is no challenger; one for itself against
    the champion. comparison.md, which has every class, comparison.png and comparison.json go to
    scratch/comparisons/A-B, and to the artifacts `comparison/A-B` of the run of the newest version. Raises ValueError
    for unknown versions, and where MLflow does not answer.
    """
    config = params.from_document(params.read_yaml(root / "params.yaml"), "evaluate", EvaluateParams)
    client = tracking.connect_to_models()
    other = "challenger" if aliases.get_by_alias(client, "challenger") else "previous_champion"
    names = versions if len(versions) > 1 else ["champion", *(versions or [other])]
    with aliases.explain_errors("the comparison"), tempfile.TemporaryDirectory() as temporary:
        found = [read(client, name, Path(temporary)) for name in names]
        if len({version.number for version in found}) < len(found):
            listed = " and ".join(f"{name} is version {v.number}" for name, v in zip(names, found, strict=True))
            raise ValueError(f"{listed}; give versions that differ: python -m pipelines compare A B")
        document = build_comparison(found, root, config)
        folder = root / FOLDER / "-".join(str(version.number) for version in found)
        write_json(folder / "comparison.json", document)
        (folder / "comparison.md").write_text(report(document, len(document["classes"])) + "\n", encoding="utf-8")
        draw(document, folder / "comparison.png")
        newest = max(found, key=lambda version: version.number)
        client.log_artifacts(newest.run_id, str(folder), f"comparison/{folder.name}")
    return f"{report(document, NUM_CLASSES)}\n\nAll classes, a picture and JSON: {folder.relative_to(root)}/"


def build_comparison(found: Sequence[Version], root: Path, config: EvaluateParams) -> dict[str, Any]:
    """The comparison as a document; every list in it is in the order of the versions, None for what is not known."""
    first, *others = found
    notes, resampled, num_images = resample(found, root / DATA / "instances_val.json", config)
    aps = [version.metrics.get("AP") for version in found]
    document: dict[str, Any] = {
        "versions": [version.number for version in found],
        "titles": [version.title for version in found],
        "AP": aps,
        "confidence": config.confidence,
        "interval": [estimate_interval(v, resampled.get(v.number), config.confidence, num_images) for v in found],
        "difference": [
            None,
            *(find_difference(first, other, resampled, config.confidence, num_images) for other in others),
        ],
        "metrics": {name: [version.metrics.get(name) for version in found] for name in METRICS},
        "classes": list_changes(found),
        "params": find_unequal([version.params for version in found]),
        "data": find_unequal([{"digest": v.tags.get("data_digest")} | v.statistics for v in found]),
        "environment": find_unequal([{k: v for k, v in x.tags.items() if k not in OF_ITSELF} for x in found]),
    }
    names = sorted({name for version in found for name in version.metrics if COST.fullmatch(name)})
    document["cost"] = {name: [version.metrics.get(name) for version in found] for name in names}
    return document | {"notes": notes}


def resample(
    found: Sequence[Version], truth: Path, config: EvaluateParams
) -> tuple[list[str], dict[int, np.ndarray], int]:
    """Why versions are not paired with the first, the resampled APs of those that are, and of how many images."""
    first, *others = found
    comparable = [first, *(other for other in others if other.held_out == first.held_out)]
    notes = [
        f"version {other.number} was evaluated on other validation data than {first.number}: not comparable"
        for other in others
        if other not in comparable
    ]
    wanted = first.data.files["instances_val.json"].md5 if first.data else None
    if wanted is None or not truth.exists() or compute_md5(truth) != wanted:
        commit = read_commit(first.tags) or "its commit"
        notes.append(
            f"not paired: {truth} is not the ground truth that version {first.number} was evaluated on; "
            f"get it: git checkout {commit} && dvc checkout"
        )
        return notes, {}, 0
    matches: dict[int, Matches] = {}
    for version in comparable:
        if version.detections is None:
            notes.append(f"not paired: MLflow has no evaluate/detections.json of version {version.number}")
        else:
            matches[version.number] = match_detections(
                truth, json.loads(version.detections.read_text(encoding="utf-8"))
            )
    if not matches:
        return notes, {}, 0
    rows = bootstrap_ap(list(matches.values()), config.num_resamples, config.seed)
    return notes, dict(zip(matches, rows, strict=True)), len(next(iter(matches.values())).objects)


def compute_md5(path: Path) -> str:
    """The digest by which DVC knows a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def estimate_interval(
    version: Version, resampled: np.ndarray | None, confidence: float, num_images: int
) -> tuple[float, float] | None:
    """The interval of a version's AP: that of its evaluation, else that of the resamples."""
    if {"AP_low", "AP_high"} <= version.metrics.keys():
        return version.metrics["AP_low"], version.metrics["AP_high"]
    return None if resampled is None else find_interval(resampled, confidence, num_images, lowest=0)


def find_difference(
    first: Version, other: Version, resampled: dict[int, np.ndarray], confidence: float, num_images: int
) -> dict[str, Any] | None:
    """How much higher AP is than the first's; paired also its interval and p, from the same resampled images.

    p is two-sided, the share of resamples on the other side of 0, none counted as one; None where the validation
    data differ. Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 13 and 16.
    """
    if other.held_out != first.held_out or not {"AP"} <= first.metrics.keys() & other.metrics.keys():
        return None
    gain = {"AP": other.metrics["AP"] - first.metrics["AP"], "paired": False}
    if first.number not in resampled or other.number not in resampled:
        return gain
    gains = resampled[other.number] - resampled[first.number]
    low, high = find_interval(gains, confidence, num_images)
    rarer = min(int((gains <= 0).sum()), int((gains >= 0).sum()))
    p = min(1.0, 2 * (rarer + 1) / (len(gains) + 1))
    significant = not low <= 0 <= high and can_be_certain(num_images, confidence)
    return gain | {"paired": True, "low": low, "high": high, "p": p, "significant": significant}


def list_changes(found: Sequence[Version]) -> list[dict[str, Any]]:
    """AP by class and its change from the first version, falling in the change of the last."""
    names = dict.fromkeys(name for version in found for name in version.classes)
    rows = []
    for name in names:
        aps = [version.classes.get(name) for version in found]
        gains = [None if ap is None or aps[0] is None else ap - aps[0] for ap in aps[1:]]
        rows.append({"name": name, "AP": aps, "change": [None, *gains]})
    return sorted(rows, key=lambda row: -(row["change"][-1] or 0.0))


def report(document: dict[str, Any], num_classes: int) -> str:
    """The document in Markdown, with at most `num_classes` gains and as many losses of classes."""
    header = ["", *document["titles"]]
    share = f"{document['confidence']:.0%}"
    gains = document["difference"][1:]

    def fixed(values: Sequence[float | None]) -> list[str]:
        return ["-" if value is None else f"{value:.4f}" for value in values]

    def of(show: Callable[[dict[str, Any]], str]) -> list[str]:
        return ["", *("not comparable" if gain is None else show(gain) for gain in gains)]

    def paired(gain: dict[str, Any]) -> str:
        return f"{gain['low']:+.4f} to {gain['high']:+.4f}" if gain["paired"] else "not paired"

    def verdict(gain: dict[str, Any]) -> str:
        said = "significant" if gain.get("significant") else "not significant"
        return f"{said}, p {gain['p']:.3f}" if gain["paired"] else "not paired"

    def of_objects(values: Sequence[float | None]) -> list[str]:
        known = zip(values, document["AP"], strict=True)
        return ["no such objects" if value is None and ap is not None else fixed([value])[0] for value, ap in known]

    rows = [
        ["AP", *fixed(document["AP"])],
        [f"{share} interval", *("-" if ends is None else " to ".join(fixed(ends)) for ends in document["interval"])],
        [f"difference to {document['versions'][0]}", *of(lambda gain: format_signed(gain["AP"]))],
        [f"its {share} interval", *of(paired)],
        ["", *of(verdict)],
        *([name, *of_objects(values)] for name, values in document["metrics"].items()),
    ]
    parts = [markdown([header, *rows]), *(f"- {note}" for note in document["notes"])]
    classes = [row for row in document["classes"] if row["change"][-1] is not None]
    some = classes if len(classes) <= 2 * num_classes else [*classes[:num_classes], *classes[-num_classes:]]
    if some:
        cells = ([r["name"], *fixed(r["AP"]), *(format_signed(gain) for gain in r["change"][1:])] for r in some)
        titles = [*header[1:], *(f"{number} - {document['versions'][0]}" for number in document["versions"][1:])]
        parts += ["", f"AP of {len(some)} of {len(document['classes'])} classes, by the last change"]
        parts += ["", markdown([["class", *titles], *cells])]
    for key, title in (("params", "Parameters"), ("data", "Data"), ("environment", "Code, libraries and machine")):
        parts += ["", f"{title} that differ" if document[key] else f"{title}: nothing differs"]
        if document[key]:
            parts += ["", markdown([header, *([name, *map(format_value, v)] for name, v in document[key].items())])]
    if document["cost"]:
        parts += [
            "",
            "Cost",
            "",
            markdown([header, *([n, *map(format_value, v)] for n, v in document["cost"].items())]),
        ]
    return "\n".join(parts)


def draw(document: dict[str, Any], path: Path) -> None:
    """AP with intervals, and for every version after the first the largest changes by class."""
    titles, rows = document["titles"], document["classes"]

    def paint(figure: Any, axes: Any) -> None:
        axes.remove()
        left, *others = figure.subplots(1, len(titles))
        for k, (ap, ends) in enumerate(zip_longest(document["AP"], document["interval"])):
            if ap is not None:
                reach = None if ends is None else [[max(0.0, ap - ends[0])], [max(0.0, ends[1] - ap)]]
                left.errorbar([k], [ap], reach, marker="o", capsize=5, color="#4363d8")
        left.set(xticks=range(len(titles)), xticklabels=titles, ylabel="AP", title="AP, with its interval")
        left.margins(x=0.3)
        for k, axis in enumerate(others, start=1):
            known = [row for row in rows if row["change"][k] is not None]
            known = sorted(known, key=lambda row: -abs(row["change"][k]))[:NUM_BARS]
            known.sort(key=lambda row: row["change"][k])
            values = [row["change"][k] for row in known]
            names = make_drawable(row["name"] for row in known)
            axis.barh(
                range(len(names)), values, tick_label=names, color=["#3cb44b" if v > 0 else "#e6194b" for v in values]
            )
            axis.axvline(0, color="black", linewidth=0.8)
            axis.tick_params(axis="y", labelsize=7)
            axis.set(xlabel="change of AP", title=f"classes of {titles[k]} to {titles[0]}")

    save_figure(path, (4.5 * len(titles), 4.5), paint, [row["name"] for row in rows])
