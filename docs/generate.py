"""Writes docs/parameters.md, and the table of rules in docs/validation.md, from the code: python -m docs.generate"""

import inspect
import types
import typing
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from detr.config import Key, read_keys
from pipelines.agreement import KINDS as SECTIONS
from pipelines.data.rules import KINDS, ValidateParams, make_rules
from pipelines.params import from_document, merge_parameters

ROOT = Path(__file__).parent.parent
PAPER = "coco-detr-r50"
RULES = "<!-- rules: python -m docs.generate -->"
HEAD = f"""\
# Parameters

<!-- python -m docs.generate writes this page. -->

Every number that changes a result is a line of [params.yaml](../params.yaml). This page says what each line means and
which values it may have. `demo` is the value in `params.yaml` as committed; `paper` is the one of
`--preset {PAPER}`, where it differs.

Change a parameter for one run, or look at the result first:

```bash
python -m pipelines run --set train.epochs=3 --set train.lr=3e-4
python -m pipelines run --preset photos --set download.source=/path/to/folder
python -m pipelines params --preset {PAPER}    # checked and printed, nothing runs
```

A [preset](../presets) is a file with the lines that differ. A typo in a name, a value that is not allowed, and values
that contradict each other stop the run before it starts; the message names the key and suggests the right name.
"""
WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text"}


def describe_type(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind in WORDS:
        return WORDS[kind]
    if origin in (types.UnionType, typing.Union):
        return " or ".join(describe_type(one) for one in inner)
    if origin is dict:
        return f"mapping, each a {describe_type(inner[1])}"
    if origin in (tuple, list):
        return f"{'two' if inner[1:] == (inner[0],) else 'list of'} {describe_type(inner[0])}s"
    return "mapping"


def describe_values(kind: Any, key: Key) -> str:
    if key.choices:
        return ", ".join(f"`{choice}`" for choice in key.choices)
    return ", ".join(filter(None, (describe_type(kind), key.describe_allowed())))


def show(value: Any) -> str:
    """Returns a value as params.yaml has it; a long one is left to its preset."""
    if len(str(value)) > 60:
        return f"[its preset](../presets/{PAPER}.yaml)"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def describe_key(name: str, hint: Any, key: Key, demo: dict, paper: dict) -> str:
    """Returns the row of a key, whose values are in the sections `demo` and `paper` where those have it."""
    field = name.rpartition(".")[2]
    ours, theirs = demo.get(field), paper.get(field)
    cells = [show(ours) if field in demo else "", show(theirs) if theirs != ours else ""]
    if field == "tolerated":
        cells = ["[by rule](validation.md#the-rules)", ""]
    return f"| {' | '.join([f'`{name}`', key.meaning, describe_values(hint, key), *cells])} |"


def describe_section(name: str, kind: type, demo: Any, paper: Any) -> Iterator[str]:
    """Yields the lines of a section, and of the sections within it."""
    demo, paper = (values if isinstance(values, dict) else {} for values in (demo, paper))
    file = Path(inspect.getfile(kind)).relative_to(ROOT).as_posix()
    yield from (f"\n## {name}\n", f"`{kind.__name__}` in [{file}](../{file}).\n")
    yield from ("| key | meaning | values | demo | paper |", "|---|---|---|---|---|")
    hints, keys = typing.get_type_hints(kind), read_keys(kind)
    yield from (describe_key(f"{name}.{field}", hints[field], key, demo, paper) for field, key in keys.items())
    for field, hint in hints.items():
        for part in (one for one in (hint, *typing.get_args(hint)) if isinstance(one, type) and is_dataclass(one)):
            yield from describe_section(f"{name}.{field}", part, demo.get(field), paper.get(field))


def write_parameters() -> str:
    demo, paper = merge_parameters(ROOT, None, []), merge_parameters(ROOT, PAPER, [])
    lines = (line for name, kind in SECTIONS.items() for line in describe_section(name, kind, demo[name], paper[name]))
    return HEAD + "\n".join(lines) + "\n"


def write_rules() -> str:
    """Returns the table of the gate's rules, as the committed params.yaml has them."""
    document = merge_parameters(ROOT, None, [])
    config = from_document(document, "validate", ValidateParams)
    lines = ["| rule | table | level | what must hold | may be tolerated | demo |", "|---|---|---|---|---|---|"]
    for kind in KINDS:
        for rule in make_rules(config, kind, document["model"]["num_queries"]):
            tolerable = "yes" if rule.column and rule.tolerable else "no"
            demo = f"`{config.tolerated[rule.name]}`" if rule.name in config.tolerated else ""
            lines.append(f"| `{rule.name}` | {kind} | {rule.level} | {rule.meaning} | {tolerable} | {demo} |")
    return "\n".join(lines)


def with_rules(page: str) -> str:
    """Returns docs/validation.md with the table of rules between its two marks."""
    before, _, rest = page.partition(RULES)
    return f"{before}{RULES}\n\n{write_rules()}\n\n{RULES}{rest.partition(RULES)[2]}"


if __name__ == "__main__":
    (ROOT / "docs/parameters.md").write_text(write_parameters(), encoding="utf-8")
    path = ROOT / "docs/validation.md"
    path.write_text(with_rules(path.read_text(encoding="utf-8")), encoding="utf-8")
