"""DVC's stages, run by its command."""

import sys
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from pipelines.params import read_yaml
from pipelines.processes import group
from pipelines.redaction import hidden

NUM_LINES = 50  # of a stage's output that are kept of a failure


class StageFailed(RuntimeError):
    """A stage ended with a code that is not 0; the message is the stage's own, `lines` the last of its output."""

    def __init__(self, message: str, lines: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.lines = list(lines)


def stages(root: Path) -> list[str]:
    """The stages of dvc.yaml in the order in which they stand, which is the order in which they run."""
    return list(read_yaml(root / "dvc.yaml")["stages"])


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
    drawn there. An interruption ends every process of the stage. Raises StageFailed.
    """
    outcome = "unchanged"

    def notice(line: str) -> None:
        nonlocal outcome
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


def check(root: Path) -> None:
    """Has the code in `root` check its params.yaml. Raises StageFailed with the message that names the key."""
    call(["pipelines", "params"], root, lambda line: None)


def call(module: list[str], root: Path, log: Callable[[str], None], env: Mapping[str, str] | None = None) -> None:
    """Runs a Python module in `root`. Raises StageFailed."""
    lines: deque[str] = deque(maxlen=NUM_LINES)
    with group([sys.executable, "-m", *module], root, lines, env or {}) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip():
                lines.append(hidden(line.rstrip()))
                log(lines[-1])
    if process.returncode:
        for prefix in ("error: ", "ERROR: ", ""):  # of a stage, of DVC, of neither
            if said := [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]:
                raise StageFailed(said[-1], lines)
        raise StageFailed(f"exit code {process.returncode}", lines)


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
