"""The strict loader of params.yaml; presets and overrides merge here."""

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

T = TypeVar("T")
SECTIONS = ("download", "validate", "model", "train", "evaluate", "register")


def read_yaml(path: Path) -> Any:
    """A YAML 1.2 document (1e-4 is a number) that keeps its comments when written back."""
    try:
        document = YAML().load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; run from the root of the project") from None
    except YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} is empty or not a mapping of sections")
    return document


def to_yaml(document: Any) -> str:
    """The document as YAML that DVC's stricter parser reads too: no line is broken, however long its address."""
    buffer, yaml = StringIO(), YAML()
    yaml.width = 4096
    yaml.dump(document, buffer)
    return buffer.getvalue()


def load(section: str, kind: type[T], path: Path = Path("params.yaml")) -> T:
    """The section as its frozen dataclass.

    A missing, unknown or mistyped key is a ValueError that names the key, its section and the nearest
    right name; so is a section that no stage has.
    """
    return from_document(read_yaml(path), section, kind)


def from_document(document: Any, section: str, kind: type[T]) -> T:
    """`load` for a document that has been read already."""
    document = YAML(typ="safe", pure=True).load(to_yaml(document))
    for name in document:
        if name not in SECTIONS:
            raise ValueError(f"params.yaml has an unknown section {name!r}{find_nearest(name, SECTIONS)}")
    if section not in document:
        raise ValueError(f"params.yaml lacks the section {section!r}")
    return typing.cast(T, _convert(document[section], kind, section))


def check_section(document: Any, section: str, kinds: Mapping[str, Any]) -> Any:
    """A section of any commit's params.yaml, of which only the keys in `kinds` are looked at. Errors as in `load`."""
    found = document.get(section)
    if not isinstance(found, dict):
        raise ValueError(f"params.yaml lacks the section {section!r}{find_nearest(section, document)}")
    for key, kind in kinds.items():
        if key not in found:
            raise ValueError(f"{section} lacks the key {key!r}{find_nearest(key, found)}")
        _convert(found[key], kind, f"{section}.{key}")
    return found


def _convert(value: Any, kind: Any, where: str) -> Any:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        records = [k for k in typing.get_args(kind) if is_dataclass(k)]
        plain = [k for k in typing.get_args(kind) if not is_dataclass(k)]
        kind = records[0] if isinstance(value, dict) and records else typing.Union[tuple(plain)]  # noqa: UP007
    if not is_dataclass(kind):
        try:
            return msgspec.convert(value, kind, strict=True)
        except msgspec.ValidationError as error:
            raise ValueError(f"{where} is {value!r}: {str(error)[0].lower()}{str(error)[1:]}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}, expected a section with the keys {[f.name for f in fields(kind)]}")
    hints = typing.get_type_hints(kind)
    for key in value:
        if key not in hints:
            raise ValueError(f"{where} has an unknown key {key!r}{find_nearest(key, hints)}")
    for key in hints:
        if key not in value:
            raise ValueError(f"{where} lacks the key {key!r}{find_nearest(key, [k for k in value if k not in hints])}")
    return kind(**{key: _convert(value[key], hints[key], f"{where}.{key}") for key in hints})  # type: ignore[operator]


def is_utf8(text: str) -> bool:
    """Whether a text can be written: a file name in another encoding has bytes that stand for no character."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def find_nearest(name: str, choices: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(choices), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(choices)}" if choices else ""


def merge_parameters(root: Path, preset: str | None, overrides: Iterable[str]) -> Any:
    """`root`/params.yaml with a preset (`presets/NAME.yaml`) and then `section.key=value` overrides on top.

    A preset holds only what differs; `extends: OTHER` merges that preset first. Nothing can be added that
    params.yaml lacks, but for the entries of a mapping that is empty there.
    """
    document = read_yaml(root / "params.yaml")
    if preset is not None:
        _merge_preset(document, root / "presets", preset)
    for override in overrides:
        if not is_utf8(override):
            raise ValueError(f"override {override!r} has bytes that are no UTF-8; rename what it names, or link to it")
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r} is not of the form section.key=value")
        nested: Any = text if _is_literal(document, key, text) else _parse(override, text)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        _overlay(document, nested, "params.yaml")
    return document


def _is_literal(document: Any, key: str, text: str) -> bool:
    """Whether an override is a text as it stands: where params.yaml has a text, and it is written as no other thing."""
    base = document
    for part in key.split("."):
        if not isinstance(base, dict) or part not in base:
            break
        base = base[part]
    return isinstance(base, str) and not text.startswith(("{", "[", '"', "'")) and "\n" not in text


def _parse(override: str, text: str) -> Any:
    """The value of an override as YAML has it. Raises ValueError, also for a comment, which YAML would drop."""

    def load(written: str) -> Any:
        return YAML(typ="safe", pure=True).load(written)

    try:
        value = load(text)
    except YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not valid YAML") from error
    if "#" in text:
        stand_in = "\ue000"
        try:
            kept = repr(load(text.replace("#", stand_in))).replace(repr(stand_in)[1:-1], "#") == repr(value)
        except YAMLError:
            kept = False
        if not kept:
            raise ValueError(f"override {override!r}: YAML drops what follows '#'; put the value into quotes")
    return value


def _merge_preset(document: Any, folder: Path, name: str) -> None:
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"there is no preset {name!r}{find_nearest(name, known)}")
    overlay = read_yaml(folder / f"{name}.yaml")
    parent = overlay.pop("extends", None)
    if parent is not None:
        _merge_preset(document, folder, parent)
    _overlay(document, overlay, f"presets/{name}.yaml on params.yaml")


def _overlay(base: Any, overlay: Any, where: str) -> None:
    for key, value in overlay.items():
        if key not in base:
            raise ValueError(f"{where}: there is no key {key!r} to override{find_nearest(key, base)}")
        if isinstance(value, dict) and isinstance(base[key], dict) and base[key]:
            _overlay(base[key], value, f"{where}: {key}")
        else:
            base[key] = value
