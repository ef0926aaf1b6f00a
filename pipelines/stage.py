"""What a command of a stage is: its surroundings made fit, its errors one line, its folders inside of the clone."""

import contextlib
import errno
import gc
import hashlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from pipelines import surroundings
from pipelines.progress import print_error

OUTPUTS = (Path("data/coco"), Path("artifacts"))  # folders of what DVC tracks
CHECKED = Path("scratch/checked")  # the digest of a params.yaml that is right, and of the code that found it so
EXPECTED = (ValueError, OSError, ArithmeticError, RuntimeError)


def find_project() -> Path:
    """The current folder; in one that DVC makes for an experiment and removes afterwards, the clone that it is of."""
    here = Path.cwd()
    return next((one.parents[2] for one in here.parents if one.parts[-3:] == (".dvc", "tmp", "exps")), here)


def share_scratch() -> None:
    """Gives one of DVC's experiments the clone's scratch/, which stays when its own folder is removed."""
    kept, own = find_project() / "scratch", Path.cwd() / "scratch"
    if kept != own and not own.exists():
        kept.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):
            own.symlink_to(kept)


def require_inside(root: Path) -> None:
    """Raises ValueError where a link leads out of the project what DVC is to track: DVC refuses it once it is made."""
    for place in OUTPUTS:
        leads = (root / place).resolve()
        if not leads.is_relative_to(root.resolve()):
            raise ValueError(
                f"{place} leads to {leads}, and DVC tracks nothing outside of the project; make it a folder, and have "
                f"the cache on that disk: dvc cache dir --local {leads.parent / 'dvc-cache'}"
            )


def require_name(folder: Path) -> None:
    """Raises ValueError for a folder whose name DVC takes for a pattern, and fails at."""
    if "{" in str(folder) or "}" in str(folder):
        raise ValueError(f"{folder} has a brace in its name, at which DVC fails; rename the folder")


def check_params() -> None:
    """Ends this process where params.yaml has a mistake, in any section: no later stage finds it after hours.

    Another process looks, since a stage imports nothing but what its outputs depend on; once for the same bytes.
    """
    total = hashlib.sha256(Path("params.yaml").read_bytes())
    for package in ("detr", "pipelines"):
        for path in sorted((Path(__file__).parents[1] / package).rglob("*.py")):
            total.update(path.read_bytes())
    if CHECKED.exists() and CHECKED.read_text(encoding="utf-8") == total.hexdigest():
        return
    env = {name: value for name, value in os.environ.items() if name != "DVC_STAGE"}
    if os.spawnve(os.P_WAIT, sys.executable, [sys.executable, "-m", "pipelines.agreement"], env):
        sys.exit(1)
    CHECKED.parent.mkdir(exist_ok=True)
    CHECKED.write_text(total.hexdigest(), encoding="utf-8")


def command(run: Callable[[], None]) -> None:
    """Runs a command of the project in an environment made fit; an expected failure is one line and exit code 1.

    DETR_TRACEBACK=1 in the environment shows where it came from.
    """
    surroundings.settle()
    try:
        share_scratch()
        if "DVC_STAGE" in os.environ:
            require_name(Path.cwd())
            require_inside(Path())
            check_params()
        run()
    except KeyboardInterrupt:
        sys.exit(130)
    except EXPECTED as error:
        if os.environ.get("DETR_TRACEBACK"):
            traceback.print_exc()
        print_error(explain(error))
        sys.exit(1)
    finally:
        gc.freeze()  # so that the interpreter does not search through the objects of all libraries once more: seconds


def quote_error(error: Exception, length: int = 300) -> str:
    """What a library's error says, on one line, its first `length` letters."""
    return " ".join(str(error).split())[:length]


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
