"""What the five stage commands share: quiet tools, one-line errors, progress, whole files."""

import contextlib
import errno
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipelines import surroundings

DATA = Path("data/coco")
FILES = ("train.zip", "val.zip", "instances_train.json", "instances_val.json")
EXPECTED = (ValueError, OSError, ArithmeticError, RuntimeError)
DOCS_DIGEST = "data.sha256"  # in the Data Docs: which data they show


def project() -> Path:
    """The current folder; in one that DVC makes for an experiment and removes afterwards, the clone that it is of."""
    here = Path.cwd()
    return next((one.parents[2] for one in here.parents if one.parts[-3:] == (".dvc", "tmp", "exps")), here)


def share_scratch() -> None:
    """Gives one of DVC's experiments the clone's scratch/, which stays when its own folder is removed."""
    kept, own = project() / "scratch", Path.cwd() / "scratch"
    if kept != own and not own.exists():
        kept.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):
            own.symlink_to(kept)


def require_inside() -> None:
    """Raises ValueError where a link leads out of the clone what DVC is to track: DVC refuses it once it is made."""
    for place in (DATA, Path("artifacts")):
        if not place.resolve().is_relative_to(Path.cwd()):
            raise ValueError(
                f"{place} leads to {place.resolve()}, out of the clone, where DVC tracks nothing; remove the link, and "
                "keep what is large on that disk by DVC's cache: dvc cache dir --local FOLDER"
            )


def command(run: Callable[[], None]) -> None:
    """Runs a command of the project in an environment made fit; an expected failure is one line and exit code 1.

    DETR_TRACEBACK=1 in the environment shows where it came from.
    """
    surroundings.settle()
    try:
        if "DVC_STAGE" in os.environ:
            require_inside()
        share_scratch()
        run()
    except KeyboardInterrupt:
        sys.exit(130)
    except EXPECTED as error:
        if os.environ.get("DETR_TRACEBACK"):
            traceback.print_exc()
        print(f"error: {explain(error)}", file=sys.stderr, flush=True)
        sys.exit(1)


def explain(error: Exception) -> str:
    """One line that names the thing and what to do."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full at {error.filename or Path.cwd()}; free space there and run again"
    if isinstance(error, PermissionError):
        return f"no permission for {error.filename}; make it writable for this user and run again"
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename} does not exist; run the stage that makes it: dvc repro"
    said = str(error)
    if "Original Traceback" in said:  # of a loader process
        said = said.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(said.split()) or type(error).__name__


class Progress(tqdm):
    """A bar with the time left on a terminal; elsewhere a plain line every ten seconds."""

    def __init__(
        self, iterable: Iterable[Any] | None = None, desc: str = "", total: float = 0, unit: str = "it"
    ) -> None:
        self.bar = sys.stderr.isatty()
        super().__init__(
            iterable, desc, total, unit=unit, file=sys.stderr, dynamic_ncols=True, mininterval=0.1 if self.bar else 10
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if self.bar:
            return bool(super().display(msg, pos))
        if self.n or self.n == self.total:
            print(msg or str(self), file=sys.stderr, flush=True)
        return True

    def say(self, line: str) -> None:
        """Prints a line, above the bar where there is one."""
        if self.bar:
            self.write(line)
        else:
            print(line, flush=True)

    def close(self) -> None:
        if self.bar or getattr(self, "disable", False):
            super().close()
            return
        self.disable = True
        self._decr_instances(self)
        print(str(self), file=sys.stderr, flush=True)


def write_json(path: Path, document: Any) -> None:
    """Writes JSON that is either whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
