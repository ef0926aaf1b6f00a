"""Ctrl-C, SIGTERM and a closed window at other moments than a training that heeds them, with real processes."""

import os
import signal
import sqlite3
from contextlib import closing, suppress

import pytest
import requests

from pipelines.workspace.worktree import hold_run_lock
from tests.orchestra import services
from tests.projects import commit, quick_project
from tests.running import call, free_port
from tests.terminal import CTRL_C, Terminal
from tests.training import wait_until_nobody_works_in

RUN = ("python", "-m", "pipelines", "run")
GOES_ON = "stopped at step 5; the same command goes on"


@pytest.fixture
def project(tmp_path):
    """A project whose training stays after its fifth step."""
    made = quick_project(tmp_path / "project")
    (made / "scratch").mkdir()
    (made / "scratch/hold").write_text("5", encoding="utf-8")
    return made


def states(project):
    with closing(sqlite3.connect(project / ".prefect/prefect.db")) as store:
        return [name for (name,) in store.execute("select state_name from flow_run order by created")]


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["to the process", "to its group"])
@pytest.mark.parametrize("options", [(), ("--set", "train.seed=1")], ids=["here", "in a worktree"])
def test_sigterm(project, options, send):
    """To the group as `timeout` does, and what stops a machine."""
    terminal = Terminal(project, *RUN, *options, cold=True)
    terminal.wait_for(r"train: .* 5/20 ")
    send(terminal.process.pid, signal.SIGTERM)
    code, lines = terminal.end()
    assert (code, lines[-1]) == (128 + signal.SIGTERM, GOES_ON)
    assert states(project) == ["Cancelled"]
    wait_until_nobody_works_in(project)
    assert not list((project / "scratch/worktrees").glob("*"))
    assert call(project, "git", "branch", "--list", "runs/*") == ""


def test_a_closed_window(project):
    terminal = Terminal(project, *RUN, cold=True)
    terminal.wait_for(r"train: .* 5/20 ")
    terminal.close()
    assert terminal.process.wait() == 128 + signal.SIGHUP
    assert states(project) == ["Cancelled"]
    wait_until_nobody_works_in(project)


def test_pressed_again_it_does_not_wait_for_a_stage_that_does_not_end(project):
    """For which a first key has it wait for an hour here; a second would end it without a word to Prefect after another."""
    for file, was, now in (
        ("quick.py", "lambda number, frame: asked.append(number)", "signal.SIG_IGN"),
        ("pipelines/workspace/processes.py", "STOP_SECONDS = 15", "STOP_SECONDS = 3600"),
        ("pipelines/workspace/interruption.py", "HURRY_SECONDS = 5.0", "HURRY_SECONDS = 3600.0"),
    ):
        text = (project / file).read_text(encoding="utf-8")
        assert was in text
        (project / file).write_text(text.replace(was, now), encoding="utf-8")
    commit(project, "a stage that ignores signals", "--all")
    terminal = Terminal(project, *RUN, cold=True)
    terminal.wait_for(r"train: .* 5/20 ")
    terminal.press(CTRL_C)
    terminal.wait_for("stopping after this step; Ctrl-C again does not wait for it")
    terminal.press(CTRL_C)
    assert terminal.end()[0] == 130
    assert states(project) == ["Cancelled"]
    wait_until_nobody_works_in(project)


def test_while_the_temporary_server_starts(project):
    terminal = Terminal(project, *RUN, cold=True)
    terminal.wait_for("Starting temporary server")
    terminal.press(CTRL_C)
    code, lines = terminal.end()
    assert (code, lines[-1]) == (130, "stopped")
    wait_until_nobody_works_in(project)


def test_while_another_run_is_under_way(project):
    with hold_run_lock(project, print):
        terminal = Terminal(project, *RUN, cold=True)
        terminal.wait_for("waiting for it to end")
        terminal.press(CTRL_C)
        code, lines = terminal.end()
    assert (code, lines[-1]) == (130, "stopped")


def test_with_a_server_of_its_own_the_run_is_cancelled_there(project):
    with services(project) as served:
        terminal = Terminal(project, *RUN, cold=True, PREFECT_API_URL=f"{served.prefect}/api")
        terminal.wait_for(r"train: .* 5/20 ")
        terminal.press(CTRL_C)
        code, lines = terminal.end()
        assert (code, lines[-1]) == (130, GOES_ON)
        (run,) = served.runs()
        assert (run["state_name"], run["state"]["message"]) == ("Cancelled", GOES_ON)
        assert "Crash" not in served.log(run["id"])


def test_prefects_page_is_served_without_a_question_until_it_is_stopped(project):
    port = free_port()
    terminal = Terminal(project, "python", "-m", "pipelines", "ui", "prefect", "--port", str(port), cold=True)
    address, answer = f"http://127.0.0.1:{port}", None
    terminal.wait_for(f"dashboard at {address}")
    while answer is None:
        assert terminal.process.poll() is None
        with suppress(requests.ConnectionError):
            answer = requests.get(f"{address}/ui-settings", timeout=60).json()
    assert answer["api_url"] == f"{address}/api"
    terminal.press(CTRL_C)
    code, lines = terminal.end()
    assert (code, lines[-1]) == (130, "stopped")
    wait_until_nobody_works_in(project)
