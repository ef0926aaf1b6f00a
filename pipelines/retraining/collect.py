"""Frees the disk of what no registered version needs and nobody has used for some days."""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from pipelines.locks import is_held
from pipelines.registry import aliases, tracking
from pipelines.registry.lineage import read_commit
from pipelines.workspace import worktree
from pipelines.workspace.cache import collect_garbage, count_bytes, find_cache
from pipelines.workspace.git import git

HEADS = "refs/heads/"
RUNS = f"{HEADS}{worktree.BRANCHES}"
EXPERIMENT = re.compile(r"refs/exps/[0-9a-f]{2}/[0-9a-f]{38}/(.+)")  # of DVC, by its name
LOG_BYTES = 16 << 20  # beyond which the log of a service that still writes to it is emptied
NUM_NAMES = 20  # of what went that are listed by name, per kind
KINDS = (
    "worktrees",
    "branches",
    "experiments",
    "states",
    "results of runs",
    "downloads",
    "reproductions",
    "logs",
    "DVC cache",
)


@dataclass
class Collected:
    """What went, or would go, by kind: its name and bytes; and what was left out, in words."""

    dry_run: bool
    went: dict[str, list[tuple[str, int]]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    remarks: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(size for rows in self.went.values() for _, size in rows)

    @property
    def headline(self) -> str:
        kinds = [f"{kind} {sum(size for _, size in rows)}" for kind, rows in self.went.items() if rows]
        verb = "would free" if self.dry_run else "freed"
        return "; ".join([f"{verb} {self.bytes} bytes{': ' if kinds else ''}{', '.join(kinds)}", *self.remarks])

    @property
    def markdown(self) -> str:
        title = "Would be collected" if self.dry_run else "Collected"
        lines = [f"# {title}: {self.bytes:,} bytes", "", "| kind | number | bytes |", "|---|---:|---:|"]
        for kind, rows in self.went.items():
            lines.append(f"| {kind} | {len(rows)} | {sum(size for _, size in rows):,} |")
        lines += ["", *(f"- {remark}" for remark in self.remarks)]
        for kind, rows in self.went.items():
            names = [f"`{name}`" for name, _ in rows[:NUM_NAMES]] + ["..."] * (len(rows) > NUM_NAMES)
            lines += ["", f"{kind}: {', '.join(names)}"] if rows else []
        return "\n".join([*lines, ""])


def collect(root: Path, keep_days: int, dry_run: bool, shared_cache: bool, log: Callable[[str], None]) -> Collected:
    """Removes what no registered version needs and nobody has touched for `keep_days`; killed, it can be repeated.

    Waits for the run that is under way. Raises ValueError, with nothing removed, where MLflow does not say which
    versions there are or is not the one that this project registered in, and StageFailed where DVC fails.
    """
    found = Collected(dry_run)
    with worktree.hold_run_lock(root, log), tempfile.TemporaryDirectory() as folder:
        client = tracking.connect_to_models()
        with aliases.explain_errors("the collection"):
            versions = tracking.list_versions(client)
            check_registry(root, client, versions)
        before = time.time() - 86400 * keep_days
        for place in sorted((root / "scratch" / "worktrees").glob("*")):
            found.went["worktrees"].append((place.name, count_bytes(place)))
        if not dry_run:
            worktree.settle_left_behind(root)
        doomed = find_unneeded_branches(root, versions, before)
        with aliases.explain_errors("the collection"):
            locks, lost = fetch_locks(root, client, versions, doomed, Path(folder))
        for branch in doomed:
            found.went["branches"].append((branch, 0))
            if not dry_run:
                git(root, "branch", "-D", branch)
        for kind, path in find_old_files(root, before, doomed):
            found.went[kind].append((path.relative_to(root / "scratch").as_posix(), count_bytes(path)))
            if not dry_run:
                remove(path)
        for path in find_large_logs(root):
            found.went["logs"].append((f"services/{path.name}, emptied", count_bytes(path)))
            if not dry_run:
                os.truncate(path, 0)
        young, old = find_experiments(root, before)
        for name, ref in old.items():
            found.went["experiments"].append((name, 0))
            if not dry_run:
                git(root, "update-ref", "-d", ref)
        collect_cache(root, locks | young, lost, shared_cache, found, log)
        if dry_run and doomed:
            found.remarks.append("what only those branches hold in the DVC cache is not counted")
    return found


def check_registry(root: Path, client: Any, versions: Collection[Any]) -> None:
    """Raises ValueError where MLflow knows nothing of what was registered from here: what it needs cannot be known."""
    known = {version.tags.get("fingerprint") for version in versions}
    for path in (root / "artifacts/register/version.json", *sorted(root.glob("scratch/runs/*/version.json"))):
        try:
            mark = json.loads(path.read_text(encoding="utf-8"))["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError):  # not there, or cut off by a kill
            continue
        if mark not in known and not tracking.has_run(client, mark):
            raise ValueError(
                f"MLflow at {tracking.get_tracking_uri()} does not know the run that {path.relative_to(root)} tells "
                "of; set MLFLOW_TRACKING_URI to where it was registered, or remove that file where its model is not "
                "needed"
            )


def find_unneeded_branches(root: Path, versions: Collection[Any], before: float) -> list[str]:
    """Branches runs/... whose tip is older than `before` and that no version needs; nobody has them checked out.

    A version needs the branch that its tag git_branch names, and every one that holds its commit where no branch or
    tag of a person does.
    """
    needed = {f"{HEADS}{version.tags['git_branch']}" for version in versions if "git_branch" in version.tags}
    for commit in filter(None, {read_commit(version.tags) for version in versions}):
        holders = set(find_refs(root, commit, HEADS, "refs/tags"))
        if all(ref.startswith(RUNS) for ref in holders) and not holders & needed:
            needed |= holders
    listed = git(root, "worktree", "list", "--porcelain").splitlines()
    needed |= {line.removeprefix("branch ") for line in listed if line.startswith("branch ")}
    tips = git(root, "for-each-ref", "--format=%(refname) %(committerdate:unix)", RUNS).splitlines()
    old = (ref for ref, _, seconds in (line.partition(" ") for line in tips) if int(seconds) <= before)
    return [ref.removeprefix(HEADS) for ref in old if ref not in needed]


def find_refs(root: Path, commit: str, *under: str) -> list[str]:
    """The refs that hold a commit; none where it is not in this clone."""
    try:
        return git(root, "for-each-ref", f"--contains={commit}", "--format=%(refname)", *under).splitlines()
    except ValueError:
        return []


def fetch_locks(
    root: Path, client: Any, versions: Collection[Any], doomed: Collection[str], folder: Path
) -> tuple[dict[str, str], list[str]]:
    """The dvc.lock, from MLflow, of each version that has it in no commit that stays; and versions whose is lost."""
    locks, lost = {}, []
    for version in versions:
        if is_committed(root, version.tags, doomed):
            continue
        number, digest = str(version.version), version.tags.get("dvc_lock_sha256")
        path = None
        if version.run_id:
            with suppress(ValueError):
                (folder / number).mkdir()
                path = tracking.fetch_artifact(client, version.run_id, "dvc.lock", folder / number)
        if path and (tracking.sha256(path) == digest or has_weights_of(client, version)):
            locks[number] = path.read_text(encoding="utf-8")
        elif path or digest:
            lost.append(number)
    return locks, lost


def find_experiments(root: Path, before: float) -> tuple[dict[str, str], dict[str, str]]:
    """What DVC's own `gc --all-commits` passes over: the dvc.lock of each of DVC's experiments, of git's stashes and of
    experiments under way, where it is younger than `before`; and the refs of older experiments, by name.
    """
    young, old = {}, {}
    for path in (*root.glob(".dvc/tmp/exps/*/dvc.lock"), *root.glob(".dvc/tmp/exps/*/*/dvc.lock")):
        young[path.parent.name] = path.read_text(encoding="utf-8")
    listed = git(
        root, "for-each-ref", "--format=%(committerdate:unix) %(objectname) %(refname)", "refs/exps", "refs/stash"
    )
    for seconds, commit, ref in (line.split(" ", 2) for line in listed.splitlines()):
        commits = [f"{seconds} {commit}"]
        if ref.endswith(("/stash", "/failed")):
            commits = git(root, "log", "--walk-reflogs", "--format=%ct %H", ref, "--").splitlines()
        for time_of, name in (line.split() for line in commits):
            if int(time_of) > before:
                with suppress(ValueError):  # it has none
                    young[name] = git(root, "show", f"{name}:./dvc.lock")
            elif experiment := EXPERIMENT.fullmatch(ref):
                old[experiment[1]] = ref
    return young, old


def is_committed(root: Path, tags: dict[str, str], doomed: Collection[str]) -> bool:
    """Whether the dvc.lock of a version is that of its commit, and a branch or tag that stays holds it."""
    commit, digest = read_commit(tags), tags.get("dvc_lock_sha256")
    holders = find_refs(root, commit, HEADS, "refs/tags", "refs/remotes") if commit else []
    if not {ref.removeprefix(HEADS) for ref in holders} - {*doomed}:
        return False
    try:
        text = git(root, "show", f"{commit}:./dvc.lock")
    except ValueError:
        return False
    return hashlib.sha256(f"{text}\n".encode()).hexdigest() == digest


def has_weights_of(client: Any, version: Any) -> bool:
    """Whether what a version's run holds now is of the same weights, so of the same data."""
    weights = version.tags.get("weights_sha256")
    return bool(weights) and client.get_run(version.run_id).data.tags.get("weights_sha256") == weights


def find_old_files(root: Path, before: float, doomed: Collection[str]) -> Iterator[tuple[str, Path]]:
    """Kind and path of what lies in scratch/, is older than `before`, and nobody is using."""
    scratch = root / "scratch"
    branches = git(root, "for-each-ref", "--format=%(refname)", RUNS).splitlines()
    kept = {ref.removeprefix(RUNS) for ref in branches if ref.removeprefix(HEADS) not in doomed}
    places = [("states", p) for p in scratch.glob("*") if re.fullmatch(r"[0-9a-f]{16}", p.name)]
    places += [("results of runs", path) for path in scratch.glob("runs/*") if path.name not in kept]
    places += [("downloads", path) for path in scratch.glob("downloads/*") if path.suffix != ".lock"]
    places += [("reproductions", path) for path in scratch.glob("reproductions/*")]
    logs = [*scratch.glob("services/*")]
    used = find_open_files() if logs else set()
    places += [("logs", path) for path in logs if path not in used]
    for kind, path in sorted(places):
        lock = path / "lock" if kind == "states" else path.with_suffix(".lock")
        if find_newest(path) <= before and not is_held(lock):
            yield kind, path


def find_newest(path: Path) -> float:
    return max(one.lstat().st_mtime for one in (path, *path.rglob("*")))


def find_open_files() -> set[Path]:
    """The files that processes have open, as far as we may know."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            found |= {Path(file.path) for file in process.open_files()}
    return found


def find_large_logs(root: Path) -> list[Path]:
    return [path for path in sorted(root.glob("scratch/services/*.log")) if path.stat().st_size > LOG_BYTES]


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def collect_cache(
    root: Path, locks: dict[str, str], lost: list[str], shared_cache: bool, found: Collected, log: Callable[[str], None]
) -> None:
    """Collects the DVC cache, unless it may be shared or the need of a version is not known: a remark says so."""
    cache = find_cache(root)
    if lost:
        found.remarks.append(
            f"the DVC cache stays as it is: what {', '.join(f'version {number}' for number in lost)} of "
            f"{tracking.MODEL} needs is neither in a commit nor in MLflow; commit its dvc.lock, or delete the version"
        )
    elif not cache.is_relative_to(root.resolve()) and not shared_cache:
        found.remarks.append(
            f"the DVC cache stays as it is: {cache} may be shared with other clones, whose data would go; "
            "say shared_cache where it is not"
        )
    elif freed := collect_garbage(root, locks, log, found.dry_run):
        found.went["DVC cache"].append((str(cache), freed))
