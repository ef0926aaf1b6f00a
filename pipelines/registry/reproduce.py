"""A registered version, made again from its commit, its parameters and its data: is it the same?"""

import hashlib
import json
import platform
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from pipelines.files import write_json
from pipelines.params import read_yaml, to_yaml
from pipelines.registry import aliases, tracking, verdict
from pipelines.registry.lineage import describe_hardware, read_commit
from pipelines.stage import quote_error
from pipelines.workspace import dvc, worktree
from pipelines.workspace.git import resolve_commit
from pipelines.workspace.overrides import make_paths_absolute

HISTORY, WEIGHTS = "artifacts/train/history.jsonl", "artifacts/train/model.safetensors"
METRICS, DETECTIONS = "artifacts/evaluate/metrics.json", "artifacts/evaluate/detections.json"
PASSED = "artifacts/validate/passed.json"
LIBRARIES = ("torch", "torchvision", "numpy", "scipy", "pillow", "pycocotools", "hotcoco")  # which may change the bits


class NotReproducedError(ValueError):
    """What was made is not the version; the message is the verdict."""


@dataclass(frozen=True)
class Registered:
    """A version, and those of its files that could be had, by the name of the artifact."""

    name: str
    run_id: str
    tags: dict[str, str]
    files: dict[str, Path]
    warnings: list[str]

    @property
    def is_dirty(self) -> bool:
        return self.tags.get("git_dirty") == "true"


def reproduce(root: Path, model: str) -> str:
    """Makes a registered version again in a git worktree, and says how the result compares.

    `model` is models:/detr/3, models:/detr@champion, 3 or champion. The verdict is kept in
    `scratch/reproductions/VERSION.json` and as the version's tag `reproduced`. Nothing is registered, and nothing
    of `root` changes but that data which only the DVC remote had are then in the cache. Raises NotReproducedError
    when the result is another one, StageFailed with a stage's message, ValueError when a part of the version is gone.
    """
    client = tracking.connect_to_models()
    version = tracking.find_version(client, model)
    name = f"models:/{tracking.MODEL}/{version.version}"
    registered = Registered(name, version.run_id or "", dict(version.tags), {}, find_differences(version.tags))
    commit = commit_of(root, registered)
    with worktree.hold_run_lock(root, say), worktree.worktree_at(root, f"reproduce-{version.version}", commit) as place:
        say(f"{name}: commit {commit[:12]}, in {place}")
        (place / "scratch").mkdir(exist_ok=True)
        fetch(client, registered, place / "scratch" / "registered")
        restore(root, place, registered)
        for warning in registered.warnings:
            say(f"warning: {warning}")
        document = {"model": name, "commit": commit, "date": time.strftime("%Y-%m-%d")} | make(place, registered)
    try:
        tag = f"{document['verdict']}, {document['date']}"
        client.set_model_version_tag(tracking.MODEL, str(version.version), "reproduced", tag)
    except Exception as error:
        registered.warnings.append(f"the version has no tag of this: {quote_error(error)}")
    path = root / "scratch" / "reproductions" / f"{version.version}.json"
    write_json(path, document | {"warnings": registered.warnings})
    text = verdict.report(document | {"warnings": registered.warnings, "written to": str(path.relative_to(root))})
    if document["verdict"] == verdict.DIFFERENT:
        say(text)
        raise NotReproducedError(verdict.title(document))
    return text


def say(line: str) -> None:
    print(line, flush=True)


def commit_of(root: Path, registered: Registered) -> str:
    """The full name of the version's commit. Raises ValueError with what to do where it is not here."""
    commit, branch = read_commit(registered.tags), registered.tags.get("git_branch", "none")
    if commit is None:
        why = registered.tags.get("git_failure", "there is no commit to make it again from")
        raise ValueError(f"{registered.name} was registered outside of git: {why}")
    try:
        return resolve_commit(root, commit)
    except ValueError:
        raise ValueError(
            f"{registered.name} was made from commit {commit} (branch {branch}), which is not in this clone; "
            "git fetch --all, in the clone that made it git push first, and run this again"
        ) from None


def find_differences(tags: dict[str, str]) -> list[str]:
    """What of libraries and hardware is not as it was when the version was made."""
    here = {"python": platform.python_version()} | describe_hardware()
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            here[name] = installed(name)
    return [
        f"{name} is {here.get(name, 'not installed')} here, {tags[name]} there: the bits may differ"
        for name in ("machine", "processor", "gpus", "python", *LIBRARIES)
        if name in tags and tags[name] != here.get(name, "not installed")
    ]


def fetch(client: Any, registered: Registered, folder: Path) -> None:
    """Downloads what the version's artifacts hold; a warning for each that cannot be had."""
    wanted = ["dvc.lock"]
    if registered.is_dirty:
        wanted += ["params.yaml", "git.diff"]
    try:
        weights = client.get_run(registered.run_id).data.tags.get("weights_sha256")
        if weights == registered.tags.get("weights_sha256"):
            wanted += ["train/history.jsonl", "evaluate/detections.json"]
        else:
            registered.warnings.append("history and detections of its run are of another version: not compared")
    except Exception as error:
        registered.warnings.append(f"its run cannot be had: {quote_error(error)}")
    number = registered.name.rpartition("/")[2]
    try:
        registered.files["model.safetensors"] = tracking.fetch_model_file(number, "artifacts/model.safetensors", folder)
    except ValueError as error:
        registered.warnings.append(str(error))
    for path in wanted:
        copy = folder / Path(path).name
        try:
            copy.write_bytes(aliases.read_run_file(client, registered.run_id, path))
            registered.files[copy.name] = copy
        except ValueError as error:
            if copy.name != "git.diff":
                registered.warnings.append(str(error))
            elif "git_diff_sha256" in registered.tags or "params_sha256" not in registered.tags:
                lost = "uncommitted changes that were part of it, other than of params.yaml, are lost"
                registered.warnings.append(f"{lost}: {error}")


def restore(root: Path, place: Path, registered: Registered) -> None:
    """Code, params.yaml and dvc.lock as they were when the version was registered; its commit may be older."""
    tags, files, warnings = registered.tags, registered.files, registered.warnings
    diff = files.get("git.diff")
    if diff:
        kept = ("params.yaml",) if "params.yaml" in files else ()
        try:
            worktree.apply(place, diff, ("dvc.lock", *kept))
        except ValueError as error:
            raise ValueError(f"the git.diff of {registered.name} does not fit its commit: {error}") from error
    for name in ("params.yaml", "dvc.lock"):
        if name in files:
            (place / name).write_bytes(files[name].read_bytes())
    lock, params = place / "dvc.lock", place / "params.yaml"
    if "dvc.lock" not in files and lock.exists() and tracking.sha256(lock) != tags.get("dvc_lock_sha256"):
        lock.unlink()
        warnings.append("the dvc.lock of its commit is of an earlier run: its data are made anew")
    for file, tag in ((params, "params_sha256"), (lock, "dvc_lock_sha256"), (diff, "git_diff_sha256")):
        if tag in tags and file and file.exists() and tracking.sha256(file) != tags[tag]:
            warnings.append(f"{file.name} is not the one that its tag {tag} names")
    document = read_yaml(params)
    before = to_yaml(document)
    with suppress(AttributeError, KeyError, TypeError):  # of code with other parameters
        make_paths_absolute(document, root, place)
    if to_yaml(document) != before:
        params.write_text(to_yaml(document), encoding="utf-8")


def make(place: Path, registered: Registered) -> dict[str, Any]:
    """Runs the version's stages and compares: the verdict with its reasons. Other data end it before the training."""
    stages = read_yaml(place / "dvc.yaml")["stages"]
    order = find_chain(stages, METRICS, {})
    trains, validates = find_makers(stages, WEIGHTS), find_makers(stages, PASSED)
    if not trains or not order:
        raise ValueError(f"dvc.yaml of the version's commit does not make {WEIGHTS} and {METRICS}")
    lock = read_yaml(place / "dvc.lock") if (place / "dvc.lock").exists() else {}
    md5s = {out["path"]: out.get("md5") for stage in lock.get("stages", {}).values() for out in stage.get("outs", [])}
    data: dict[str, str] = {}
    for name in order:
        made = list_outs(stages[name])
        if not order[name] and name not in trains and (where := dvc.obtain(name, made, place, say)):
            data[name] = f"from the DVC {where}"
        else:
            data |= {name: "made anew"} if not order[name] else {}
            # neither taken from the run cache nor kept in the cache; its MLflow ends with the worktree
            env = {"MLFLOW_TRACKING_URI": f"sqlite:///{place / 'mlflow.db'}"}
            dvc.reproduce(name, place, say, True, ("--no-run-cache", "--no-commit"), env)
        other = [path for path in made if not order[name] and md5s.get(path) and not has_md5(place / path, md5s[path])]
        if other or (name in validates and (other := explain_digest(place, registered))):
            where = f"before the training: not the data of the version: {', '.join(other)}"
            return {"verdict": verdict.DIFFERENT, "first_difference": where, "data": ", ".join(data.values())}
    check_fingerprint(place, registered)
    files = registered.files
    parts = {
        "history": verdict.compare_history(place / HISTORY, files.get("history.jsonl")),
        "weights": verdict.compare_weights(
            place / WEIGHTS, files.get("model.safetensors"), registered.tags.get("weights_sha256", "")
        ),
        "metrics": verdict.compare_metrics(
            json.loads((place / METRICS).read_text(encoding="utf-8")), read_numbers(registered.tags)
        ),
        "detections": verdict.compare_detections(place / DETECTIONS, files.get("detections.json")),
    }
    answer, where = verdict.judge(**parts)
    return {"verdict": answer, "first_difference": where, "data": ", ".join(data.values()), **parts}


def find_chain(stages: dict[str, Any], path: str, found: dict[str, list[str]]) -> dict[str, list[str]]:
    """`found` with the stages that it takes to make a path, in the order in which they run, each with its makers."""
    for name in find_makers(stages, path):
        if name not in found:
            deps = [dep for dep in stages[name].get("deps", []) if isinstance(dep, str)]
            for dep in deps:
                find_chain(stages, dep, found)
            found[name] = [other for dep in deps for other in find_makers(stages, dep)]
    return found


def find_makers(stages: dict[str, Any], path: str) -> list[str]:
    """The stages that make a path, or something in it, or what it is in."""
    return [
        name
        for name, stage in stages.items()
        if any(f"{path}/".startswith(f"{out}/") or f"{out}/".startswith(f"{path}/") for out in list_outs(stage))
    ]


def list_outs(stage: dict[str, Any]) -> list[str]:
    """The paths of all that a stage of dvc.yaml makes."""
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in stage.get(kind, [])]
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def has_md5(path: Path, md5: str) -> bool:
    """Whether a file is that of dvc.lock. Folders, whose MD5 is of a list, are left to the data's digest."""
    if path.is_dir():
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == md5


def explain_digest(place: Path, registered: Registered) -> list[str]:
    """What to say where the digest of the data is not the version's; nothing where it is."""
    there, here = (
        registered.tags.get("data_digest"),
        json.loads((place / PASSED).read_text(encoding="utf-8")).get("data"),
    )
    return [f"digest {here} here, {there} there"] if there and there != here else []


def check_fingerprint(place: Path, registered: Registered) -> None:
    """Warns where code, parameters or data of the training are others than the version's."""
    path, there = place / "artifacts/train/config.json", registered.tags.get("fingerprint")
    here = json.loads(path.read_text(encoding="utf-8")).get("fingerprint") if path.exists() else None
    if here and there and here != there:
        registered.warnings.append(f"the training's code, parameters or data are others: {here} here, {there} there")


def read_numbers(tags: dict[str, str]) -> dict[str, float]:
    """The tags that are numbers, the metrics among them."""
    found = {}
    for name, value in tags.items():
        with suppress(ValueError):
            found[name] = float(value)
    return found
