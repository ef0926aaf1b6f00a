"""Runs a Python module as `python -m` does, in a process group that ends with its stdin: with who has started it."""

import os
import runpy
import signal
import sys
import threading


def end_with_stdin() -> None:
    os.read(0, 1)
    os.killpg(0, signal.SIGTERM)


def main() -> None:
    threading.Thread(target=end_with_stdin, daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
