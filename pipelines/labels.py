"""Names and numbers as a person reads them: any name as a short line, in a font that has its letters; no -1."""

import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

ABSENT = -1.0  # COCO's number where the data has no such object
LONGEST = 40  # characters of a label
LATIN = "".join(map(chr, range(256)))
FONT = "DejaVu Sans"  # comes with matplotlib: the same letters everywhere


def say_metric(value: float, digits: int = 3) -> str:
    """One of COCO's numbers for people, who take -1 for a bad one."""
    return "no such objects" if value == ABSENT else f"{value:.{digits}f}"


def shorten(name: str) -> str:
    """The name in one line of printable characters, cut where it is long."""
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in name).split())
    return plain if len(plain) <= LONGEST else f"{plain[: LONGEST - 3]}..."


def make_drawable(names: Iterable[str]) -> list[str]:
    """Labels for names. A letter that no font here has is its code point, as U+884C."""
    names = list(names)
    known = set(LATIN) if is_latin(names) else set().union(*map(read_letters, find_fonts(tuple(names))))
    return [label(name, known) for name in names]


def is_latin(names: Iterable[str]) -> bool:
    """Whether the letters of all names are Western Europe's, which every font has: then no font is looked for."""
    return all(letter in LATIN for name in names for letter in shorten(name))


def label(name: str, known: set[str]) -> str:
    text = unicodedata.normalize("NFC", shorten(name)) or repr(name)
    spelt = "".join(letter if letter in known else f" U+{ord(letter):04X} " for letter in text)
    return spelt if spelt == text else " ".join(spelt.split())


@cache
def find_fonts(names: tuple[str, ...]) -> tuple[str, ...]:
    """Files of fonts that together have the letters of names: matplotlib's own, and what is installed and adds some."""
    from matplotlib.font_manager import findfont, fontManager

    found = [str(findfont(FONT))]
    missing = set("".join(map(shorten, names))) - read_letters(found[0])
    for entry in sorted(fontManager.ttflist, key=lambda entry: (entry.name, entry.fname)) if missing else ():
        if missing & read_letters(entry.fname) and "LastResort" not in entry.fname:
            found.append(entry.fname)
            missing -= read_letters(entry.fname)
    return tuple(found)


@cache
def read_letters(font: str) -> set[str]:
    """The letters that a font file has as outlines; none where it cannot be opened, or is of coloured pictures."""
    from matplotlib.ft2font import FT2Font

    with suppress(OSError, RuntimeError):
        opened = FT2Font(font)
        if opened.scalable:
            return {chr(code) for code in opened.get_charmap()}
    return set()


@contextmanager
def draw_plainly(names: Iterable[str] = ()) -> Iterator[None]:
    """Draws as everywhere: by none of a person's own settings of matplotlib, with no mathematics in labels.

    `names` are drawn in fonts that have their letters.
    """
    import matplotlib
    from matplotlib.font_manager import FontProperties

    families: list[Any] = [FontProperties(fname=path).get_name() for path in find_fonts(tuple(names))]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams |= {"backend": "Agg", "text.parse_math": False, "font.family": families}
        yield


def picture_font(names: Iterable[str]) -> str | None:
    """A font file that has the letters of names, the most of them; None where the one of Pillow has them all."""
    if is_latin(names := list(names)):
        return None
    letters = set("".join(map(shorten, names)))
    return max(find_fonts(tuple(names)), key=lambda font: len(letters & read_letters(font)))
