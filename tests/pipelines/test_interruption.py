"""What a signal does to a command. In terminals: tests/journeys/test_interruption.py, tests/slow/test_interruption.py."""

import os
import signal
import subprocess
import threading
from collections import deque
from pathlib import Path

import pytest

from pipelines.workspace import interruption, processes


@pytest.fixture(autouse=True)
def handlers(monkeypatch):
    monkeypatch.setattr(interruption, "asked", [])
    before = {number: signal.getsignal(number) for number in interruption.SIGNALS}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", interruption.SIGNALS)
def test_the_first_signal_is_one_line_and_an_exit_code(number, capfd):
    with pytest.raises(SystemExit) as ended, interruption.heed_signals():
        os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number
    assert capfd.readouterr().err == "stopped\n"


def test_what_was_stopped_says_where(capfd):
    with pytest.raises(SystemExit) as ended, interruption.heed_signals():
        raise KeyboardInterrupt("stopped at step 3; the same command goes on")
    assert ended.value.code == 130
    assert capfd.readouterr().err == "stopped at step 3; the same command goes on\n"


def test_afterwards_a_signal_ends_the_process_as_it_is():
    with interruption.heed_signals():
        pass
    assert {signal.getsignal(number) for number in interruption.SIGNALS} == {signal.SIG_DFL}


def test_a_signal_that_is_ignored_stays_so():
    """As SIGHUP under nohup, and SIGINT of what a script has put into the background."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with interruption.heed_signals():
        os.kill(os.getpid(), signal.SIGHUP)
    assert interruption.asked == []


def test_the_second_kills_a_stage_that_does_not_end_and_lets_the_first_end(monkeypatch, capfd):
    """Its parent has heeded the first; what else was started ends after HURRY_SECONDS, with this process."""
    monkeypatch.setattr(interruption, "HURRY_SECONDS", 10**6)
    monkeypatch.setattr(processes, "STOP_SECONDS", 10**6)
    deaf = "trap '' TERM; (echo ready; while :; do sleep 1; done) & trap - TERM; wait"
    server = subprocess.Popen(["sleep", "600"])

    def work():
        with processes.start_group(["bash", "-c", deaf], Path(), deque(), {}) as stage:
            assert stage.stdout.readline() == "ready\n"
            later = threading.Thread(target=again, args=(stage,))
            later.start()
            os.kill(os.getpid(), signal.SIGINT)

    def again(stage):
        stage.wait()
        os.kill(os.getpid(), signal.SIGTERM)

    try:
        with pytest.raises(SystemExit) as ended, interruption.heed_signals():
            work()
        assert ended.value.code == 130
        assert server.poll() is None
        assert processes.running == set()
        assert capfd.readouterr().err == "stopped\n"
    finally:
        server.kill()
        server.wait()
