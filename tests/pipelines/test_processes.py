"""What a terminal shows of a stage: its progress, and no error, which is for the last line of the whole."""

import json
import sys

import pytest

from pipelines.workspace.processes import is_error
from tests.running import ROOT
from tests.terminal import Terminal

SHOWN = """
import json
import sys
from collections import deque
from pathlib import Path
from pipelines.workspace.processes import start_group
lines = deque()
with start_group([sys.executable, "-c", sys.argv[1]], Path(), lines, {}) as process:
    process.stdout.read()
print(json.dumps(list(lines)))
"""
STAGE = r"""
import sys
for text in ("begins\n", "\rbar  1%", "\rbar 50% \u00f6", "\r\x1b[K", "warning: so\n", "err", "or: it ", "fails\n",
             "\x1b[31mERROR\x1b[39m: failed to", " reproduce\n", "error", "s are none\n", "error: no end"):
    sys.stderr.write(text)
    sys.stderr.flush()
"""


def test_a_terminal_shows_all_but_errors_and_all_whole_lines_are_kept():
    terminal = Terminal(ROOT, sys.executable, "-c", SHOWN, STAGE)
    code, lines = terminal.end()
    assert code == 0
    *shown, kept = lines
    assert [line.strip() for line in shown] == ["begins", "bar  1%", "bar 50% ö", "warning: so", "errors are none"]
    assert json.loads(kept) == [
        *("begins", "warning: so", "error: it fails", "ERROR: failed to reproduce", "errors are none", "error: no end")
    ]


@pytest.mark.parametrize(
    ("line", "whole", "so_far"),
    [
        ("error: x", True, True),
        ("\x1b[31mERROR\x1b[39m: x", True, True),
        ("\x1b[Jerror: x", True, True),
        ("err", False, True),
        ("", False, True),
        ("errors", False, False),
        ("an error: x", False, False),
    ],
)
def test_what_is_an_error_or_may_become_one(line, whole, so_far):
    assert (is_error(line), is_error(line, so_far=True)) == (whole, so_far)
