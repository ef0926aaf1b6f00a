"""What a dataset's pictures are: every one read whole, checked against its CRC, its header and its end looked at."""

import difflib
import hashlib
import io
import os
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from os.path import splitext
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import unquote

from PIL import Image

from pipelines.progress import Progress

CHUNK = 500
SPELLED_FIRST, SPELLED_AMONG = 10, 5000  # names compared letter by letter, and with how many: it takes long
ORIENTATION = 0x0112  # EXIF tag: 1 is upright


class Member(NamedTuple):
    """A file in an archive of pictures, or in a folder of them, where it has no offset."""

    name: str
    offset: int | None
    size: int
    crc: int
    stored: bool


class Picture(NamedTuple):
    """What was seen of one picture; `opens` is False where it cannot be read, and the rest then means nothing."""

    opens: bool
    width: int = 0
    height: int = 0
    format: str = ""  # JPEG or PNG
    mode: str = ""  # Pillow's: RGB, L, CMYK, ...
    orientation: int = 1
    whole: bool = False  # ends as its format ends
    decodes: bool = True  # True too where it was not decoded
    digest: bytes = b""  # the first half of the SHA-256 of the file
    problem: str = (
        ""  # why it cannot be used, the predicate of a sentence whose subject is its name ("is damaged: ...")
    )


def pictures_of(data: Path, split: str) -> Path:
    """The archive of a split, which training reads, or its folder where there is no archive."""
    archive, folder = data / f"{split}.zip", data / split
    return folder if folder.is_dir() and not archive.exists() else archive


def list_members(path: Path) -> list[Member]:
    """The files of a zip, or those below a folder. Raises ValueError for a zip that is torn."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        return [Member(p.relative_to(path).as_posix(), None, p.stat().st_size, 0, True) for p in files]
    try:
        with zipfile.ZipFile(path) as archive:
            return [
                Member(
                    info.filename,
                    info.header_offset,
                    info.file_size,
                    info.CRC,
                    info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1,
                )
                for info in archive.infolist()
                if not info.is_dir()
            ]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a whole zip file ({error}); run download again") from error


def find(names: Iterable[str], held: Iterable[Member]) -> list[list[Member]]:
    """The members that each name stands for: those of that path, or else those of that bare name."""
    by_path: dict[str, list[Member]] = {}
    by_name: dict[str, list[Member]] = {}
    for member in held:
        by_path.setdefault(member.name, []).append(member)
        by_name.setdefault(member.name.rpartition("/")[2], []).append(member)
    return [by_path.get(name) or by_name.get(name, []) for name in names]


def find_nearest(names: Sequence[str], held: Sequence[str]) -> list[str]:
    """What is held and may have been meant by each name, which is not; "" where nothing is like it.

    Names are alike that differ in their folder, in case, in how a letter or a separator is written, or in their ending;
    of the first names without such a one, also those that are spelled nearly alike.
    """
    by_name = {_plainly(name): name for name in reversed(held)}
    by_stem = {splitext(key)[0]: name for key, name in by_name.items()}
    few = [*by_name][-SPELLED_AMONG:]
    found: list[str] = []
    for name in names:
        key = _plainly(name)
        near = by_name.get(key) or by_stem.get(splitext(key)[0], "")
        if not near and len(found) < SPELLED_FIRST:
            near = next((by_name[one] for one in difflib.get_close_matches(key, few, 1, 0.8)), "")
        found.append(near)
    return found


def _plainly(name: str) -> str:
    return unicodedata.normalize("NFKC", unquote(name).replace("\\", "/").rpartition("/")[2]).casefold().strip()


def read(path: Path, archive: BinaryIO | None, member: Member) -> bytes:
    """The bytes of a member. Raises ValueError where they are not what the archive's directory promises."""
    if member.offset is None or archive is None:
        return (path / member.name).read_bytes()
    archive.seek(member.offset)
    header = archive.read(30)
    if header[:4] != b"PK\x03\x04":
        raise ValueError(f"{path} is damaged: {member.name} is not where its directory says")
    archive.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), io.SEEK_CUR)
    data = archive.read(member.size)
    if zlib.crc32(data) != member.crc:
        raise ValueError(f"{path} is damaged: {member.name} is not what was packed (its CRC differs)")
    return data


def open_archive(path: Path) -> AbstractContextManager[BinaryIO | None]:
    """What `read` takes beside the path: the archive as a file, None for a folder."""
    return nullcontext() if path.is_dir() else path.open("rb")


def look(data: bytes, decode: bool) -> Picture:
    """What a picture's bytes are, by the reader and the decoder of training."""
    from detr.pixels import (
        decode_pixels,
        read_header,
    )  # here, since a process that loads a version must not meet `detr`

    try:
        header = read_header(data)
    except ValueError as error:
        return Picture(False, problem=str(error))
    problem = header.problem
    if decode and not problem:
        try:
            decode_pixels(data)
        except ValueError as error:
            problem = str(error)
    digest = hashlib.sha256(data).digest()[:16]
    decodes = not problem or not header.whole
    orientation, (width, height) = _orientation(header.exif), header.size
    return Picture(True, width, height, header.format, header.mode, orientation, header.whole, decodes, digest, problem)


def _orientation(exif_data: bytes) -> int:
    """The EXIF orientation, 1 where there is none that can be read."""
    exif = Image.Exif()
    try:
        exif.load(exif_data)
        return int(exif.get(ORIENTATION, 1))
    except Exception:  # Pillow promises no kind of error for broken EXIF
        return 1


def inspect(path: Path, held: Sequence[Member], decode: Sequence[bool]) -> list[Picture]:
    """Every member as `look` sees it, by all cores; those with `decode` are decoded in full."""
    jobs = list(zip(held, decode, strict=True))
    chunks = [jobs[start : start + CHUNK] for start in range(0, len(jobs), CHUNK)]
    seen: list[Picture] = []
    with Progress(None, f"inspect {path.name}", len(jobs), "image") as bar:
        if len(chunks) < 2:
            seen = _inspect_chunk(path, jobs)
            bar.update(len(seen))
        else:
            with ProcessPoolExecutor(os.cpu_count()) as pool:
                for part in pool.map(partial(_inspect_chunk, path), chunks):
                    seen += part
                    bar.update(len(part))
    return seen


def _inspect_chunk(path: Path, jobs: list[tuple[Member, bool]]) -> list[Picture]:
    seen = []
    with open_archive(path) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of odd metadata
        for member, decode in jobs:
            try:
                seen.append(look(read(path, archive, member), decode))
            except ValueError as error:
                seen.append(Picture(False, problem=f"cannot be read: {error}"))
    return seen
