"""Everything that a person needs on one machine, in the background: Prefect's server and worker, MLflow's server."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import requests

from pipelines.repro import STOP_SECONDS, WORKTREE, hidden
from pipelines.stage import QUIET

MARK = "DETR_SERVICES"  # in the environment of all that `up` starts, and of what that starts: the project's root
START_SECONDS = 180
HOST = "127.0.0.1"


def up(root: Path, prefect_port: int, mlflow_port: int) -> dict[str, str]:
    """Starts both servers, prepares Prefect's, deploys, starts a worker; the URLs by name.

    What is left of a crash is stopped first; runs that it interrupted go on. Raises RuntimeError or ValueError.
    """
    down(root)
    urls = {"Prefect": f"http://{HOST}:{prefect_port}", "MLflow": f"http://{HOST}:{mlflow_port}"}
    os.environ |= QUIET | {
        MARK: str(root),
        "PREFECT_HOME": os.environ.get("PREFECT_HOME", str(root / ".prefect")),
        "PREFECT_API_URL": f"{urls['Prefect']}/api",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PREFECT_CLIENT_MAX_RETRIES": "8",
        "MLFLOW_TRACKING_URI": urls["MLflow"],
    }
    store = os.environ.get("MLFLOW_BACKEND_STORE_URI", f"sqlite:///{root / 'mlflow.db'}")
    artifacts = os.environ.get("MLFLOW_ARTIFACTS_DESTINATION", str(root / "mlartifacts"))
    mlflow = ["--backend-store-uri", store, "--artifacts-destination", artifacts, "--workers", "1"]
    servers = {
        "prefect": ["prefect", "server", "start", "--host", HOST, "--port", str(prefect_port)],
        "mlflow": ["mlflow", "server", "--host", HOST, "--port", str(mlflow_port), *mlflow],
    }
    try:
        processes = {name: start(root, name, command) for name, command in servers.items()}
        for name, address in (("prefect", f"{urls['Prefect']}/api/health"), ("mlflow", f"{urls['MLflow']}/health")):
            wait_for(address, processes[name], log_of(root, name))
        from pipelines import automations

        automations.prepare()
        deployed = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
        if deployed.returncode:
            raise RuntimeError(f"prefect deploy --all failed: {hidden(deployed.stdout + deployed.stderr)[-1000:]}")
        automations.resume_interrupted()
        start(root, "worker", ["prefect", "worker", "start", "--pool", automations.POOL, "--name", "here"])
    except BaseException:
        down(root)
        raise
    return urls


def down(root: Path) -> int:
    """Stops all that `up` has started for this project, and what that has started; how many processes it were.

    A training saves its state and goes on with the next `up`: its run is not told, so Prefect has it as running.
    """
    ours = marked(root)
    stages = [process for process in ours if environment(process).get(WORKTREE)]
    runs = [p for p in ours if p not in stages and not is_server(p)]
    for process in runs:
        with suppress(psutil.Error):
            process.suspend()
    for group, seconds in ((stages, STOP_SECONDS), ([p for p in ours if is_server(p)], 10)):
        for process in group:
            with suppress(psutil.Error):
                process.terminate()
        psutil.wait_procs(group, timeout=seconds)
        for process in (*runs, *group):
            with suppress(psutil.Error):
                process.kill()
    psutil.wait_procs(ours, timeout=10)
    for process in marked(root):
        with suppress(psutil.Error):
            process.kill()
    return len(ours)


def marked(root: Path) -> list[psutil.Process]:
    """The processes, but this one, that carry the mark of this project."""
    everyone = (process for process in psutil.process_iter() if process.pid != os.getpid())
    return [process for process in everyone if environment(process).get(MARK) == str(root)]


def environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def is_server(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        line = " ".join(process.cmdline())
        return (
            "prefect server" in line or "mlflow server" in line or "prefect.server" in line or "mlflow.server" in line
        )
    return False


def log_of(root: Path, name: str) -> Path:
    return root / "scratch" / "services" / f"{name}.log"


def start(root: Path, name: str, command: list[str]) -> subprocess.Popen[bytes]:
    """A Python module in a session of its own, its output in scratch/services/NAME.log."""
    path = log_of(root, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits until a server is healthy. Raises RuntimeError that names its log."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(requests.RequestException):
            if requests.get(url, timeout=5).ok:
                return
        time.sleep(0.3)
    raise RuntimeError(f"{url} does not answer; the end of {log}: {hidden(log.read_text()[-500:].strip())}")
