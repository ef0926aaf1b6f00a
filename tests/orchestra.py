"""Prefect's server and worker and MLflow's server of a project, by `python -m pipelines up`, and their REST API."""

import contextlib
import hashlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import requests

from pipelines.retraining.services import SERVICE, find_marked
from pipelines.workspace.processes import read_environment
from tests import warm
from tests.projects import commit
from tests.running import call, free_port

FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@dataclass(frozen=True)
class Services:
    """What runs for a project, and how a test asks it."""

    project: Path
    prefect: str  # the address of its server
    mlflow: str
    pages: list[str] = field(default_factory=list)  # what `up` has printed, each time

    def ask(self, method: str, path: str, **body: Any) -> Any:
        """The JSON that Prefect's API answers; raises for a status of 400 and above."""
        for _ in range(10):
            answer = requests.request(method, f"{self.prefect}/api/{path}", json=body or None, timeout=30)
            if answer.status_code != 503:  # while SQLite is locked; Prefect's own client tries again too
                break
            time.sleep(1)
        if not answer.ok:
            raise requests.HTTPError(f"{answer.status_code}: {answer.text}", response=answer)
        return answer.json() if answer.content else None

    def start(self, deployment: str, **parameters: Any) -> str:
        """Starts a run of a deployment, as the form does; its id."""
        found = self.ask("GET", f"deployments/name/{deployment}")
        run = self.ask("POST", f"deployments/{found['id']}/create_flow_run", parameters=parameters)
        return str(run["id"])

    def run(self, run_id: str) -> dict[str, Any]:
        return self.ask("GET", f"flow_runs/{run_id}")

    def runs(self) -> list[dict[str, Any]]:
        return self.ask("POST", "flow_runs/filter", sort="EXPECTED_START_TIME_DESC")

    def tasks(self, run_id: str) -> dict[str, str]:
        """The names of a run's tasks and of their states, in the order of their start."""
        found = self.ask("POST", "task_runs/filter", flow_runs={"id": {"any_": [run_id]}})
        return {one["name"]: one["state_name"] for one in sorted(found, key=lambda one: one["start_time"] or "~")}

    def deployments(self) -> dict[str, dict[str, Any]]:
        return {one["name"]: one for one in self.ask("POST", "deployments/filter")}

    def automations(self) -> list[tuple[str, str]]:
        """Names and ids."""
        return sorted((one["name"], one["id"]) for one in self.ask("POST", "automations/filter"))

    def log(self, run_id: str) -> str:
        lines: list[str] = []
        while True:
            found = self.ask(
                "POST", "logs/filter", logs={"flow_run_id": {"any_": [run_id]}}, sort="TIMESTAMP_ASC", offset=len(lines)
            )
            lines += [one["message"] for one in found]
            if not found:
                return "\n".join(lines)

    def artifacts(self, run_id: str) -> dict[str, dict[str, Any]]:
        """A run's artifacts by key."""
        found = self.ask("POST", "artifacts/filter", artifacts={"flow_run_id": {"any_": [run_id]}})
        return {one["key"]: one for one in found}

    def percent(self, run_id: str) -> float:
        """Where the progress of a run's training stands; 0 before it has any."""
        return float(self.artifacts(run_id).get("training", {"data": 0})["data"])

    def training(self, *overrides: str, **parameters: Any) -> str:
        """A run that has begun to train, and has saved a state: its id."""
        before = self.states()
        run_id = self.start("retrain/on-demand", overrides=list(overrides), **parameters)

        def trains() -> bool:
            assert self.run(run_id)["state_type"] not in FINAL, self.log(run_id)
            return bool(self.states().items() - before.items())

        self.wait_until(trains, what="the training")
        return run_id

    @contextlib.contextmanager
    def held(self, *overrides: str, after: str = "", **parameters: Any) -> Iterator[str]:
        """A run of quick stages that stays in the middle of its training, or `after` it has registered, in the block."""
        hold = self.project / "scratch" / ("hold_registered" if after == "register" else "hold")
        hold.parent.mkdir(exist_ok=True)
        hold.write_text("5", encoding="utf-8")
        try:
            run_id = self.training(*overrides, **parameters)
            if after == "register":
                registered = "scratch/worktrees/*/artifacts/register/version.json"
                self.wait_until(lambda: list(self.project.glob(registered)), what="the registration")
            yield run_id
        finally:
            hold.unlink()

    def end_of(self, stage: str) -> None:
        """Waits until the process of a stage has ended, whether or not Prefect's server hears of it."""

        def ended() -> bool:
            made = False
            for lock in (self.project / "scratch" / "worktrees").glob("*/dvc.lock"):
                with contextlib.suppress(FileNotFoundError):
                    made |= f"\n  {stage}:" in lock.read_text(encoding="utf-8")
            return made and not self.processes("DETR_WORKTREE")

        self.wait_until(ended, what=f"the end of the stage {stage}")

    def states(self) -> dict[Path, int]:
        """The resume states of trainings, and when they were written."""
        found = {}
        for path in (self.project / "scratch").glob("*/state"):
            with contextlib.suppress(FileNotFoundError):  # it is just being replaced
                found[path] = path.stat().st_mtime_ns
        return found

    def completed(self, run_id: str) -> str:
        """The branch of a run that has ended well."""
        run = self.wait(run_id)
        assert run["state_type"] == "COMPLETED", f"{run['state']}\n{self.log(run_id)[-3000:]}"
        branch = run["state"]["message"].removeprefix("branch ")
        assert branch in call(self.project, "git", "branch", "--format=%(refname:short)").split()
        return str(branch)

    def versions(self) -> dict[int, dict[str, str]]:
        """The tags of every registered version, by its number, and its aliases under `aliases`."""
        api = f"{self.mlflow}/api/2.0/mlflow"
        asked = {"filter": "name='detr'"}
        found = requests.get(f"{api}/model-versions/search", params=asked, timeout=60).json().get("model_versions", [])
        model = requests.get(f"{api}/registered-models/get", params={"name": "detr"}, timeout=60).json()
        named = model.get("registered_model", {}).get("aliases", [])  # the search gives none
        return {
            int(one["version"]): {tag["key"]: tag["value"] for tag in one.get("tags", [])}
            | {"aliases": " ".join(sorted(x["alias"] for x in named if x["version"] == one["version"]))}
            for one in found
        }

    def processes(self, mark: str, words: str = "") -> list[psutil.Process]:
        """The processes with this variable in their environment, of this project, and these words in their command."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                value, command = process.environ().get(mark, "/"), " ".join(process.cmdline())
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and Path(value).is_relative_to(self.project) and words in command:
                    found.append(process)
        return found

    def kill(self, mark: str = "DETR_SERVICES", words: str = "") -> None:
        """Kills such processes, all before one can react to the end of another."""
        found = self.processes(mark, words)
        for action in ("suspend", "kill"):
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    getattr(process, action)()
        psutil.wait_procs(found, timeout=300)

    def kill_services(self, *services: str) -> None:
        """Kills all processes of these services, of all where none is named."""
        found = [
            one for one in find_marked(self.project) if not services or read_environment(one).get(SERVICE) in services
        ]
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=300)

    def stop(self, words: str) -> Callable[[], None]:
        """Kills a server or the worker. To call what this returns starts it again as it was, and waits for its health."""
        (process, *_) = sorted(self.processes("DETR_SERVICES", words), key=lambda one: one.create_time())
        command, env = process.cmdline(), process.environ()
        parts = process.children(recursive=True) if words == "mlflow server" else []  # a worker's runs are its children
        self.kill(words=words)
        for part in parts:
            with contextlib.suppress(psutil.NoSuchProcess):
                part.kill()
        health = {"prefect server": f"{self.prefect}/api/health", "mlflow server": f"{self.mlflow}/health"}.get(words)

        def healthy() -> bool:
            with contextlib.suppress(requests.RequestException):
                return health is None or requests.get(health, timeout=5).ok
            return False

        def again() -> None:
            command_apart = ["setsid", "--fork", *command]  # a child of nobody here, as one that `up` has started
            subprocess.run(
                command_apart,
                cwd=self.project,
                env=env,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=True,
            )
            self.wait_until(healthy, what=words)

        return again

    @property
    def ports(self) -> list[str]:
        return [address.rpartition(":")[2] for address in (self.prefect, self.mlflow)]

    def up(self, *options: str, code: int = 0, **env: str) -> str:
        """What `up` prints."""
        prefect, mlflow = self.ports
        ports = ("--prefect-port", prefect, "--mlflow-port", mlflow)
        page = call(self.project, "python", "-m", "pipelines", "up", *ports, *options, code=code, **env)
        self.pages.append(page)
        return page

    def down(self) -> str:
        return call(self.project, "python", "-m", "pipelines", "down")

    def assert_nothing_runs(self) -> None:
        assert [" ".join(process.cmdline()) for process in find_marked(self.project)] == []
        for port in self.ports:
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", int(port))), f"something listens on {port}"

    def assert_sound(self) -> None:
        """What holds whatever has happened: no worktree, lock or process is left, every version is a commit."""
        project = self.project
        assert call(project, "git", "worktree", "list").count("\n") == 1
        assert not list((project / "scratch/worktrees").glob("*"))
        assert not [path for path in (project / ".git").rglob("*.lock") if path.is_file()]
        assert not self.processes("DETR_WORKTREE")
        versions = self.versions()
        weights = [tags["weights_sha256"] for tags in versions.values()]
        assert len(weights) == len(set(weights))
        for tags in versions.values():
            assert tags["decision"] in ("champion", "challenger", "held back")
            branch = call(
                project, "git", "branch", "--format=%(refname:short)", "--contains", tags["git_commit"]
            ).strip()
            assert branch == tags["git_branch"]
            lock = subprocess.check_output(["git", "show", f"{tags['git_commit']}:dvc.lock"], cwd=project)
            assert hashlib.sha256(lock).hexdigest() == tags["dvc_lock_sha256"]
            assert b"artifacts/register" in subprocess.check_output(["git", "show", f"{branch}:dvc.lock"], cwd=project)
        for path in (project / ".dvc/cache/files/md5").glob("??/*"):
            digest = hashlib.md5(path.read_bytes()).hexdigest()
            assert path.parent.name + path.name.removesuffix(".dir") == digest

    def assert_reproduces(self, branch: str, folder: Path) -> None:
        """A fresh clone of a branch, with the cache, has all its outputs as dvc.lock says."""
        call(self.project, "git", "clone", "--quiet", "--branch", branch, str(self.project), str(folder))
        (folder / ".dvc" / "config.local").write_text(
            f"[cache]\n    dir = {self.project}/.dvc/cache\n", encoding="utf-8"
        )
        call(folder, "dvc", "checkout")
        assert json.loads(call(folder, "dvc", "status", "--json")) == {"register": ["always changed"]}

    def wait_until(self, condition: Callable[[], Any], seconds: float = 600, what: str = "it") -> Any:
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, f"{what} did not happen within {seconds} seconds"
            time.sleep(0.2)
        return found

    def wait(self, run_id: str, seconds: float = 600) -> dict[str, Any]:
        """The run once its state is final."""

        def ended() -> Any:
            run = self.run(run_id)
            return run if run["state_type"] in FINAL else None

        try:
            return self.wait_until(ended, seconds, f"the end of run {run_id}")
        except AssertionError as error:
            raise AssertionError(
                f"{error}; it is {self.run(run_id)['state_name']}:\n{self.log(run_id)[-3000:]}"
            ) from error


@contextlib.contextmanager
def services(project: Path, **env: str) -> Iterator[Services]:
    """Runs `up` for a small project on free ports, and `down` afterwards."""
    found = Services(project, *(f"http://127.0.0.1:{free_port()}" for _ in range(2)))
    try:
        found.up(**env)
        yield found
    finally:
        found.down()


def warm_runs(folder: Path) -> dict[str, str]:
    """The setting for `up` by which runs start their stages as forks of the warm interpreter. For stacks without kills."""
    folder.mkdir()
    python = f"{warm.folder()}/python"
    lines = ("import sys", 'if sys.orig_argv[1:3] == ["-m", "prefect.engine"]:', f"    sys.executable = {python!r}")
    (folder / "sitecustomize.py").write_text("\n".join([*lines, ""]), encoding="utf-8")
    return {"PYTHONPATH": str(folder)}


def branch(project: Path, name: str, change: Callable[[], Any], start: str = "main") -> None:
    """A new branch with a commit of what `change` does to the project's files."""
    call(project, "git", "switch", "--quiet", "--create", name, start)
    change()
    commit(project, name, "--update")
    call(project, "git", "switch", "--quiet", "main")


def listeners(project: Path, *services: str) -> set[tuple[str, str]]:
    """Where the processes of a project listen: addresses and ports."""
    processes = (one for one in find_marked(project) if not services or read_environment(one)[SERVICE] in services)
    found = (process.net_connections("inet") for process in processes)
    return {(c.laddr.ip, str(c.laddr.port)) for of in found for c in of if c.status == psutil.CONN_LISTEN}


@contextlib.contextmanager
def connections(project: Path) -> Iterator[set[str]]:
    """The addresses that processes of the project are connected to meanwhile, without loopback."""
    found: set[str] = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(1):
            for process in find_marked(project):
                with contextlib.suppress(psutil.Error):
                    found.update(c.raddr.ip for c in process.net_connections("inet") if c.raddr)
            found.difference_update([ip for ip in found if ip_address(ip.removeprefix("::ffff:")).is_loopback])

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def answers_page(url: str, origin: str) -> bool:
    """Whether a server has a browser let a page of `origin` send JSON to `url`."""
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    answer = requests.options(url, headers={"Origin": origin} | asked, timeout=30)
    return answer.headers.get("Access-Control-Allow-Origin") in ("*", origin)


@contextlib.contextmanager
def listening() -> Iterator[tuple[str, list[tuple[str, str, bytes]]]]:
    """A local HTTP server that takes everything: its address, and what came, as (method, target, body)."""
    came: list[tuple[str, str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def take(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            came.append((self.command, self.path, body))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST = do_PUT = do_CONNECT = take

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", came
        finally:
            server.shutdown()
