"""How far a training is, on the page of its run."""

import contextlib
import contextvars
import re
import threading
import time
from typing import Any

from prefect.artifacts import create_progress_artifact, update_progress_artifact

UPDATE_SECONDS = 5.0  # between updates of the progress
STEPS = re.compile(r"\btrain:.*?(\d+)/(\d+) \[(.*)\]")  # in the lines of a training
EPOCHS = re.compile(r"epoch (\d+)/(\d+): ")


class Progress:
    """A progress artifact that the lines of a training move, from a thread: nobody waits for a server that is slow."""

    def __init__(self) -> None:
        self.artifact: Any = None
        self.percent = 0.0
        self.words = ["", ""]  # the steps, the last epoch
        self.thread: threading.Thread | None = None
        self.updated = -UPDATE_SECONDS

    def take(self, line: str) -> None:
        if found := STEPS.search(line):
            self.percent = 100 * int(found[1]) / int(found[2])
            times, _, *said = found[3].split(", ")
            self.words[0] = ", ".join([f"step {found[1]} of {found[2]}", f"{times.partition('<')[2]} left", *said])
        elif found := EPOCHS.match(line):
            self.percent = max(self.percent, 100 * int(found[1]) / int(found[2]))
            self.words[1] = line
        else:
            return
        if time.monotonic() - self.updated >= UPDATE_SECONDS:
            self._send()

    def finish(self) -> None:
        """Says where it ended; a training that changed nothing has none."""
        if self.artifact is not None or any(self.words):
            self.percent = 100.0
            if self.thread:
                self.thread.join(UPDATE_SECONDS)
            self._send()
            if self.thread:
                self.thread.join(UPDATE_SECONDS)

    def _send(self) -> None:
        if self.thread is None or not self.thread.is_alive():
            self.updated = time.monotonic()
            self.thread = threading.Thread(target=contextvars.copy_context().run, args=(self._show,), daemon=True)
            self.thread.start()

    def _show(self) -> None:
        description = "; ".join(filter(None, self.words))
        with contextlib.suppress(Exception):  # what the server does not take is in the log
            if self.artifact is None:
                self.artifact = create_progress_artifact(self.percent, key="training", description=description)
            else:
                update_progress_artifact(self.artifact, self.percent, description)
