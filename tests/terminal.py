"""A command in a terminal of its own, as a person has it: what they read, and the keys that they press."""

import os
import pty
import re
import subprocess
import termios
from pathlib import Path

from tests.running import environment

CTRL_C = b"\x03"


class Terminal:
    """The command leads the session of its terminal, so that a key reaches all that it has not started apart."""

    def __init__(self, folder: Path, *command: str, cold: bool = False, **extra: str) -> None:
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (40, 200))
        self.said = ""
        # the signals of a shell's child, whether or not those of the tests are ignored
        self.process = subprocess.Popen(
            ["env", "--default-signal=INT,HUP", "setsid", "--ctty", *command],
            cwd=folder,
            env=environment(cold, **extra),
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)

    def wait_for(self, pattern: str) -> None:
        while not re.search(pattern, self.said):
            assert self._read(), f"it ended before {pattern!r}:\n{self.said}"

    def press(self, key: bytes) -> None:
        os.write(self.master, key)

    def close(self) -> None:
        """Closes the window; all that leads or shares the session's foreground gets SIGHUP."""
        os.close(self.master)

    def end(self) -> tuple[int, list[str]]:
        """The exit code, and the lines that were read, without colours."""
        while self._read():
            pass
        os.close(self.master)
        lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.said).replace("\r", "\n").splitlines()
        return self.process.wait(), [line for line in lines if line.strip()]

    def _read(self) -> bool:
        try:
            data = os.read(self.master, 4096)
        except OSError:  # the last that had the terminal has ended
            data = b""
        self.said += data.decode(errors="replace")
        return bool(data)
