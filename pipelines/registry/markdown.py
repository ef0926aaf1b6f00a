"""Markdown for people, in which text from anywhere stays text."""

import re
from collections.abc import Iterable, Sequence

STRUCTURE = re.compile(r"[&<>`*\[\]()!|~\\:@#^${}]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=www)\.", re.IGNORECASE)
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """A table, the first row its header; the first column flush left, the others flush right."""
    rows = [[re.sub(r"(?<!\\)\|", r"\|", cell) for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(row: Sequence[str]) -> str:
        padded = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    return "\n".join(map(line, [rows[0], rule, *rows[1:]]))


def escape_text(text: str) -> str:
    """Text in one line that is shown as it is: no mark-up, no HTML, no link. To stand within a line or a cell."""
    return STRUCTURE.sub(r"\\\g<0>", " ".join(CONTROL.sub("", text).split()))


def fence_lines(lines: Iterable[str]) -> str:
    """Lines as a block of code that nothing in them ends."""
    content = "\n".join(CONTROL.sub("", line) for line in lines)
    longest = max((len(run) for run in re.findall(r"`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{content}\n{fence}"
