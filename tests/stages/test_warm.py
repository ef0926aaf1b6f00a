"""The warm interpreter against the real one: what the tests build on must end, print and die as a process of its own does."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests import warm
from tests.running import environment

SCRIPTS = {
    "arguments": "import sys; print(sys.argv[1:], sys.stdin.read())",
    "place": "import os; print(os.getcwd(), oct(os.umask(0)), os.environ['MINE'], __name__)",
    "streams": "import sys; print('out'); print('err', file=sys.stderr)",
    "unbuffered": "import os, sys; sys.stdout.write('out'); sys.stdout.flush(); os.write(1, b'!')",
    "warnings": "import warnings; warnings.warn('beware'); warnings.warn('older', DeprecationWarning)",
    "code": "import sys; sys.exit(7)",
    "message": "import sys; sys.exit('too bad')",
    "error": "raise ValueError('too bad')",
    "interrupt": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "terminated": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "at the end": "import atexit; atexit.register(print, 'the end'); print('before')",
    "threads": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()",
    "modules": "import sys; print([name for name in ('detr', 'pipelines', 'tests', 'prefect') if name in sys.modules])",
    "path": "import mine; print(mine.__file__, mine.VALUE)",
    "torch": "import torch; print(torch.get_num_threads(), torch.ones(3).sum().item())",
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/mine.py").write_text("VALUE = 1\n", encoding="utf-8")
    return tmp_path


def ended(folder, *arguments, cold):
    env = environment(cold, MINE="here", PYTHONPATH=str(folder / "elsewhere"), PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run(
        arguments, cwd=folder, env=env, input="in", capture_output=True, encoding="utf-8", check=False
    )
    return done.returncode, done.stdout, [line for line in done.stderr.splitlines() if not line.startswith("  File")]


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_it_ends_as_a_process_of_its_own(folder, script):
    command = ("python", "-c", script, "a", "b c")
    assert ended(folder, *command, cold=False) == ended(folder, *command, cold=True)


def test_modules_and_files_are_run_as_by_the_real_one(folder):
    (folder / "pipelines").mkdir()
    for place in ("pipelines/given.py", "given.py"):
        (folder / place).write_text("import sys\nprint(__name__, __file__, sys.argv, sys.path[0])\n", encoding="utf-8")
    for command in (("python", "-m", "pipelines.given", "x"), ("python", "given.py", "x"), ("dvc", "--version")):
        assert ended(folder, *command, cold=False) == ended(folder, *command, cold=True)


def test_what_is_not_seeded_differs_from_process_to_process(folder):
    script = "import random, numpy, torch; print(random.random(), numpy.random.rand(), torch.rand(1).item())"
    one, two = (ended(folder, "python", "-c", script, cold=False)[1].split() for _ in range(2))
    assert not set(one) & set(two)


def start(folder, script, **extra):
    env = environment(**extra)
    return subprocess.Popen(["python", "-c", script], cwd=folder, env=env, stdout=subprocess.PIPE, encoding="utf-8")


WAITING = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)"


def test_its_command_killed_it_is_killed_with_all_that_it_started(folder):
    nested = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {WAITING!r}])"
    with start(folder, nested) as process:
        child = psutil.Process(int(process.stdout.readline()))
        assert os.path.samefile(child.cwd(), folder)
        process.send_signal(signal.SIGKILL)
    child.wait(timeout=600)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_its_handler_and_its_exit_code_comes_back(folder, number):
    script = f"import signal, sys\nsignal.signal({int(number)}, lambda *_: sys.exit(75))\n{WAITING}"
    with start(folder, script) as process:
        process.stdout.readline()
        process.send_signal(number)
    assert process.returncode == 75


def test_torchruns_processes_end_with_it(folder):
    """As those of a training: they are warm too, and ask Linux for the end of whoever started them."""
    (folder / "pipelines").mkdir()
    (folder / "pipelines/given.py").write_text(
        f"import os\nprint(os.getppid(), flush=True)\n{WAITING}", encoding="utf-8"
    )
    starting = "import subprocess, sys\nsubprocess.run([sys.executable, '-u', '-m', 'pipelines.given'])"
    command = [sys.executable, "-c", starting.replace("sys.executable", repr(f"{warm.folder()}/python"))]
    with subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.PIPE, encoding="utf-8") as process:
        assert int(process.stdout.readline()) == process.pid
        worker = psutil.Process(int(process.stdout.readline()))
        process.kill()
    worker.wait(timeout=600)


def test_it_ends_with_the_tests_that_started_it(folder):
    """A session of tests that is killed leaves neither the warm interpreter nor a fork."""
    script = (
        "import os, subprocess, sys, time\nfrom tests import warm\n"
        "os.environ |= {warm.FOLDER: sys.argv[1], f'{warm.FOLDER}_PID': str(os.getpid())}\n"
        f"subprocess.run([warm.folder() + '/python', '-c', {WAITING!r}])"
    )
    command = [sys.executable, "-c", script, str(folder)]
    env = environment(cold=True, PYTHONPATH=os.pathsep.join(sys.path))
    with subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, encoding="utf-8") as session:
        fork = psutil.Process(int(session.stdout.readline()))
        server = fork.parent()
        session.kill()
    for process in (fork, server):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.02)
