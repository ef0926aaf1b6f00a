"""What a person reads of a run in the Prefect UI: pages, a table, pictures. Knows nothing of Prefect."""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.data.layout import DOCS_DIGEST
from pipelines.data.rules import describe
from pipelines.labels import ABSENT, say_metric
from pipelines.params import read_yaml
from pipelines.redaction import redact
from pipelines.registry import aliases, tracking, version
from pipelines.registry.lineage import read_commit
from pipelines.registry.markdown import escape_text, fence_lines, format_table
from pipelines.registry.version import Version, find_unequal, format_signed, format_value
from pipelines.retraining.advice import advise
from pipelines.retraining.montage import collect_pictures
from pipelines.stage import quote_error
from pipelines.workspace.history import open_version

UI = "DETR_MLFLOW_UI"  # in the environment: MLflow's address as browsers reach it, where that is another
NUM_DIFFERENCES = 40  # rows of a table of what changed
LONGEST_LINE = 2000  # characters of a line of a failure


@dataclass(frozen=True)
class Stage:
    """How a stage went: `ran`, `restored` or `unchanged`, and how long that took."""

    name: str
    outcome: str
    seconds: float


@dataclass(frozen=True)
class Result:
    """A finished run: a headline, a page in Markdown, rows of metrics, pictures (URL, description) by key.

    `missing` says what could not be had.
    """

    headline: str
    markdown: str
    metrics: list[dict[str, Any]]
    pictures: dict[str, tuple[str, str]]
    missing: list[str]


@dataclass(frozen=True)
class Registration:
    """What MLflow knows of a version: the champion that it was judged against, and that decision (gate.as_json)."""

    experiment_id: str
    new: Version
    champion: Version | None
    decision: dict[str, Any]

    @property
    def rival(self) -> str:
        return aliases.name_rival(self.decision.get("alias"))


def compose_result(place: Path, root: Path, branch: str, note: str, stages: Sequence[Stage]) -> Result:
    """The result of the run in the worktree `place`: against the champion, what changed, where it all is.

    What MLflow does not give is left out and named in `missing`.
    """
    evaluated = place / "artifacts" / "evaluate"
    metrics: dict[str, float] = json.loads((evaluated / "metrics.json").read_text(encoding="utf-8"))
    number = json.loads((place / "artifacts/register/version.json").read_text(encoding="utf-8"))["version"]
    share = float(read_yaml(place / "params.yaml")["register"]["confidence"])
    missing: list[str] = []
    known = None
    try:
        known = look_up(str(number), missing)
        changed = describe_changes(known, root, missing)
        where = list_links(known)
    except Exception as error:  # of MLflow, and of whatever its artifacts are kept in
        missing.append(f"what MLflow has of version {number}: {redact(quote_error(error))}")
        changed, where = [], []
    headline = compose_title(number, metrics["AP"], known, branch)
    page = [f"# {headline}", ""]
    if known and (reason := known.new.tags.get("decision_reason")):
        page += [f"{escape_text(reason[:1].upper() + reason[1:])}.", ""]
    if note.strip():
        page += [f"**Note:** {escape_text(note)}", ""]
    page += [f"- Missing here: {escape_text(one)}" for one in missing]
    page += ["", describe_gain(metrics, known, share), "", *changed, "## Where it is", "", *where]
    page += [f"- Branch `{branch}`, in the clone of the worker; to have its files:", ""]
    page += [fence_lines([f"git checkout {branch} && dvc checkout"]), "", "## How long it took", ""]
    times = ([one.name, one.outcome, format_duration(one.seconds)] for one in stages)
    page += [format_table([["stage", "outcome", "time"], *times])]
    rows = list_rows(metrics, known)
    return Result(headline, redact("\n".join(page)) + "\n", rows, collect_pictures(evaluated / "plots"), missing)


def look_up(number: str, missing: list[str]) -> Registration:
    """The version, and what it was judged against. Raises what MLflow and its stores raise."""
    client = tracking.connect_to_models()
    with aliases.explain_errors("the report"), tempfile.TemporaryDirectory() as temporary:
        new = version.read(client, number, Path(temporary), with_detections=False)
        path = tracking.fetch_artifact(client, new.run_id, "register/decision.json", Path(temporary))
        decision = json.loads(path.read_text(encoding="utf-8")) if path else {}
        if decision.get("candidate", {}).get("version") != number:  # of another version of the same run
            decision = {}
        champion = None
        if decision.get("champion"):
            try:
                champion = version.read(client, decision["champion"]["version"], Path(temporary), False)
            except ValueError as error:
                missing.append(str(error))
        return Registration(str(client.get_run(new.run_id).info.experiment_id), new, champion, decision)


def compose_title(number: int, ap: float, known: Registration | None, branch: str) -> str:
    """The result in one line."""
    said = f"AP {say_metric(ap)}"
    if known is None:
        return f"Version {number}: {said}"
    champion, gain = known.decision.get("champion"), known.decision.get("gain")
    if known.new.tags.get("git_branch") != branch:
        aliases = f", {' and '.join(known.new.aliases)}" if known.new.aliases else ""
        return f"Nothing new: these weights are version {number}{aliases}, {said}"
    if champion and gain is not None:
        than = f"{gain:+.3f} against version {champion['version']}"
        said = f"{said}, {than}"
    word = {"champion": "is the champion", "challenger": "is a challenger, the champion stays"}
    return f"Version {number} {word.get(known.new.tags.get('decision', ''), 'is held back')}: {said}"


def describe_gain(metrics: dict[str, float], known: Registration | None, share: float) -> str:
    """AP with its interval, that of the champion it was judged against, and the gain, on the same images."""
    header = ["", "version", "AP", f"{share:.0%} interval"]
    decision = known.decision if known else {}
    if not known or not decision:
        return format_table(
            [header, ["new", "", format_fixed(metrics["AP"]), format_span(metrics["AP_low"], metrics["AP_high"])]]
        )
    rows = [header]
    for role, one in (("new", decision["candidate"]), (known.rival, decision["champion"])):
        if one:
            rows.append([role, one["version"], format_fixed(one["ap"]), format_span(one["low"], one["high"])])
    if decision["gain"] is not None:
        ends = f"{format_signed(decision['gain_low'])} to {format_signed(decision['gain_high'])}"
        rows.append(["gain", "", format_signed(decision["gain"]), ends])
    return format_table(rows)


def describe_changes(known: Registration, root: Path, missing: list[str]) -> list[str]:
    """The section on parameters and data, against the champion that the version was judged against."""
    new, old = known.new, known.champion
    if old is None:
        return []
    lines = [f"## What changed against version {old.number}", ""]
    if differing := find_unequal([old.params, new.params]):
        lines += ["**Parameters:**", "", *describe_differences(differing, known)]
    else:
        lines += ["**Parameters:** nothing", ""]
    if old.data is not None and new.data is not None and old.data.content == new.data.content:
        return [*lines, "**Data:** nothing", ""]
    lines += ["**Data:**", "", *describe_differences(find_unequal([old.statistics, new.statistics]), known)]
    details = describe_data_changes(old, new, root, missing)
    return [*lines, fence_lines(details.splitlines()), ""] if details else lines


def describe_differences(rows: dict[str, list[Any]], known: Registration) -> list[str]:
    """The first of what differs as a table."""
    old, new = known.champion, known.new
    if not rows or old is None:
        return []
    shown = [
        [escape_text(name), *(escape_text(format_value(value)) for value in values)] for name, values in rows.items()
    ]
    names = ["", f"{old.number}, the {known.rival}", f"{new.number}, new"]
    lines = [format_table([names, *shown[:NUM_DIFFERENCES]]), ""]
    if len(shown) > NUM_DIFFERENCES:
        command = f"python -m pipelines compare {old.number} {new.number}"
        lines += [f"and {len(shown) - NUM_DIFFERENCES} more: `{command}`", ""]
    return lines


def describe_data_changes(old: Version, new: Version, root: Path, missing: list[str]) -> str:
    """What changed in the data, entry by entry; empty where a version of it cannot be had."""
    from pipelines.data import changes

    commits = [read_commit(version.tags) for version in (old, new)]
    sides = [replace(v.data, commit=c[:12]) if v.data and c else None for v, c in zip((old, new), commits, strict=True)]
    if sides[0] is None or sides[1] is None:
        return ""
    try:
        found = changes.find_changes(sides[0], sides[1], partial(open_version, root))
        return changes.report(found).partition("\n\n")[2]
    except ValueError as error:
        missing.append(f"what changed in the data, entry by entry: {error}")
        return ""


def list_links(known: Registration) -> list[str]:
    """Where MLflow has it; with a database and no server the command that shows it."""
    uri = os.environ.get(UI) or tracking.get_tracking_uri()
    new, old = known.new, known.champion
    pages = {"Data Docs": "data_docs/index.html", "the dataset's page": "validate/dataset/index.html"}
    if not uri.startswith("http"):
        inside = ", ".join(f"{name} in `{path}`" for name, path in pages.items())
        return [
            f"- MLflow: `python -m pipelines ui mlflow`, model {tracking.MODEL}, version {new.number}, "
            f"run `{new.run_id}`; among its artifacts {inside}"
        ]
    base = f"{redact(uri).rstrip('/')}/#"
    run = f"{base}/experiments/{known.experiment_id}/runs/{new.run_id}"
    found = [
        f"[model version {new.number}]({base}/models/{tracking.MODEL}/versions/{new.number})",
        f"[run]({run})",
        *(f"[{name}]({run}/artifacts/{path})" for name, path in pages.items()),
    ]
    if old is not None and old.run_id != new.run_id:
        runs = f"%5B%22{old.run_id}%22,%22{new.run_id}%22%5D&experiments=%5B%22{known.experiment_id}%22%5D"
        found.append(f"[compared with version {old.number}]({base}/compare-runs?runs={runs})")
    return [f"- MLflow: {', '.join(found)}"]


def list_rows(metrics: dict[str, float], known: Registration | None) -> list[dict[str, Any]]:
    """Every metric, and AP by class, beside the champion's where that was evaluated on the same images."""
    old = known.champion if known and known.champion and known.champion.held_out == known.new.held_out else None
    theirs, their_classes = (old.metrics, old.classes) if old else ({}, {})
    pairs = {name: (value, theirs.get(name)) for name, value in metrics.items() if value != ABSENT}
    classes = known.new.classes if known else {}
    pairs |= {f"AP of {escape_text(name)}": (ap, their_classes.get(name)) for name, ap in classes.items()}
    return [
        {
            "metric": name,
            "new": format_fixed(value),
            "champion": "" if other is None else format_fixed(other),
            "change": "" if other is None else format_signed(value - other),
        }
        for name, (value, other) in pairs.items()
    ]


def compose_failure(stage: str, message: str, lines: Sequence[str]) -> str:
    """The page of a stage that failed: the message, how to go on, the last lines of its output."""
    said = message.removeprefix(f"{stage}: ")
    page = [f"# {stage} failed", "", escape_text(said), "", "## How to go on", ""]
    page += [advise(stage, said), ""]
    page += ["More: docs/retraining.md and docs/troubleshooting.md.", "", f"## The last {len(lines)} lines", ""]
    return redact("\n".join([*page, fence_lines(line[:LONGEST_LINE] for line in lines), ""]))


def has_other_docs(root: Path) -> bool:
    """Whether the Data Docs are of other data than what `root` has as validated."""
    shown, passed = root / "scratch" / "data_docs" / DOCS_DIGEST, root / "artifacts" / "validate" / "passed.json"
    if not shown.exists() or not passed.exists():
        return False
    return bool(shown.read_text(encoding="utf-8") != json.loads(passed.read_text(encoding="utf-8"))["data"])


def compose_dataset(root: Path) -> str:
    """What the validation of the data in `root` found: numbers, warnings, and where the dataset's page is."""
    validated = root / "artifacts" / "validate"
    counts = json.loads((validated / "statistics.json").read_text(encoding="utf-8"))
    report = json.loads((validated / "report.json").read_text(encoding="utf-8"))
    names = ("images", "annotations", "crowds", "images_without_objects")
    rows = [["", *counts], *([name.replace("_", " "), *(str(of[name]) for of in counts.values())] for name in names)]
    broken = [row for row in report if row["outcome"] != "holds"]
    lines = [
        "# The data is sound",
        "",
        format_table(rows),
        "",
        f"{len(report) - len(broken)} of {len(report)} expectations hold.",
    ]
    lines += ["Broken, but tolerated (`validate.tolerated`):", ""] * bool(broken)
    lines += [f"- {escape_text(describe(row))}" for row in broken]
    lines += ["", "The dataset's page, with pictures of every class, is linked in the result of a retraining;"]
    lines += ["`python -m pipelines ui dataset` serves that of the clone."]
    return "\n".join(lines) + "\n"


def format_fixed(value: float) -> str:
    return say_metric(value, digits=4)


def format_span(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{format_fixed(low)} to {format_fixed(high)}"


def format_duration(seconds: float) -> str:
    """Seconds for people: 42 s, 3 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
