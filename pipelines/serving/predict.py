"""Pictures and folders of them through a registered model. `python -m pipelines predict IMAGE_OR_FOLDER...`"""

import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
from PIL import Image, ImageDraw, ImageFont

from pipelines.data.sources import PICTURES
from pipelines.labels import make_drawable, picture_font
from pipelines.progress import Progress
from pipelines.registry.packaging import detect, load

SUFFIXES = (".jpg", ".jpeg", ".png")
RESULTS = "detections.json"
PARTIAL = ".partial"  # behind the number of the process that fills the folder
COLOURS = ("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#46f0f0", "#f032e6", "#bcf60c")


class Listed(msgspec.Struct):
    """An item of detections.json, of which only the name of its picture is read."""

    picture: str


def predict(paths: list[Path], model: str, threshold: float, output: Path) -> None:
    """Fills `output` with each picture and its boxes, and detections.json: a list of {file, picture, boxes, scores,
    labels}, `picture` being the one drawn of `file`.

    `model` is an alias or a version's number. Folders are searched for pictures, at any depth; below `output` a picture
    keeps its path within the folder given. What is no JPEG or PNG, or damaged, is named and left out, before a version
    of earlier code can stumble over it. Any number of files will do: one is in memory at a time. Raises ValueError when
    there are none, or none can be read; `output` then is as it was before.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"--threshold is {threshold}, expected a score in 0..1")
    with replace_results(output) as folder:
        files = list(find_pictures(paths, output))
        if not files:
            raise ValueError(f"there are no {', '.join(SUFFIXES)} files in {', '.join(map(str, paths))}")
        number, boxes = detect_all(files, load(model), threshold, folder)
        if not number:
            raise ValueError(f"none of {len(files)} files could be read; expected JPEG or PNG pictures")
    hint = "" if boxes else "; a lower --threshold may show some"
    print(
        f"{number} of {len(files)} pictures are in {output}, with {boxes} boxes of a score from {threshold:g}{hint}; "
        f"{output / RESULTS} lists them"
    )


def detect_all(files: list[tuple[Path, Path]], model: Any, threshold: float, folder: Path) -> tuple[int, int]:
    """Writes what `predict` gives of (file, name) into `folder`; how many pictures, and boxes, there are."""
    decode, used, colours, number, boxes = load_decoder(), {RESULTS}, dict[str, str](), 0, 0
    with open_list(folder / RESULTS) as add, Progress(None, "predict", len(files), "picture") as bar:
        for path, name in files:
            try:
                if path.exists() and not path.is_file():
                    raise ValueError("it is no file")
                data = path.read_bytes()
                pixels = decode(data)
                answer = detect(model, data, threshold)
                drawn = draw(pixels, "PNG" if data.startswith(b"\x89PNG") else "JPEG", answer, colours)
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) and error.strerror else error
                bar.say(f"warning: {path} is left out: {reason}")
            else:
                own = make_unused(name, used)
                target = folder / own
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(drawn)
                add({"file": path.as_posix(), "picture": own.as_posix(), **answer})
                number, boxes = number + 1, boxes + len(answer["scores"])
            bar.update()
    return number, boxes


@contextmanager
def replace_results(output: Path) -> Iterator[Path]:
    """A folder whose content becomes that of `output` when the block ends well, in place of an earlier call's results.

    Raises ValueError where `output` holds anything else.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output is {output}, a file; give a folder")
    require_results_only(output)
    partial = output / f"{os.getpid()}{PARTIAL}"
    partial.mkdir(parents=True)
    try:
        yield partial
        for earlier in output.iterdir():
            if earlier.is_dir() and earlier != partial:
                shutil.rmtree(earlier)
            elif earlier != partial:
                earlier.unlink()
        for made in partial.iterdir():
            made.rename(output / made.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # it was there before, and holds something
            output.rmdir()


def require_results_only(output: Path) -> None:
    """Raises ValueError where a folder holds what no earlier call has made, or what another makes just now."""
    try:
        listed = msgspec.json.decode((output / RESULTS).read_bytes(), type=list[Listed])
        known = {RESULTS, *(item.picture for item in listed)}
    except (OSError, msgspec.DecodeError):
        known = set()
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output)
        process = name.parts[0].removesuffix(PARTIAL)
        if process != name.parts[0] and process.isdecimal():
            if psutil.pid_exists(int(process)):
                raise ValueError(f"process {process} is writing to {output}; wait for it, or give another --output")
        elif (path.is_symlink() or not path.is_dir()) and name.as_posix() not in known:
            raise ValueError(
                f"--output is {output}, where {name} is no result of an earlier call; give an empty or new folder"
            )


def load_decoder() -> Callable[[bytes], np.ndarray]:
    """The decoder of this checkout, apart from the package `detr`, which in this process is that of the version.

    It raises ValueError that begins with "it".
    """
    spec = spec_from_file_location("pixels", Path(__file__).parents[2] / "detr/pixels.py")
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)

    def decode(data: bytes) -> np.ndarray:
        try:
            pixels: np.ndarray = module.decode_pixels(data)
        except ValueError as error:
            raise ValueError(f"it {error}") from error
        return pixels

    return decode


def find_pictures(paths: Iterable[Path], output: Path) -> Iterator[tuple[Path, Path]]:
    """(file, its path below the folder given) of every file given and every picture in the folders, but for `output`.

    What does not exist counts as a file, whose reading says so.
    """
    for path in paths:
        if not path.is_dir():
            yield path, Path(path.name)
            continue
        pictures = (found for found in sorted(path.rglob("*")) if found.suffix.lower() in PICTURES)
        for found in pictures:
            if found.is_file() and output.resolve() not in found.resolve().parents:
                yield found, found.relative_to(path)


def make_unused(name: Path, used: set[str]) -> Path:
    """The name, with a number behind it if it was used before; letters that differ in case alone are the same."""
    free, number = name, 1
    while free.as_posix().lower() in used:
        number += 1
        free = name.with_name(f"{name.stem}_{number}{name.suffix}")
    used.add(free.as_posix().lower())
    return free


def draw(pixels: np.ndarray, format: str, answer: dict[str, list], colours: dict[str, str]) -> bytes:
    """The picture, as JPEG or PNG, with boxes and names in a colour per name, which `colours` remembers."""
    image = Image.fromarray(pixels)
    pen = ImageDraw.Draw(image)
    width = max(2, round(max(image.size) / 400))
    size, own = max(10, round(max(image.size) / 50)), picture_font(answer["labels"])
    font = ImageFont.truetype(own, size) if own else ImageFont.load_default(size)
    for box, score, label in reversed(list(zip(*answer.values(), strict=True))):  # the surest on top
        colour = colours.setdefault(label, COLOURS[len(colours) % len(COLOURS)])
        left, top, right, bottom = (min(max(v, 0), side - 1) for v, side in zip(box, image.size * 2, strict=True))
        pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=width)
        text, at = f"{make_drawable([label])[0]} {score:.2f}", (left + width, top + width)
        pen.rectangle(pen.textbbox(at, text, font), fill=colour)
        pen.text(at, text, "black", font)
    drawn = io.BytesIO()
    image.save(drawn, format, quality=92)
    return drawn.getvalue()


@contextmanager
def open_list(path: Path) -> Iterator[Callable[[Any], None]]:
    """A function that adds an item to the JSON list `path`, which is complete when the block ends well."""
    with path.open("w", encoding="utf-8") as file:
        separator = "["

        def add(item: Any) -> None:
            nonlocal separator
            file.write(f"{separator}\n{json.dumps(item)}")
            separator = ","

        yield add
        file.write("\n]\n")
