"""DVC's stages, run by its command."""

import os
import re
import sys
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipelines.params import read_yaml
from pipelines.redaction import redact
from pipelines.workspace.processes import clear_bars, is_error, start_group, stop_group

STOPPED = re.compile(r"stopped after step (\d+) ")  # begins what a training says that was asked to stop
HINTS = re.compile(  # of DVC, for a person who has typed its command
    r"To track the changes with git, run:|\s+git add |To enable auto staging, run:|\s+dvc config core\.autostage "
    "|Use `dvc push` to send your updates to remote storage"
)
NUM_LINES = 50  # of a stage's output that are kept of a failure


class StageFailed(RuntimeError):
    """A stage ended with a code that is not 0; the message is the stage's own, `lines` the last of its output."""

    def __init__(self, message: str, lines: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.lines = list(lines)


def list_stages(root: Path) -> list[str]:
    """The stages that `dvc repro` runs, in its order: those of dvc.yaml, and what they need. Raises ValueError."""
    from dvc.exceptions import DvcException  # type: ignore[import-untyped]
    from dvc.repo import Repo  # type: ignore[import-untyped]
    from dvc.repo.reproduce import get_active_graph, plan_repro  # type: ignore[import-untyped]

    file = root / "dvc.yaml"
    read_yaml(file)  # of what is no YAML, DVC's words are many
    try:
        with Repo(str(root)) as repo:
            planned = plan_repro(get_active_graph(repo.index.graph), repo.stage.collect(str(file)))
            return [_target(stage) for stage in planned]
    except DvcException as error:
        raise ValueError(f"{file} cannot be used, as dvc status shows: {' '.join(str(error).split())}") from error


def _target(stage: Any) -> str:
    """A stage as `dvc repro` in the root of the project takes it."""
    name, file = getattr(stage, "name", ""), str(stage.path_in_repo)
    return name if file == "dvc.yaml" else f"{file}:{name}" if name else file


def reproduce(
    stage: str,
    root: Path,
    log: Callable[[str], None],
    force: bool = False,
    options: Collection[str] = (),
    env: Mapping[str, str] | None = None,
) -> str:
    """Runs one stage by `dvc repro --single-item`: `ran`, `restored` from the run cache, or `unchanged`.

    Every line that DVC and the stage print goes to `log` as it comes; on a terminal their progress bars are
    drawn there. What DVC advises to type is left out. An interruption ends every process of the stage. Raises
    StageFailed.
    """
    outcome = "unchanged"

    def notice(line: str) -> None:
        nonlocal outcome
        if HINTS.match(line):
            return
        log(line)
        if line.startswith("Running stage"):
            outcome = "ran"
        elif "is cached - skipping run" in line:
            outcome = "restored"

    command = ["dvc", "--wait-for-lock", "repro", "--single-item", stage, *["--force"] * force, *options]
    try:
        call(command, root, notice, env)
    except StageFailed as failure:
        raise StageFailed(f"{stage}: {failure}", failure.lines) from None
    return outcome


def check(root: Path, log: Callable[[str], None]) -> None:
    """Has the code in `root` check its params.yaml and log what it warns of.

    Raises StageFailed with the message that names the key.
    """
    call(["pipelines", "params"], root, lambda line: log(line) if line.startswith("warning: ") else None, bars=False)


def call(
    module: list[str],
    root: Path,
    log: Callable[[str], None],
    env: Mapping[str, str] | None = None,
    bars: bool = True,
) -> None:
    """Runs a Python module in `root`. Its errors are not logged, but raised as StageFailed.

    An interruption ends it; the message of KeyboardInterrupt says where a training has stopped.
    """
    lines: deque[str] = deque(maxlen=NUM_LINES)
    with start_group([sys.executable, "-m", *module], root, lines, env or {}, bars) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.strip():
                    said = redact(line.rstrip())
                    lines.append(said)  # as those of a terminal come, from another thread
                    if not is_error(said):
                        with clear_bars():
                            log(said)
        except KeyboardInterrupt:
            stop_group(process)
            os.set_blocking(process.stdout.fileno(), False)
            where = ""
            with suppress(TypeError):  # of a pipe that somebody else still holds
                for line in process.stdout:
                    if found := STOPPED.match(line):
                        where = f"stopped at step {found[1]}"
            raise KeyboardInterrupt(where) from None
    if process.returncode:
        kept = [redact(line) for line in lines]
        raise StageFailed(find_cause(kept) or f"exit code {process.returncode}", kept)


def find_cause(lines: Sequence[str]) -> str:
    """What a failure says of itself: the stage's error, else the exception of its code, DVC's error, the last line."""
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    traces = [number for number, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    if not said and traces:
        said = [line for line in lines[traces[-1] + 1 :] if not line.startswith((" ", "ERROR: "))][:1]
    if not said:
        said = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or list(lines)
    return said[-1] if said else ""


def obtain(stage: str, outs: Collection[str], place: Path, log: Callable[[str], None]) -> str:
    """Puts what dvc.lock names as outputs of a stage in place: from the `cache`, or from the `remote` and the cache.

    Nothing, said, where neither has all of it.
    """
    for where, verb in (("cache", "checkout"), ("remote", "pull")):
        failure = ""
        try:
            call(["dvc", "--wait-for-lock", verb, stage], place, lambda line: None)
        except StageFailed as error:
            failure = str(error)
        missing = [out for out in outs if not (place / out).exists()]
        if not failure and not missing:
            return where
        log(f"{stage}: not whole in the DVC {where}: {failure or ', '.join(missing)}")
    return ""
