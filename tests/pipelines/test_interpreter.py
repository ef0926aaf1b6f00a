"""What an interpreter, or its settings, do to a command of ours before anything is imported."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipelines.workspace.processes import is_alive, start_tied
from tests.running import ROOT, environment
from tests.terminal import Terminal

INIT = ROOT / "pipelines/__init__.py"
PROBE = """
import os, sys
found = [name for name in os.environ if name.startswith(("TQDM", "PYTHON")) and name != "PYTHONPATH"]
print(sys.flags.optimize, sys.flags.inspect, sys.warnoptions, sorted(found))
"""
SLEEP = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-IS", "-c", "import time; time.sleep(600)"])
with open("said.partial", "w") as file:
    print(child.pid, os.getsid(0), file=file)
os.rename("said.partial", "said")
time.sleep(600)
"""
CALL = """
import sys
from pathlib import Path
from pipelines.workspace.dvc import call
call(["probe"], Path(sys.argv[1]), lambda line: print(line, file=sys.stderr), bars=sys.argv[2] == "bars")
"""
BARS = r"""
import sys
for stream, text in (("stderr", "\rbar 50%"), ("stdout", "a line\n"), ("stderr", "\rbar 99%\nwarning: odd\n")):
    print(text, end="", file=getattr(sys, stream), flush=True)
"""


@pytest.fixture
def probe(tmp_path):
    """Writes a module `probe`, and makes the environment in which ours and it are found."""

    def write(code, **extra):
        (tmp_path / "probe.py").write_text(code, encoding="utf-8")
        return environment(cold=True, PYTHONPATH=f"{tmp_path}:{ROOT}", **extra)

    return write


@pytest.mark.parametrize("command", ["pipelines", "pipelines.download", "pipelines.register"])
def test_without_the_packages_one_line_says_how_to_enter_the_environment(command):
    """As by the machine's own `python3`: without `site` there is no package."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", command], cwd=ROOT, env=environment(cold=True), capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {sys.executable} has no package ")
    assert done.stderr.endswith("source .venv/bin/activate\n")
    assert done.stderr.count("\n") == 1
    assert f"; enter the project's environment, in {ROOT}: " in done.stderr


def test_an_older_python_is_told_so():
    code = "import sys\nsys.version_info, sys.version = (3, 10, 9), '3.10.9 (main)'\nimport pipelines"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.startswith("error: this is Python 3.10.9, expected 3.11; enter the project's environment")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_any_python_can_parse_what_says_so():
    tree = ast.parse(INIT.read_text(encoding="utf-8"), feature_version=(3, 4))
    found = {type(node) for node in ast.walk(tree)}
    assert not found & {ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.Starred, ast.AsyncFunctionDef, ast.Nonlocal}
    arguments = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.arg)]
    assert not any(getattr(node, "annotation", None) or getattr(node, "returns", None) for node in arguments)


def test_settings_that_the_libraries_do_not_stand_are_dropped(probe):
    asked = {"PYTHONOPTIMIZE": "2", "PYTHONINSPECT": "1", "PYTHONWARNINGS": "error", "TQDM_MININTERVAL": "abc"}
    env = probe(PROBE, **asked, TQDM_DISABLE="1", PYTHONHASHSEED="7")
    command = [sys.executable, "-m", "pipelines.workspace.tied", "probe"]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.read() == "0 0 [] ['PYTHONHASHSEED', 'TQDM_DISABLE']\n"
    assert process.returncode == 0


def test_ctrl_c_while_it_begins_says_nothing(probe):
    env = probe("raise KeyboardInterrupt")
    command = [sys.executable, "-m", "pipelines.workspace.tied", "probe"]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr.read() == ""
    assert process.returncode == -signal.SIGINT


def test_what_is_tied_is_of_another_session_and_ends_with_who_started_it(probe, tmp_path, monkeypatch):
    env = probe(SLEEP)
    monkeypatch.chdir(tmp_path)
    with start_tied(["probe"], env) as process:
        while not Path("said").exists():
            assert process.poll() is None
        child, session = map(int, Path("said").read_text(encoding="utf-8").split())
        assert session == process.pid != os.getsid(0)
        parts = [psutil.Process(child)]
        process.stdin.close()
        assert process.wait() == -signal.SIGTERM
        while any(map(is_alive, parts)):
            psutil.wait_procs(parts, timeout=1)


@pytest.mark.parametrize("bars", [True, False])
def test_a_line_is_printed_where_a_bar_was(tmp_path, bars):
    """Without bars all is lines of the log."""
    (tmp_path / "probe.py").write_text(BARS, encoding="utf-8")
    terminal = Terminal(ROOT, sys.executable, "-c", CALL, str(tmp_path), "bars" if bars else "none", cold=True)
    code, lines = terminal.end()
    assert code == 0
    assert "warning: odd" in lines
    assert terminal.said.count("\r\x1b[J") == (1 if bars else 3)
    assert ("\r\x1b[Ja line" in terminal.said) is bars
