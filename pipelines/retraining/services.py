"""Everything that a person needs on one machine, in the background: Prefect's server and worker, MLflow's server."""

import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import requests

from pipelines.redaction import redact
from pipelines.registry.database import prepare_database
from pipelines.surroundings import HOST, bypass_proxies
from pipelines.workspace.processes import STOP_SECONDS, WORKTREE, read_environment, stop

MARK = "DETR_SERVICES"  # in the environment of all that `up` starts, and of what that starts: the project's root
SERVICE = "DETR_SERVICE"  # and which of them it is, or was started by
SERVERS = ("prefect", "mlflow")
WEBHOOK = "DETR_WEBHOOK_URL"  # the address that failures are told; a secret: Prefect's server gets it, encrypted
ORIGINS = "PREFECT_SERVER_CORS_ALLOWED_ORIGINS"
ALLOWED_HOSTS = "MLFLOW_SERVER_ALLOWED_HOSTS"
START_SECONDS = 180


def list_origins(host: str, port: int) -> str:
    """The pages that may call Prefect's server from a browser: its own. By default it would answer every page."""
    names = (host, "localhost") if host == HOST else (host,)
    return ",".join(f"http://{name}:{port}" for name in names)


def up(root: Path, prefect_port: int, mlflow_port: int, host: str = HOST) -> tuple[dict[str, str], list[str]]:
    """Starts both servers, prepares Prefect's, deploys, starts a worker; the URLs, and a line on each run that died.

    What runs already is stopped first; runs that this, or a crash, interrupts go on. Raises RuntimeError or ValueError,
    and leaves nothing running then.
    """
    webhook = os.environ.pop(WEBHOOK, None)
    down(root)
    for name, port in (("prefect", prefect_port), ("mlflow", mlflow_port)):
        check_free(host, port, f"--{name}-port")
    urls = {"Prefect": f"http://{host}:{prefect_port}", "MLflow": f"http://{host}:{mlflow_port}"}
    os.environ |= {
        "PREFECT_HOME": os.environ.get("PREFECT_HOME", str(root / ".prefect")),
        "PREFECT_API_URL": f"{urls['Prefect']}/api",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "MLFLOW_TRACKING_URI": urls["MLflow"],
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes that nothing here uses
    }
    os.environ |= bypass_proxies(host)
    os.environ.setdefault(ORIGINS, list_origins(host, prefect_port))
    if host != HOST or ALLOWED_HOSTS in os.environ:  # by other names MLflow answers nobody: the worker uses this one
        names = (f"{host}:{mlflow_port}", os.environ.get(ALLOWED_HOSTS))
        os.environ[ALLOWED_HOSTS] = ",".join(filter(None, names))
        os.environ.setdefault("MLFLOW_SERVER_CORS_ALLOWED_ORIGINS", urls["MLflow"])
    database = root / "mlflow.db"
    stores = {  # not on the command line, which everybody on this machine can read
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{database}",
        "MLFLOW_ARTIFACTS_DESTINATION": str(root / "mlartifacts"),
    } | os.environ
    command = ["mlflow", "server", "--host", host, "--port", str(mlflow_port), "--workers", "1"]
    if stores["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{database}":
        prepare_database(database)
    try:
        prefect = start(root, "prefect", ["prefect", "server", "start", "--host", host, "--port", str(prefect_port)])
        mlflow = start(root, "mlflow", command, stores)
        wait_for(f"{urls['MLflow']}/health", mlflow, find_log(root, "mlflow"))
        wait_for(f"{urls['Prefect']}/api/health", prefect, find_log(root, "prefect"))
        from pipelines.retraining import automations, terminal

        automations.prepare(webhook)
        if start(root, "deploy", automations.deploy_command(root)).wait():
            raise RuntimeError(f"prefect deploy --all failed: {read_end(find_log(root, 'deploy'))}")
        terminal.report_dead()
        died = automations.resume_interrupted()
        start(root, "worker", ["prefect", "worker", "start", "--pool", automations.POOL, "--name", "here"])
    except BaseException:
        down(root)
        raise
    return urls, died


def check_free(host: str, port: int, option: str) -> None:
    """Raises ValueError where a server cannot listen there."""
    if host in ("0.0.0.0", "::", ""):
        raise ValueError(
            f"--host is {host!r}, which is no address to call; give the name or the address that browsers will use"
        )
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                what = f"port {port} is in use; stop what listens there, or choose another: {option} {port + 1}"
            else:
                what = f"cannot listen on {host}:{port}: {error.strerror}; choose another --host or {option}"
            raise ValueError(what) from None


def down(root: Path) -> int:
    """Stops all that `up` has started for this project, and what that has started; how many processes it were.

    A training saves its state and goes on with the next `up`: its run is not told, so Prefect has it as running.
    """
    ours = find_marked(root)
    stages = [process for process in ours if WORKTREE in read_environment(process)]
    servers = [p for p in ours if p not in stages and read_environment(p).get(SERVICE) in SERVERS]
    runs = [process for process in ours if process not in (*stages, *servers)]
    for process in runs:  # a worker that sees a run die tells the server; a training needs a reader of what it prints
        with suppress(psutil.Error):
            process.suspend()
    stop(stages, STOP_SECONDS)
    stop(runs, 0)
    stop(servers, 5)
    late = find_marked(root)  # what was being started
    stop(late, 0)
    return len({*ours, *late})


def find_marked(root: Path) -> list[psutil.Process]:
    """The processes, but this one, that carry the mark of this project."""
    everyone = (process for process in psutil.process_iter() if process.pid != os.getpid())
    return [process for process in everyone if read_environment(process).get(MARK) == str(root)]


def find_log(root: Path, name: str) -> Path:
    return root / "scratch" / "services" / f"{name}.log"


def read_end(log: Path) -> str:
    return redact(log.read_text(errors="replace", encoding="utf-8")[-1000:].strip())


def start(root: Path, name: str, module: list[str], env: Mapping[str, str] = os.environ) -> subprocess.Popen[bytes]:
    """A Python module in a session of its own, with the mark, its output in scratch/services/NAME.log."""
    path = find_log(root, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():  # may say why it died
        path.replace(path.with_suffix(".log.old"))
    with path.open("ab") as log:  # so that it goes on where `collect` has emptied it
        return subprocess.Popen(
            [sys.executable, "-m", *module],
            cwd=root,
            env={**env, MARK: str(root), SERVICE: name},
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
    raise RuntimeError(f"{url} does not answer; the end of {log}: {read_end(log)}")
