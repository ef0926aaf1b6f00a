"""What the keys of a configuration mean, and which values they may have."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_type_hints


@dataclass(frozen=True)
class Key:
    """The meaning of a key and its allowed values, in the annotation of a field: `epochs: Annotated[int, Key(...)]`.

    Numbers are finite and within the limits. The entries of a list and the values of a mapping are checked one by one.
    """

    meaning: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: tuple[Any, ...] = ()

    def allows(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if not isinstance(value, int | float):
            return True
        return (
            math.isfinite(value)
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def describe_allowed(self) -> str:
        """Returns the allowed values in words, as "at least 0 and below 1"; nothing where every finite one is."""
        if self.choices:
            return f"one of {list(self.choices)}"
        limits = {"at least": self.ge, "above": self.gt, "at most": self.le, "below": self.lt}
        return " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)

    def describe_expected(self, value: Any) -> str:
        allowed = self.describe_allowed()
        if self.choices:
            return allowed
        number = "a number" if math.isfinite(value) else "a finite number"
        return f"{number} of {allowed}" if allowed.startswith("at") else f"{number} {allowed}".strip()


def check_keys(config: Any, section: str) -> None:
    """Raises ValueError that names the first key of a dataclass whose value is not allowed, and what is."""
    for name, key in read_keys(type(config)).items():
        for where, value in _each_value(f"{section}.{name}", getattr(config, name)):
            if not key.allows(value):
                raise ValueError(f"{where} is {value!r}, expected {key.describe_expected(value)}")


def read_keys(kind: type) -> dict[str, Key]:
    """Returns the `Key` of every field that has one, by the field's name; a text is one of no limits."""
    found = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        for one in getattr(hint, "__metadata__", ()):
            found[name] = Key(one) if isinstance(one, str) else one
    return found


def _each_value(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"{where}.{name}", one) for name, one in value.items())
    elif isinstance(value, list | tuple):
        yield from ((f"{where}[{index}]", one) for index, one in enumerate(value))
    else:
        yield where, value
