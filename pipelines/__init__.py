"""Makes an interpreter fit for a command of ours, or says that it is not. Any version must be able to parse this."""

import os
import sys


def say_how_to_enter(what):  # type: (str) -> str
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    made = os.path.exists(os.path.join(root, ".venv", "installed"))
    commands = "source .venv/bin/activate" if made else "make .venv/installed && source .venv/bin/activate"
    return "error: " + what + "; enter the project's environment, in " + root + ": " + commands


def show_uncaught(kind, error, trace):  # type: ignore[no-untyped-def]
    """Of a command that has hardly begun: nothing of Ctrl-C, one line of a package that is missing."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if issubclass(kind, KeyboardInterrupt):
        return
    if os.environ.get("DETR_TRACEBACK") or not issubclass(kind, ImportError) or package in ("", "pipelines", "detr"):
        sys.__excepthook__(kind, error, trace)
    else:
        sys.stderr.write(say_how_to_enter(sys.executable + " has no package " + package) + "\n")


def forget_settings():  # type: () -> bool
    """Drops settings of Python and tqdm that the libraries do not stand; whether the interpreter must begin again."""
    for name in [name for name in os.environ if name.startswith("TQDM_") and name != "TQDM_DISABLE"]:
        del os.environ[name]
    found = [name for name in ("PYTHONINSPECT", "PYTHONOPTIMIZE") if os.environ.pop(name, "")]
    if "error" in os.environ.get("PYTHONWARNINGS", ""):
        found.append(os.environ.pop("PYTHONWARNINGS"))
    return bool(found)


if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(say_how_to_enter("this is Python " + sys.version.split()[0] + ", expected 3.11"))
if sys.argv[:1] == ["-m"]:  # `python -m` is looking for the command
    sys.excepthook = show_uncaught
    if forget_settings():
        sys.orig_argv[0] = sys.executable
        os.execv(sys.executable, sys.orig_argv)
