"""What a person reads of a run in the Prefect UI: pages, a table, pictures. Knows nothing of Prefect."""

import base64
import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.repro import hidden


@dataclass(frozen=True)
class Result:
    """A finished run: a headline, a page in Markdown, rows of metrics, and pictures (URL, description) by key."""

    headline: str
    markdown: str
    metrics: list[dict[str, Any]]
    pictures: dict[str, tuple[str, str]]


def result(place: Path, root: Path, branch: str, note: str) -> Result:
    """The result of the run in the worktree `place`: against the champion, what changed, where it all is."""
    metrics = json.loads((place / "artifacts/evaluate/metrics.json").read_text())
    version = json.loads((place / "artifacts/register/version.json").read_text())
    rows = [{"metric": name, "value": value} for name, value in metrics.items()]
    headline = f"{version['name']} version {version['version']}: AP {metrics['AP']:.3f}"
    picture = (place / "artifacts/evaluate/plots/precision_recall.png").read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    return Result(
        headline, f"# {headline}\n\n{branch}\n\n{html.escape(note)}\n", rows, {"precision-recall": (url, "curves")}
    )


def failure(stage: str, message: str, lines: list[str]) -> str:
    """The page of a stage that failed: the message, the last lines of its output, how to go on."""
    return hidden("\n".join([f"# {stage} failed", "", html.escape(message), "", "```text", *lines, "```", ""]))


def dataset(root: Path) -> str:
    """What the validation of the data in `root` found: numbers, warnings, and where the dataset's page is."""
    validated = root / "artifacts" / "validate"
    counts = json.loads((validated / "statistics.json").read_text())
    report = json.loads((validated / "report.json").read_text())
    lines = ["| | " + " | ".join(counts) + " |", "|---" * (1 + len(counts)) + "|"]
    for name in ("images", "annotations", "crowds", "images_without_objects"):
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(str(of[name]) for of in counts.values()) + " |")
    broken = [row for row in report if row["outcome"] != "holds"]
    lines += ["", f"{len(report) - len(broken)} of {len(report)} expectations hold."]
    for row in broken:
        ids = ", ".join(map(str, row["ids"]))
        lines.append(f"- {row['table']}: {row['meaning']}: {row['unexpected']} of {row['rows']} break it ({ids})")
    lines += ["", "[The dataset's page](http://127.0.0.1:8001), served by `python -m pipelines ui dataset`, and in the"]
    return "\n".join([*lines, "MLflow run of the training under `validate/dataset`."])
