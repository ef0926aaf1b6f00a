"""Prefect's server and worker and MLflow's server of a project, by `python -m pipelines up`, and their REST API."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from tests.conftest import call, free_port

FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@dataclass(frozen=True)
class Services:
    """What runs for a project, and how a test asks it."""

    project: Path
    prefect: str  # the address of its server
    mlflow: str

    def ask(self, method: str, path: str, **body: Any) -> Any:
        """The JSON that Prefect's API answers; raises for a status of 400 and above."""
        answer = requests.request(method, f"{self.prefect}/api/{path}", json=body or None, timeout=30)
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

    def wait_until(self, condition: Callable[[], Any], seconds: float = 300, what: str = "it") -> Any:
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, f"{what} did not happen within {seconds} seconds"
            time.sleep(0.2)
        return found

    def wait(self, run_id: str, seconds: float = 300) -> dict[str, Any]:
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
    ports = free_port(), free_port()
    try:
        call(
            project,
            "python",
            "-m",
            "pipelines",
            "up",
            "--prefect-port",
            str(ports[0]),
            "--mlflow-port",
            str(ports[1]),
            **env,
        )
        yield Services(project, *(f"http://127.0.0.1:{port}" for port in ports))
    finally:
        call(project, "python", "-m", "pipelines", "down")
