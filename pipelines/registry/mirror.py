"""What a training shows in MLflow while it runs, from a thread of its own.

Whatever a slow or dead server missed is filled in from the files when the model is registered.
"""

import contextlib
import math
import queue
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.registry.tracking import (
    PICTURES,
    SYSTEM,
    connect,
    fill_in,
    find_run,
    get_tracking_uri,
    log_params,
    log_rows,
)
from pipelines.stage import quote_error

if TYPE_CHECKING:
    from mlflow import MlflowClient

ANSWER_SECONDS = 5.0  # after which a server that is silent counts as absent
TICK_SECONDS = 10.0  # between samples of system metrics, and between attempts to reach a server that failed


def require_answer() -> None:
    """Raises OSError when a server at an HTTP address answers nothing; whatever it answers will do.

    Asked first, so that a training without its server does not import MLflow: seconds of the processor it trains on.
    """
    if get_tracking_uri().startswith("http"):
        import requests

        with contextlib.suppress(requests.exceptions.SSLError):  # it is there, and MLflow's settings decide the rest
            requests.get(f"{get_tracking_uri().rstrip('/')}/health", timeout=ANSWER_SECONDS, allow_redirects=False)


def find_monitors() -> list[Any]:
    """MLflow's monitors of this machine; of GPUs where nvidia-ml-py (NVIDIA) or pyrsmi (AMD) is installed."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    monitors = []
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor, ROCMMonitor):
        with contextlib.suppress(Exception):  # raised where there is nothing to watch, or no library to do it with
            monitors.append(kind())
    return monitors


def sample(monitors: list[Any]) -> dict[str, float]:
    """What the monitors see now, by names that begin with SYSTEM."""
    found: dict[str, float] = {}
    for monitor in monitors:
        with contextlib.suppress(Exception):
            monitor.collect_metrics()
            found |= {f"{SYSTEM}{name}": value for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
    return found


class Mirror:
    """Sends rows and pictures to MLflow from a daemon thread; no failure there reaches the caller, who never waits.

    What cannot be sent is kept and tried again every ten seconds; one warning says so. Values that the run has
    already, from a training that was killed or repeated, are not sent again. System metrics of this machine go along
    every ten seconds while the server answers: MLflow's SystemMetricsMonitor would wait at its end for one that hangs.
    """

    def __init__(self, fingerprint: str, name: str, document: dict[str, Any]) -> None:
        self._training = (fingerprint, name, document)
        self._items: queue.SimpleQueue[dict[str, float] | Path | None] = queue.SimpleQueue()
        self._rows: list[dict[str, float]] = []  # not sent yet, as the pictures
        self._pictures: list[Path] = []
        self._known: dict[str, set[int]] = {}
        self._client: MlflowClient | None = None
        self._run_id, self._step, self._monitors = "", 0, list[Any]()
        self._failed = self._warned = False
        self._patience = math.inf  # when `close` stops to wait for what is under way
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def put(self, row: dict[str, float]) -> None:
        self._items.put(row)

    def put_picture(self, path: Path) -> None:
        """The PNG file must stay where it is."""
        self._items.put(path)

    def close(self, timeout_seconds: float = 10.0) -> None:
        """Waits for what is under way, at most `timeout_seconds`, and at most two for an answer of a server."""
        self._items.put(None)
        deadline = time.monotonic() + timeout_seconds
        while self._thread.is_alive() and time.monotonic() < min(deadline, self._patience):
            self._thread.join(0.05)

    def _work(self) -> None:
        tick, last = 0.0, False
        while not last:
            last = self._take(tick)
            due = time.monotonic() >= tick
            if due:
                tick = time.monotonic() + TICK_SECONDS
            if self._failed and (last or not due):
                continue
            try:
                self._send(due)
                self._failed, self._patience = False, math.inf
            except Exception as error:
                if not self._warned:
                    reason = quote_error(error, 400)
                    print(f"warning: MLflow misses rows, they are filled in at registration: {reason}", file=sys.stderr)
                self._failed = self._warned = True
                self._patience = 0.0

    def _take(self, tick: float) -> bool:
        """Takes what is put, waiting until `tick` or, before anything was, for ever; says whether it was the last.

        What follows within a second is taken along: a batch of rows costs hardly more than one.
        """
        idle = self._client is None and not self._rows and not self._pictures
        with contextlib.suppress(queue.Empty):
            item = self._items.get(timeout=None if idle else max(0.0, tick - time.monotonic()))
            until = time.monotonic() + 1
            while item is not None:
                if isinstance(item, Path):
                    self._pictures.append(item)
                else:
                    self._rows.append(item)
                item = self._items.get(timeout=max(0.0, until - time.monotonic()))
            return True
        return False

    def _send(self, with_system_metrics: bool) -> None:
        """One attempt at everything that was taken; what is sent is forgotten."""
        if not (self._client or self._rows or self._pictures):
            return
        if self._client is None or self._failed:
            self._expect_answer()
            require_answer()
        if self._client is None:
            if not self._failed:
                self._patience = math.inf  # for the import
            fingerprint, name, document = self._training
            client = connect()
            self._run_id = find_run(client, fingerprint, name)
            log_params(client, self._run_id, document)
            self._monitors = find_monitors()
            self._client = client
        while self._rows:
            self._expect_answer()
            some = self._rows[:25]
            try:
                fill_in(self._client, self._run_id, some, self._known)
            except Exception:
                self._known.clear()  # what of it arrived is asked again
                raise
            self._step = int(some[-1]["step"])
            del self._rows[:25]
        if with_system_metrics:
            self._expect_answer()
            log_rows(self._client, self._run_id, [{"step": self._step, **sample(self._monitors)}])
        while self._pictures:
            self._expect_answer()
            if self._pictures[0].exists():
                self._client.log_artifact(self._run_id, str(self._pictures[0]), PICTURES)
            del self._pictures[0]

    def _expect_answer(self) -> None:
        if not self._failed:
            self._patience = math.inf if get_tracking_uri().startswith("sqlite") else time.monotonic() + 2
