"""What leads from a registered version back to code, data, parameters and machine."""

import hashlib
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import psutil

from pipelines.data.layout import DATA
from pipelines.data.pictures import pictures_of
from pipelines.registry import tracking
from pipelines.workspace.git import git, is_dirty, run_git

VALIDATED = Path("artifacts/validate")
TRAINED = Path("artifacts/train")
EVALUATED = Path("artifacts/evaluate")
LIBRARIES = (
    "torch", "torchvision", "numpy", "hotcoco", "pycocotools", "mlflow", "dvc", "prefect", "great-expectations",
)  # fmt: skip
CODE = ("detr", "pipelines", "presets", "*.py")  # whose files that git does not know yet are part of a run
NOT_CODE = (":!dvc.lock", ":!.dvc")  # an artifact of its own; may hold the credentials of a remote
UNKNOWN = "unknown"  # the tags of git where it refuses
NO_COMMIT = (UNKNOWN, "none")  # as an earlier release said it
PLAIN = (  # a diff that `git apply` takes, whatever a person's settings are
    "--patch", "--binary", "--full-index", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames",
    "--no-relative", "--src-prefix=a/", "--dst-prefix=b/", "--unified=3", "--inter-hunk-context=0",
    "--diff-algorithm=myers", "--submodule=short", "--ignore-submodules=none",
)  # fmt: skip


def collect_lineage(diff: str, of_git: dict[str, str]) -> dict[str, str]:
    """The lineage as tags: those of git, with the digest of its diff, and all others. Raises ValueError."""
    for path in (
        VALIDATED / "passed.json",
        TRAINED / "model.safetensors",
        EVALUATED / "metrics.json",
        Path("dvc.lock"),
    ):
        if not path.exists():
            raise ValueError(f"lineage is incomplete: {path} does not exist; run dvc repro")
    lineage = of_git | {
        "data_digest": json.loads((VALIDATED / "passed.json").read_text(encoding="utf-8"))["data"],
        "val_digest": val_digest(DATA),
        "validation": describe_validation(json.loads((VALIDATED / "report.json").read_text(encoding="utf-8"))),
        "weights_sha256": tracking.sha256(TRAINED / "model.safetensors"),
        "detections_sha256": tracking.sha256(EVALUATED / "detections.json"),
        "dvc_lock_sha256": tracking.sha256(Path("dvc.lock")),
        "params_sha256": tracking.sha256(Path("params.yaml")),
        "python": platform.python_version(),
    }
    if diff:
        lineage["git_diff_sha256"] = hashlib.sha256(diff.encode(errors="surrogateescape")).hexdigest()
    return lineage | describe_hardware() | {name: find_version(name) for name in LIBRARIES}


def read_commit(tags: Mapping[str, str]) -> str | None:
    """The commit that a version's tags name, if they do."""
    commit = tags.get("git_commit", UNKNOWN)
    return None if commit in NO_COMMIT else commit


def git_diff() -> str:
    """What `git apply` makes of HEAD the code that runs here: changes, and files of code that git does not know yet.

    It was applied once. Nothing of the repository changes. Raises ValueError where git refuses anything of that.
    """
    root = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        objects = git(root, "rev-parse", "--path-format=absolute", "--git-path", "objects")
        env = {
            "GIT_INDEX_FILE": str(place / "index"),
            "GIT_OBJECT_DIRECTORY": str(place / "objects"),
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": json.dumps(objects, ensure_ascii=False),
        }
        (place / "objects").mkdir()
        tree = write_code(root, env)
        diff = run_git(root, "diff-tree", *PLAIN, "HEAD", tree, env=env)
        if diff:
            git(root, "read-tree", "HEAD", env=env)
            run_git(root, "apply", "--cached", "--whitespace=nowarn", env=env, given=diff)
            if git(root, "write-tree", env=env) != tree:
                raise ValueError(f"git apply makes another code of git diff than that in {root}; commit the changes")
    return diff.decode(errors="surrogateescape")


def write_code(root: Path, env: Mapping[str, str]) -> str:
    """Writes HEAD with the code that runs here as a tree, and gives its name. `env` names the index and the objects."""
    git(root, "read-tree", "HEAD", env=env)
    entries = run_git(root, "ls-files", "-t", "-z").split(b"\0")
    sparse = [entry[2:] for entry in entries if entry.startswith(b"S ")]  # not checked out: no deletion
    absent = [name for name in sparse if not (root / os.fsdecode(name)).exists()]
    run_git(
        root, "update-index", "-z", "--skip-worktree", "--stdin", env=env, given=b"".join(n + b"\0" for n in absent)
    )
    git(root, "add", "--update", "--", ".", *NOT_CODE, env=env)
    new = run_git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", *CODE, env=env)
    run_git(root, "update-index", "--add", "-z", "--stdin", env=env, given=new)
    return git(root, "write-tree", env=env)


def val_digest(data: Path) -> str:
    """The SHA-256 of the validation annotations and pictures, which may be an archive or a folder."""
    total = hashlib.sha256(tracking.sha256(data / "instances_val.json").encode())
    place = pictures_of(data, "val")
    for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
        if path.is_file():
            total.update(path.relative_to(data).as_posix().encode() + tracking.sha256(path).encode())
    return total.hexdigest()


def describe_validation(report: list[dict[str, Any]]) -> str:
    """The data's validation in words: "75 of 75 hold, 2 warnings"."""
    outcomes = [row["outcome"] for row in report]
    number = outcomes.count("warning")
    return f"{outcomes.count('holds')} of {len(report)} hold, {number} warning{'' if number == 1 else 's'}"


def describe_hardware() -> dict[str, str]:
    """Processor, cores, GPUs and memory of this machine."""
    import torch

    info = Path("/proc/cpuinfo")
    names = (
        re.findall(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.MULTILINE) if info.exists() else []
    )
    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "gpus": ", ".join(gpus) or "none",
        "memory_gb": f"{psutil.virtual_memory().total / 1e9:.1f}",
    }


def find_version(name: str) -> str:
    try:
        return installed(name)
    except PackageNotFoundError:
        return "not installed"


def ask_git() -> tuple[dict[str, str], str]:
    """The tags of git, and its diff. What it refuses is said, and is `unknown`; its words are the tag `git_failure`."""
    root, tags = Path.cwd(), dict.fromkeys(("git_commit", "git_branch", "git_dirty"), UNKNOWN)
    try:
        tags["git_commit"] = git(root, "rev-parse", "--verify", "HEAD")
        tags["git_branch"] = git(root, "branch", "--show-current") or "none"
        diff = git_diff()
        tags["git_dirty"] = str(bool(diff) or is_dirty(root)).lower()
    except ValueError as error:
        said = f"the version's lineage says {UNKNOWN}, until dvc repro runs where git does not refuse: {error}"
        print(f"warning: {said}", file=sys.stderr, flush=True)
        return tags | {"git_failure": str(error)[:5000]}, ""
    return tags, diff
