import io
import json
import os
import shutil
import stat
import struct
import zipfile
from pathlib import Path

import pytest

from pipelines.data.archive import check_space, copy, extract, open_checked, pack


def zipped(path, *entries, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as packed:
        for name, data in entries:
            packed.writestr(name, data)
    return path


def named(name):
    return lambda path: zipped(path, ("good.jpg", b"1"), (name, b"2"))


def linked(path):
    link = zipfile.ZipInfo("link.jpg")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    zipped(path, ("good.jpg", b"1"), (link, b"/etc/passwd"))


def piped(path):
    pipe = zipfile.ZipInfo("pipe.jpg")
    pipe.create_system, pipe.external_attr = 3, (stat.S_IFIFO | 0o777) << 16
    zipped(path, (pipe, b""))


def patched(name, offset, form, value):
    """An archive whose central directory says `value` in the entry of `name`."""

    def make(path, method=zipfile.ZIP_STORED):
        data = bytearray(zipped(path, ("good.jpg", b"1" * 100), (name, b"2" * 100), method=method).read_bytes())
        entry = data.rindex(b"PK\x01\x02", 0, data.rindex(name.encode()))
        struct.pack_into(form, data, entry + offset, value)
        path.write_bytes(data)

    return make


def bomb(path):
    zipped(path, ("bomb.json", bytes(2 << 20)), method=zipfile.ZIP_DEFLATED)


def doubled(path):
    zipped(path, ("twice.jpg", b"1"), ("twice.jpg", b"2"))


def unread(path):
    zipped(path, ("a.jpg", b"1"), method=zipfile.ZIP_LZMA)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (named("/evil.jpg"), "'/evil.jpg', a path out of the archive"),
        (named("../../evil.jpg"), "'../../evil.jpg', a path out of the archive"),
        (named("a/../../evil.jpg"), "'a/../../evil.jpg', a path out of the archive"),
        (named("C:/evil.jpg"), "'C:/evil.jpg', a path out of the archive"),
        (named("c:evil.jpg"), "'c:evil.jpg', a path out of the archive"),
        (named("\\evil.jpg"), r"'\\\\evil.jpg', a path out of the archive"),
        (named("..\\evil.jpg"), r"'..\\\\evil.jpg', a path out of the archive"),
        (named("\\\\host\\share\\evil.jpg"), r"'\\\\.*evil.jpg', a path out of the archive"),
        (linked, "'link.jpg', a link or device, no file"),
        (piped, "'pipe.jpg', a link or device, no file"),
        (patched("locked.jpg", 8, "<H", 1), "'locked.jpg', which is encrypted"),
        (bomb, r"'bomb.json', a bomb: \d+ bytes for 2097152"),
        (patched("short.jpg", 24, "<I", 200), "'short.jpg', stored, yet 100 bytes for 200"),
        (patched("over.jpg", 42, "<I", 0), "'good.jpg', which overlaps what stands behind it"),
        (patched("over.jpg", 42, "<I", 50), "'good.jpg', which overlaps what stands behind it"),
        (patched("good.jpg", 42, "<I", 1), "'good.jpg', which overlaps what stands behind it"),
        (doubled, "'twice.jpg', a name that it has 2 times"),
        (unread, "'a.jpg', compressed by method 14, where stored and deflated .* are read"),
    ],
)
def test_an_unsafe_entry_is_named_before_anything_is_unpacked(tmp_path, make, message):
    make(tmp_path / "a.zip")
    expected = f"http://b holds {message}.*; do not trust this file, or pack it anew"
    with pytest.raises(ValueError, match=expected), open_checked(tmp_path / "a.zip", "http://b"):
        pytest.fail("it is open")


def test_harmless_archives_open(tmp_path):
    """Folders, empty files, names with dots, a comment, something in front, JSON that deflates well, nothing at all."""
    path = zipped(tmp_path / "a.zip", ("a/", b""), ("a/..b.jpg", b""), ("a/c..jpg", b"1"), ("d\\e.jpg", b"2"))
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())
    same = [{"id": n, "image_id": n // 7, "bbox": [0, 0, 9, 9], "segmentation": []} for n in range(20_000)]
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as packed:
        packed.comment = b"a comment"
        packed.writestr("instances.json", json.dumps(same, indent=4))
        packed.writestr("black.jpg", bytes(1_000_000))
    with open_checked(path, "a") as archive:
        assert archive.read("a/c..jpg") == b"1"
    with open_checked(zipped(tmp_path / "none.zip"), "none") as archive:
        assert archive.namelist() == []


def test_an_archive_that_is_cut_anywhere_is_not_whole(tmp_path):
    data = zipped(tmp_path / "a.zip", ("a.jpg", b"1" * 50), ("b.jpg", b"2" * 50)).read_bytes()
    for size in range(len(data)):
        (tmp_path / "a.zip").write_bytes(data[:size])
        expected = "http://b is not a whole zip file .*; remove .*/a.zip and fetch it again"
        with pytest.raises(ValueError, match=expected), open_checked(tmp_path / "a.zip", "http://b"):
            pytest.fail("it is open")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_spoilt_member_is_named(tmp_path, method):
    path = zipped(tmp_path / "a.zip", ("a.json", b"0123456789" * 50), method=method)
    data = bytearray(path.read_bytes())
    data[40] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match="a.zip is not a whole zip file"), open_checked(path, "a.zip") as archive:
        extract(archive, "a.json", tmp_path / "a.json")


@pytest.mark.parametrize("size", [50, 150], ids=["more than declared", "less than declared"])
def test_a_member_of_another_size_than_declared_is_refused(tmp_path, size):
    patched("b.json", 24, "<I", size)(tmp_path / "a.zip", zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="b.json"), open_checked(tmp_path / "a.zip", "a.zip") as archive:
        extract(archive, "b.json", tmp_path / "b.json")
    assert (tmp_path / "b.json").stat().st_size <= size


def test_a_member_comes_out_whole(tmp_path):
    data = os.urandom(1000) * 3_000
    with open_checked(zipped(tmp_path / "a.zip", ("in/a", data), method=zipfile.ZIP_DEFLATED), "a") as archive:
        extract(archive, "in/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == data


def test_packing_gives_the_same_stored_bytes_each_time(tmp_path):
    content = {"b.jpg": b"2" * 3_000_000, "a.jpg": b"", "c/d.jpg": b"3"}
    sizes = {name: len(data) for name, data in content.items()}
    for target in ("one.zip", "two.zip"):
        pack(sizes, lambda name: io.BytesIO(content[name]), tmp_path / target)
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as packed:
        assert {name: packed.read(name) for name in packed.namelist()} == content
        assert packed.namelist() == list(content)
        assert {info.compress_type for info in packed.infolist()} == {zipfile.ZIP_STORED}


def test_a_file_that_grows_while_it_is_packed_is_named(tmp_path):
    with pytest.raises(ValueError, match="a.jpg has 2 bytes where 1 are declared"):
        pack({"a.jpg": 1}, lambda name: io.BytesIO(b"12"), tmp_path / "a.zip")


@pytest.mark.parametrize("size", [0, 1, 3_000_001])
def test_a_copy_is_a_file_of_its_own(tmp_path, size):
    data = os.urandom(size)
    (tmp_path / "a").write_bytes(data)
    copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == data
    assert not os.path.samefile(tmp_path / "a", tmp_path / "b")


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="there is no /proc here")
def test_a_copy_from_where_the_system_call_does_not_serve_is_whole(tmp_path):
    copy(Path("/proc/self/cmdline"), tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == Path("/proc/self/cmdline").read_bytes() != b""


def test_the_room_for_all_folders_of_a_file_system_is_counted_together(tmp_path):
    (tmp_path / "a").mkdir()
    free = shutil.disk_usage(tmp_path).free
    half = int(free * 0.6)
    check_space([(tmp_path, half), (tmp_path / "a", 0)])
    with pytest.raises(ValueError, match=r"/a needs [\d.]+[kMGTPE]?B of disk, [\d.]+[kMGTPE]?B are free there; make"):
        check_space([(tmp_path, half), (tmp_path / "a", half)])


def copy_much(folder, target, size):
    (folder / "sparse").touch()
    os.truncate(folder / "sparse", size)
    copy(folder / "sparse", target)


def pack_much(folder, target, size):
    pack({"a.jpg": size}, lambda name: pytest.fail("it is read"), target)


def extract_much(folder, target, size):
    with open_checked(zipped(folder / "a.zip", ("a.json", b"1")), "a") as archive:
        archive.getinfo("a.json").file_size = size
        extract(archive, "a.json", target)


@pytest.mark.parametrize("write", [copy_much, pack_much, extract_much])
def test_nothing_is_written_where_there_is_no_room(tmp_path, write):
    size = shutil.disk_usage(tmp_path).free + (1 << 30)
    with pytest.raises(ValueError, match="of disk"):
        write(tmp_path, tmp_path / "target", size)
    assert not (tmp_path / "target").exists()
