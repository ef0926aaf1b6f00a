"""Ctrl-C in the terminal of a run, after one that was killed. Other moments, signals and commands: tests/slow/test_interruption.py."""

import sqlite3
from contextlib import closing

from tests.projects import quick_project
from tests.running import call
from tests.terminal import CTRL_C, Terminal
from tests.training import wait_until_nobody_works_in


def test_ctrl_c_in_a_training_is_told_and_a_cancelled_run_and_the_same_command_goes_on(tmp_path):
    project = quick_project(tmp_path / "project")
    (project / "scratch").mkdir()
    (project / "scratch/hold").write_text("5", encoding="utf-8")
    killed = Terminal(project, "python", "-m", "pipelines", "run", cold=True)
    killed.wait_for(r"Beginning flow run")
    killed.process.kill()
    killed.end()  # with its server, which has the terminal too
    terminal = Terminal(project, "python", "-m", "pipelines", "run")
    terminal.wait_for(r"train: .* 5/20 ")
    terminal.press(CTRL_C)
    code, lines = terminal.end()
    pressed = next(number for number, line in enumerate(lines) if line.startswith("^C"))
    assert (code, lines[pressed + 1 :]) == (
        130,
        ["stopping after this step; Ctrl-C again does not wait for it", "stopped at step 5; the same command goes on"],
    )
    wait_until_nobody_works_in(project)
    with closing(sqlite3.connect(project / ".prefect/prefect.db")) as store:
        run = "select run.state_name, state.message from flow_run run join flow_run_state state on state.id = state_id"
        dead = ("Crashed", "its process was killed; the same command goes on from the last state")
        assert store.execute(f"{run} order by run.created").fetchall() == [dead, ("Cancelled", lines[-1])]
        assert ("train", "Cancelled") in store.execute("select name, state_name from task_run").fetchall()
    (project / "scratch/hold").unlink()
    assert "resuming at step 5 " in call(project, "dvc", "repro", "--single-item", "train")
