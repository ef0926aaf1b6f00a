"""Reproductions of registered versions: the command, what it writes, and what it must leave as it was."""

import json
from pathlib import Path
from typing import Any

from tests.running import call


def made_again(project: Path, model: str, code: int = 0, cold: bool = False, **extra: str) -> str:
    """What the command said."""
    return call(project, "python", "-m", "pipelines", "reproduce", model, code=code, cold=cold, **extra)


def written(project: Path, version: int) -> dict[str, Any]:
    return json.loads((project / f"scratch/reproductions/{version}.json").read_text(encoding="utf-8"))


def everything_of(project: Path, client: Any) -> dict[str, Any]:
    """What must be the same after a reproduction as before."""
    files = [p for folder in (".dvc/cache", "artifacts", "data") for p in sorted((project / folder).rglob("*"))]
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return {
        "git": [
            call(project, "git", *a) for a in (["status", "--short"], ["branch", "-a", "-v"], ["worktree", "list"])
        ],
        "files": [(p, p.stat().st_mtime_ns, p.stat().st_size) for p in files],
        "bytes": [(project / name).read_bytes() for name in ("dvc.lock", "params.yaml", ".dvc/config")],
        "runs": [(run.info.run_id, run.data.metrics, run.data.tags) for run in runs],
        "versions": [(v.version, v.aliases) for v in client.search_model_versions("name = 'detr'")],
    }
