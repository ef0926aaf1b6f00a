"""The register stage run for tests: alone, together, with a fault at any call of MLflow's client; and what it leaves."""

import subprocess

from pipelines.registry.tracking import MODEL
from tests.running import ROOT, call, environment

COMMAND = ("python", "-m", "pipelines.register")


# Does ACTION right before or after the N-th call of a method of MLflow's client.
HOOKED = """
import os, signal, sqlite3, sys
from mlflow import MlflowClient
from pipelines.register import main
from pipelines.stage import command
method, when, number, action = sys.argv[1:]
original, calls, held = getattr(MlflowClient, method), [], []
def act():
    if action.startswith("kill"):
        os.kill(int(action.split()[1]) or os.getpid(), signal.SIGKILL)
    else:
        held.append(sqlite3.connect(action, isolation_level=None))
        held[0].execute("begin exclusive")
def hooked(*arguments, **more):
    calls.append(method)
    due = len(calls) == int(number)
    if due and when == "before":
        act()
    result = original(*arguments, **more)
    if due and when == "after":
        act()
    return result
setattr(MlflowClient, method, hooked)
command(main)
"""


def at(moment, action):
    return ("python", "-c", HOOKED, *moment.split(), action)


def run(folder, uri, command=COMMAND, code=0, **extra):
    return call(folder, *command, code=code, PYTHONPATH=str(ROOT), MLFLOW_TRACKING_URI=uri, **extra)


def the_error(said):
    """The only line of error."""
    assert "Traceback" not in said, said
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    return line


def look(uri):
    """(version by alias, decision by version) of the registry."""
    client = at_uri(uri)
    versions = client.search_model_versions(f"name = '{MODEL}'")
    named = {name: int(version) for name, version in client.get_registered_model(MODEL).aliases.items()}
    return named, {int(v.version): v.tags.get("decision") for v in versions}


def at_uri(uri):
    from mlflow import MlflowClient

    return MlflowClient(uri, uri)


def together(folders, uri):
    started = [
        subprocess.Popen(
            COMMAND,
            cwd=folder,
            env=environment(PYTHONPATH=str(ROOT), MLFLOW_TRACKING_URI=uri),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
        for folder in folders
    ]
    said = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(folders), said
    return said


def assert_nothing_is_lost(uri, said):
    """Of `weak`, `strong` and `strong` again at once, whichever came first."""
    named, decisions = look(uri)
    assert len(decisions) == 2
    numbers = [int(text.partition("registered detr version ")[2].split()[0]) for text in said]
    assert numbers[1] == numbers[2] == named["champion"] != numbers[0]
    assert sum("these weights were registered before" in text for text in said) == 1
    if numbers[0] < numbers[1]:
        assert named == {"champion": numbers[1], "previous_champion": numbers[0]}
        assert decisions == {1: "champion", 2: "champion"}
    else:
        assert named == {"champion": numbers[1], "challenger": numbers[0]}
        assert decisions == {1: "champion", 2: "challenger"}
