"""Locks between real processes."""

import os
import platform
import signal
import subprocess
import sys

import pytest

from pipelines.locks import hold_lock, is_held
from tests.running import ROOT, environment

HOLD = (
    "import sys\nfrom pathlib import Path\nfrom pipelines.locks import hold_lock\n"
    "with hold_lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
)


def test_a_lock_names_who_holds_it_and_dies_with_its_process(tmp_path):
    path, said = tmp_path / "folder/lock", []
    assert not is_held(path)
    assert not path.exists()
    command = [sys.executable, "-c", HOLD, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment(cold=True, PYTHONPATH=str(ROOT)), text=True, **pipes) as other:
        other.stdout.readline()
        holder = f"process {other.pid} on {platform.node()}"
        assert is_held(path)
        with pytest.raises(TimeoutError, match=holder), hold_lock(path, said.append, seconds=0.2):
            pass
        assert said == [holder]
        other.send_signal(signal.SIGKILL)
        with hold_lock(path, said.append):
            assert path.read_text(encoding="utf-8") == f"process {os.getpid()} on {platform.node()}\n"
            assert is_held(path)
    assert not is_held(path)
