"""Zip archives that nobody has looked at yet, and the room on the disk that files need."""

import os
import shutil
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PureWindowsPath
from typing import IO

from tqdm import tqdm

from pipelines.data.shapes import ZIP_DATE
from pipelines.progress import Progress

MOST_INFLATION = 200  # times; COCO's annotations reach 4, indented JSON of equal boxes 85, deflate at most 1032
SMALL = 1 << 20  # bytes; what inflates to less harms nobody
LOCAL_HEADER = 30  # bytes before the name of a member, the least that stands between two members
BLOCK = 1 << 20


def check_space(needed: Iterable[tuple[Path, int]]) -> None:
    """Raises ValueError if a file system has no room for the bytes that the folders on it are to take."""
    totals: dict[int, tuple[Path, int]] = {}
    for folder, size in needed:
        device = folder.stat().st_dev
        totals[device] = (folder, size + totals.get(device, (folder, 0))[1])
    for folder, size in totals.values():
        free = shutil.disk_usage(folder).free
        if size > free:
            need, have = (tqdm.format_sizeof(number, "B") for number in (size, free))
            raise ValueError(f"{folder} needs {need} of disk, {have} are free there; make room and run again")


def copy(source: Path, target: Path) -> None:
    """Copies a file, by sharing its blocks where the file system can. Raises ValueError when there is no room."""
    size = source.stat().st_size
    check_space([(target.parent, size)])
    with source.open("rb", buffering=0) as reader, target.open("wb") as writer:
        with Progress(None, f"copy {target.name}", size, "B") as bar, suppress(OSError, AttributeError):
            bar.unit_scale = True
            while done := os.copy_file_range(reader.fileno(), writer.fileno(), 64 * BLOCK):
                bar.update(done)
        shutil.copyfileobj(reader, writer, BLOCK)  # what is left: all, where the system has no such call


@contextmanager
def open_checked(path: Path, name: str) -> Iterator[zipfile.ZipFile]:
    """The archive, once all its entries are known to be harmless; messages call it `name`.

    Raises ValueError that names the first entry that is not, and for an archive that is cut or damaged, also
    when that shows within the block.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_entries(archive, name)
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is not a whole zip file ({error}); remove {path} and fetch it again") from error


def _check_entries(archive: zipfile.ZipFile, name: str) -> None:
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    times = Counter(entry.filename for entry in entries if not entry.is_dir())
    ends = [entry.header_offset for entry in entries[1:]] + [archive.start_dir]
    for entry, end in zip(entries, ends, strict=False):
        path = PureWindowsPath(entry.filename)  # knows drives and both kinds of slash
        kind = stat.S_IFMT(entry.external_attr >> 16)
        problem = None
        if path.drive or path.root or ".." in path.parts:
            problem = "a path out of the archive"
        elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            problem = "a link or device, no file"
        elif entry.flag_bits & 1:
            problem = "which is encrypted"
        elif entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            problem = f"compressed by method {entry.compress_type}, where stored and deflated (0 and 8) are read"
        elif entry.compress_type == zipfile.ZIP_STORED and entry.file_size != entry.compress_size:
            problem = f"stored, yet {entry.compress_size} bytes for {entry.file_size}"
        elif entry.file_size > max(SMALL, MOST_INFLATION * entry.compress_size):
            problem = f"a bomb: {entry.compress_size} bytes for {entry.file_size}"
        elif entry.header_offset + LOCAL_HEADER + len(entry.orig_filename) + entry.compress_size > end:
            problem = "which overlaps what stands behind it"
        elif times[entry.filename] > 1:
            problem = f"a name that it has {times[entry.filename]} times"
        if problem:
            raise ValueError(f"{name} holds {entry.filename!r}, {problem}; do not trust this file, or pack it anew")


def extract(archive: zipfile.ZipFile, member: str, target: Path) -> None:
    """Unpacks one member to a file, block by block."""
    entry = archive.getinfo(member)
    check_space([(target.parent, entry.file_size)])
    with archive.open(entry) as reader, target.open("wb") as writer:
        _stream(reader, writer, member, entry.file_size)


def pack(sizes: dict[str, int], read: Callable[[str], IO[bytes]], target: Path) -> None:
    """A zip of stored members in the order of `sizes`, the bytes of each by its name; the same each time."""
    check_space([(target.parent, sum(sizes.values()))])
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as packed:
        for name in Progress(sizes, f"pack {target.name}", len(sizes), "image"):
            entry = zipfile.ZipInfo(name, ZIP_DATE)
            entry.file_size = sizes[name]
            with read(name) as reader, packed.open(entry, "w") as writer:
                _stream(reader, writer, name, sizes[name])


def _stream(reader: IO[bytes], writer: IO[bytes], name: str, size: int) -> None:
    done = 0
    for block in iter(lambda: reader.read(BLOCK), b""):
        writer.write(block)
        done += len(block)
    if done != size:
        raise ValueError(f"{name} has {done} bytes where {size} are declared; fetch it again")
