import errno
import os
import pty
import subprocess
import termios

import pytest

from pipelines.files import write_json
from pipelines.stage import explain
from tests.running import ROOT, call, environment
from tests.terminal import Terminal

COUNT = "from pipelines.progress import Progress\nfor _ in Progress(range(40), 'count', 40, 'image'): pass"


def test_progress_is_plain_lines_where_there_is_no_terminal():
    done = subprocess.run(
        ["python", "-c", COUNT], cwd=ROOT, env=environment(), capture_output=True, encoding="utf-8", check=True
    )
    assert "\r" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("count: 100%")


def test_progress_is_a_bar_on_a_terminal():
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    done = subprocess.Popen(["python", "-c", COUNT], cwd=ROOT, env=environment(), stderr=slave)
    os.close(slave)
    shown = b""
    while True:
        try:
            data = os.read(master, 4096)
        except OSError:
            break
        if not data:
            break
        shown += data
    os.close(master)
    assert done.wait() == 0
    assert b"\rcount: 100%" in shown


def test_an_error_on_a_terminal_takes_the_place_of_a_bar():
    lines = ("import sys", "from pipelines.stage import command", "def fail():", "    sys.stderr.write('bar 50%')")
    code = "\n".join([*lines, "    raise ValueError('so')", "command(fail)"])
    terminal = Terminal(ROOT, "python", "-c", code, cold=True)
    assert terminal.end()[0] == 1
    assert terminal.said == "bar 50%\r\x1b[Jerror: so\r\n"


STRANGER = """
import getpass, os, pwd
os.getuid = lambda: 54321
from pipelines.stage import command
from pipelines.surroundings import OF_A_CALLER
def show():
    assert not OF_A_CALLER & os.environ.keys()
    print(getpass.getuser(), os.path.expanduser("~"))
command(show)
"""


@pytest.mark.parametrize(("home", "own"), [("/nonexistent", True), (str(ROOT), False)])
def test_a_user_whom_the_machine_does_not_know_has_a_name_and_a_home(tmp_path, home, own):
    caller = {"GIT_DIR": "/nowhere", "GIT_INDEX_FILE": "/nowhere/index", "GIT_LITERAL_PATHSPECS": "1"}
    said = call(tmp_path, "python", "-c", STRANGER, HOME=home, PYTHONPATH=str(ROOT), **caller)
    assert said.split() == ["user-54321", f"{tmp_path}/scratch/home" if own else home]
    assert (tmp_path / "scratch/home").exists() == own


@pytest.mark.parametrize("folder", ["tmpabc", "standalone/tmpabc"])  # of DVC's queue, of `dvc exp run --temp`
def test_an_experiment_of_dvc_has_the_scratch_of_its_clone(tmp_path, folder):
    place = tmp_path / ".dvc/tmp/exps" / folder
    place.mkdir(parents=True)
    code = "from pathlib import Path; from pipelines.stage import command; command(lambda: Path('scratch/x').touch())"
    for _ in range(2):
        call(place, "python", "-c", code, PYTHONPATH=str(ROOT))
    assert (place / "scratch").readlink() == tmp_path / "scratch"
    assert (tmp_path / "scratch/x").exists()


@pytest.mark.parametrize("name", ["data", "data/coco", "artifacts"])
def test_what_leads_out_of_the_clone_is_refused_before_it_is_made(tmp_path, name):
    (tmp_path / "clone/data").mkdir(parents=True)
    (tmp_path / "disk").mkdir()
    place = tmp_path / "clone" / name
    if place.exists():
        place.rmdir()
    place.symlink_to(tmp_path / "disk")
    asked = ("python", "-c", "from pipelines.stage import command; command(lambda: print('made'))")
    said = call(tmp_path / "clone", *asked, code=1, DVC_STAGE="download", PYTHONPATH=str(ROOT))
    assert f" leads to {tmp_path}/disk" in said
    assert f"dvc cache dir --local {tmp_path}/" in said
    assert said.count("\n") == 1
    assert call(tmp_path / "clone", *asked, PYTHONPATH=str(ROOT)) == "made\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "data/x"), "the disk is full at data/x; free space there"),
        (PermissionError(errno.EACCES, "Permission denied", "data/x"), "no permission for data/x; make it writable"),
        (
            FileNotFoundError(errno.ENOENT, "No such file", "data/x"),
            "data/x does not exist; run the stage that makes it",
        ),
        (ValueError("two\n  lines"), "two lines"),
        (RuntimeError(), "RuntimeError"),
        (
            RuntimeError(
                "Caught it in a worker.\nOriginal Traceback (most recent call last):\n  f()\nValueError: a.jpg: bad\n"
            ),
            "a.jpg: bad",
        ),
    ],
)
def test_an_error_is_one_line(error, message):
    assert explain(error).startswith(message)
    assert "\n" not in explain(error)


def test_json_is_whole_or_absent(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"b": object()})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n "b": 1\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
