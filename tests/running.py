"""Commands and servers that tests run, in the environment of a person who has just activated the project's."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.surroundings import QUIET
from tests import warm

ROOT = Path(__file__).parent.parent


def environment(cold: bool = False, **extra: str) -> dict[str, str]:
    """The environment of a person who has activated the virtual environment and nothing else.

    Its `python` and `dvc` are forks of the warm interpreter (tests/warm.py), unless it is to be `cold`.
    """
    kept = {key: os.environ[key] for key in ("HOME", "LANG", "TMPDIR") if key in os.environ}
    places = [*([] if cold else [warm.folder()]), str(Path(sys.executable).parent), os.environ["PATH"]]
    return kept | QUIET | {"PATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"} | extra


def call(cwd: Path, *arguments: str, code: int | None = 0, cold: bool = False, **extra: str) -> str:
    """The output of a command, stdout and stderr together; fails unless it ends with `code`."""
    done = subprocess.run(
        arguments,
        cwd=cwd,
        env=environment(cold, **extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
    )
    assert code is None or done.returncode == code, f"{arguments} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def have_settings(monkeypatch: pytest.MonkeyPatch, *settings: str) -> None:
    """Gives git in this process settings "section.key=value", as a person's own file does."""
    monkeypatch.setenv("GIT_CONFIG_COUNT", str(len(settings)))
    for number, setting in enumerate(settings):
        key, _, value = setting.partition("=")
        monkeypatch.setenv(f"GIT_CONFIG_KEY_{number}", key)
        monkeypatch.setenv(f"GIT_CONFIG_VALUE_{number}", value)


PROGRAMS = {"chromium": "chromium", "docker-compose": "docker-compose", "postgresql": "postgres"}


def needs(package: str) -> Path:
    """The program that a Debian package is for; skips the test with the line that gets it where it is missing."""
    folders = [
        os.environ["PATH"],
        "/usr/sbin",
        *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)),
    ]
    found = shutil.which(PROGRAMS[package], path=os.pathsep.join(folders))
    if found is None:
        pytest.skip(f"{PROGRAMS[package]} is missing: apt-get install {package}")
    return Path(found)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def mlflow_server(folder: Path, port: int | None = None) -> Iterator[tuple[str, subprocess.Popen]]:
    """A real tracking server on its own SQLite file and artifacts: its address and its process, once it is healthy."""
    folder.mkdir(exist_ok=True)
    port = port or free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/store"]
    env = environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")  # eight processes that nothing here uses
    with (folder / "log").open("a", encoding="utf-8") as log:
        server = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError((folder / "log").read_text(encoding="utf-8")) from None
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}", server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
