"""Stage 5: the model in the registry, with its lineage. `python -m pipelines.register`"""

import base64
import csv
import hashlib
import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines import params
from pipelines.data.layout import DATA, DOCS_DIGEST
from pipelines.data.looks import warn_of_other_source
from pipelines.files import write_json
from pipelines.labels import ABSENT
from pipelines.registry import aliases, gate, tracking
from pipelines.registry.gate import RegisterParams
from pipelines.registry.lineage import (
    EVALUATED,
    TRAINED,
    VALIDATED,
    ask_git,
    collect_lineage,
    read_commit,
)
from pipelines.registry.packaging import log_version
from pipelines.registry.turns import take_turn
from pipelines.stage import command

OUTPUT = Path("artifacts/register")
SCRATCH = Path("scratch")
HELD = "held back"  # the decision on what may not be promoted


def register(config: RegisterParams, output: Path) -> None:
    """Publishes the run's files to MLflow, registers the model once, decides its alias, and writes `version.json`.

    Weights that are registered already, with the same categories, give the version that has them. One process at a
    time does so; killed anywhere and repeated it ends the same. The training's resume state, kept until its results are
    safe, is removed. Raises ValueError when lineage is incomplete, a protected category is unknown, or MLflow does not
    answer.
    """
    of_git, diff = ask_git()
    lineage = collect_lineage(diff, of_git)
    gate.check_protected(config, DATA / "instances_val.json")
    client = tracking.connect()
    mark = json.loads((TRAINED / "config.json").read_text(encoding="utf-8"))["fingerprint"]
    metrics = json.loads((EVALUATED / "metrics.json").read_text(encoding="utf-8"))
    with aliases.explain_errors("the registration"), take_turn(client) as check:
        aliases.finish_rollback(client, check)
        run_id = tracking.find_run(client, mark, f"train {mark}")
        publish(client, run_id, mark, metrics, lineage, diff)
        version = aliases.find_version_of(client, lineage["weights_sha256"], TRAINED / "config.json")
        if version is None:
            client.log_metric(run_id, "images_per_second", measure_speed())
            tags = lineage | {name: str(value) for name, value in metrics.items()}
            check()
            version = log_version(run_id, TRAINED, example_image(), tags | {"fingerprint": mark, "run_id": run_id})
        elif read_commit(version.tags) is None and read_commit(lineage):  # git refused when it was registered
            for name, value in lineage.items():
                if name.startswith("git_"):
                    client.set_model_version_tag(tracking.MODEL, version.version, name, value)
            if "git_failure" in version.tags:
                client.delete_model_version_tag(tracking.MODEL, version.version, "git_failure")
        alias, reason = settle(client, version, config, check)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "version.json", {"name": tracking.MODEL, "version": int(version.version), "fingerprint": mark})
    for path in (SCRATCH / mark).glob("*state*"):
        path.unlink(missing_ok=True)
    print(f"registered {tracking.MODEL} version {version.version} as {alias}: {reason}", flush=True)


def settle(client: Any, version: Any, config: RegisterParams, check: Any) -> tuple[str, str]:
    """The alias of a version, and why: judged if it was not yet, or was held back and may now be promoted.

    Its tag `decision` is written last of all.
    """
    number = str(version.version)
    version = client.get_model_version(tracking.MODEL, number)
    if version.tags.get("decision", HELD) != HELD or (not config.promote and "decision" in version.tags):
        return ", ".join(version.aliases) or "no alias", "these weights were registered before"
    if "champion" in version.aliases:  # a kill came between the alias and the tag
        alias, reason = "champion", version.tags.get("decision_reason", "")
    else:
        detections = json.loads((EVALUATED / "detections.json").read_text(encoding="utf-8"))
        decision = gate.judge(client, version, detections, DATA, config)
        if not config.promote:
            decision = replace(decision, alias="challenger", sentence=f"{decision.sentence}; {HELD}")
        alias, reason = decision.alias, decision.sentence
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "decision.md").write_text(gate.as_markdown(decision, config), encoding="utf-8")
            Path(folder, "decision.json").write_text(
                json.dumps(gate.as_json(decision), indent=1) + "\n", encoding="utf-8"
            )
            client.log_artifacts(version.run_id, folder, "register")
        client.set_model_version_tag(tracking.MODEL, number, "decision_reason", reason)
        aliases.place(client, version, alias, check)
    client.set_model_version_tag(tracking.MODEL, number, "decision", alias if config.promote else HELD)
    return alias, reason


def publish(client: Any, run_id: str, mark: str, metrics: dict[str, float], lineage: dict[str, str], diff: str) -> None:
    """Fills the run in from the files: parameters, curves, metrics, pictures, Data Docs, dvc.lock, the state of git."""
    document = params.read_yaml(Path("params.yaml"))
    tracking.log_params(client, run_id, {name: document[name] for name in params.SECTIONS})
    history, timings = (
        tracking.read_rows(path) for path in (TRAINED / "history.jsonl", SCRATCH / mark / "timings.jsonl")
    )
    tracking.fill_in(client, run_id, history)
    tracking.fill_in(client, run_id, timings)
    tracking.fill_in_pictures(client, run_id, SCRATCH / mark / "pictures")
    results = hashlib.sha256(lineage["weights_sha256"].encode())
    for path in sorted(path for path in EVALUATED.rglob("*") if path.is_file()):
        results.update(tracking.sha256(path).encode())
    known = client.get_run(run_id).data.tags
    if known.get("published") == results.hexdigest() and (read_commit(known) or not read_commit(lineage)):
        return
    numbers = metrics | class_metrics(EVALUATED / "per_class.csv")
    seconds = training_seconds(history, timings, int(document["train"]["batch_size"]))
    for name, value in (numbers | ({"training_seconds": seconds} if seconds else {})).items():
        if value != ABSENT:
            client.log_metric(run_id, name, value)
    for key, tag in lineage.items():
        client.set_tag(run_id, key, tag)
    client.log_artifact(run_id, "dvc.lock")
    client.log_artifact(run_id, "params.yaml")
    if diff:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "git.diff").write_bytes(diff.encode(errors="surrogateescape"))
            client.log_artifact(run_id, f"{folder}/git.diff")
    for name in ("report.json", "statistics.json", "dataset"):
        client.log_artifact(run_id, str(VALIDATED / name), "validate")
    client.log_artifact(run_id, str(TRAINED / "history.jsonl"), "train")
    client.log_artifacts(run_id, str(EVALUATED), "evaluate")
    docs_of = SCRATCH / "data_docs" / DOCS_DIGEST
    if docs_of.exists() and docs_of.read_text(encoding="utf-8") == lineage["data_digest"]:
        client.log_artifacts(run_id, str(SCRATCH / "data_docs"), "data_docs")
    client.set_tag(run_id, "published", results.hexdigest())
    client.set_terminated(run_id, "FINISHED")


def class_metrics(path: Path) -> dict[str, float]:
    """AP of the categories with objects, by names that MLflow allows; two that become one get their ids."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if float(row["AP"] or ABSENT) >= 0]
    names = [re.sub(r"[^\w\-. :]", "_", row["name"])[:200].strip() for row in rows]
    found = {}
    for name, row in zip(names, rows, strict=True):
        suffix = "" if names.count(name) == 1 and name.strip(".") else f"_{row['category_id']}"
        found[f"{aliases.CLASS_AP}{name}{suffix}"] = float(row["AP"])
    return found


def training_seconds(history: list[dict[str, float]], timings: list[dict[str, float]], batch_size: int) -> float | None:
    """How long the steps of the training took together, None where a kill took some of their timings."""
    rate = {int(row["step"]): row["images_per_second"] for row in timings if row.get("images_per_second")}
    steps = [int(row["step"]) for row in history]
    if not steps or not set(steps) <= set(rate):
        return None
    return sum((step - before) * batch_size / rate[step] for before, step in zip([0, *steps], steps, strict=False))


def measure_speed() -> float:
    """Images per second of this model on this machine, one at a time, at the size of the first validation image."""
    import torch

    from detr.checkpoint import load_model
    from detr.coco import load_annotations
    from detr.cost import measure_images_per_second
    from detr.transforms import fit_size

    model, _, size = load_model(TRAINED)
    height, width = load_annotations(DATA / "instances_val.json").sizes_hw[0].tolist()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return measure_images_per_second(model, fit_size((height, width), size.short, size.max_size), device)


def example_image() -> str:
    """The first validation image as base64."""
    from detr.coco import load_annotations
    from detr.images import open_images

    name = load_annotations(DATA / "instances_val.json").file_names[0]
    return base64.b64encode(open_images(DATA / "val.zip").read(str(name))).decode()


def main() -> None:
    warn_of_other_source(Path())
    register(params.load("register", RegisterParams), OUTPUT)


if __name__ == "__main__":
    command(main)
