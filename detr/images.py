"""Pictures by name, as bytes: the stored members of a zip archive, or the files of a folder."""

import os
import struct
import sys
import weakref
import zipfile
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np

HEADER_BYTES = 4096  # read ahead with a member, for its name and more before it


class Members(Mapping[str, tuple[int, int]]):
    """(offset of the header, size) of each file of an archive by its path or its bare name, in flat arrays.

    Forked workers share them, where they would copy a dict, object by object, in counting references. A bare name that
    several folders hold is that of the first folder in order, of none before all.
    """

    def __init__(self, places: Mapping[str, tuple[int, int]]) -> None:
        paths = sorted(places, key=_sort_key)
        self.paths = np.array([_sort_key(path) for path in paths], dtype=np.bytes_)
        self.places = np.array([places[path] for path in paths], dtype=np.int64).reshape(-1, 2)

    def __getitem__(self, name: str) -> tuple[int, int]:
        key = _sort_key(name)
        index = bisect_left(self.paths, key)
        found = self.paths[index] if index < len(self.paths) else b""
        if found != key and ("/" in name or not found.startswith(key)):
            raise KeyError(name)
        offset, size = self.places[index].tolist()
        return offset, size

    def __iter__(self) -> Iterator[str]:
        for key in self.paths:
            name, _, folder = key.decode().partition("/")
            yield folder + name

    def __len__(self) -> int:
        return len(self.paths)


def _sort_key(path: str) -> bytes:
    """`name/folder/` of `folder/name`: in order, a bare name stands right before its paths."""
    cut = path.rfind("/") + 1
    return f"{path[cut:]}/{path[:cut]}".encode()


class ImageArchive:
    """The files of a zip of stored members, each read at its offset.

    A member is found by its path in the zip or by its bare name, as COCO's `train2017/000000000009.jpg` is
    listed as `000000000009.jpg`. Safe with forked and spawned workers. Raises ValueError for compressed, encrypted
    or repeated members and for an archive that is cut short.

    Not through a memory map, as is the habit: that fetches what is not in memory page by page, and what stays mapped
    counts as the worker's memory (benchmarks/input_pipeline.py).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        places: dict[str, tuple[int, int]] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    if info.filename.endswith("/"):
                        continue
                    if info.compress_type != zipfile.ZIP_STORED:
                        raise ValueError(f"{path}: {info.filename} is compressed; store images: zip -0")
                    if info.flag_bits & 1:
                        raise ValueError(f"{path}: {info.filename} is encrypted; store images without a password")
                    if info.filename in places:
                        raise ValueError(f"{path}: {info.filename} is in it twice; pack it anew")
                    places[info.filename] = info.header_offset, info.file_size
            self.members = Members(places)
        except (zipfile.BadZipFile, NotImplementedError, OverflowError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a whole zip file ({error}); fetch it again") from error
        self._descriptor: int | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_descriptor": None}

    def read(self, name: str) -> bytes:
        """The bytes of one member; FileNotFoundError names it when it is missing."""
        if (place := self.members.get(name)) is None:
            raise FileNotFoundError(f"{name} is not in {self.path}")
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._descriptor)
        offset, size = place
        if offset >= 0:
            if sys.platform == "linux":
                os.posix_fadvise(self._descriptor, offset, size + HEADER_BYTES, os.POSIX_FADV_WILLNEED)
            header = os.pread(self._descriptor, 30, offset)
            if len(header) == 30 and header[:4] == b"PK\x03\x04":
                data = os.pread(self._descriptor, size, offset + 30 + sum(struct.unpack_from("<HH", header, 26)))
                if len(data) == size:
                    return data
        raise ValueError(f"{self.path} is damaged: {name} is not where its directory says; fetch it again")


class ImageFolder:
    """The files of a folder, each found by its path in there or, as in an archive, by its bare name."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def by_name(self) -> dict[str, Path]:
        return {file.name: file for file in sorted(self.path.rglob("*"), reverse=True) if file.is_file()}

    def read(self, name: str) -> bytes:
        """The bytes of one file; FileNotFoundError names it when it is missing."""
        try:
            return (self.path / name).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            if name in self.by_name:
                return self.by_name[name].read_bytes()
            raise FileNotFoundError(f"{name} is not in {self.path}") from None


def open_images(path: Path) -> ImageArchive | ImageFolder:
    """The pictures of a folder or of a zip archive."""
    return ImageFolder(path) if path.is_dir() else ImageArchive(path)
