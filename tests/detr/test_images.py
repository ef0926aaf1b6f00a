import multiprocessing
import os
import pickle
import random
import warnings
import zipfile
from concurrent.futures import ProcessPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detr.images import ImageArchive, ImageFolder, Members, open_images


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_archives_equal_zipfile(tmp_path):
    contents = {f"train2017/{k}.jpg": bytes([k]) * (k * 1000) for k in range(6)} | {"top.jpg": b"abc"}
    path = write_zip(tmp_path / "a.zip", contents)
    archive = ImageArchive(path)
    with zipfile.ZipFile(path) as truth:
        for name in truth.namelist():
            assert archive.read(name) == archive.read(name.rsplit("/", 1)[-1]) == truth.read(name)


def test_archives_with_folders_extra_fields_and_comments(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.mkdir("folder")
        info = zipfile.ZipInfo("folder/ä b.jpg")
        info.extra = b"\xfe\xca\x04\x00abcd"
        archive.writestr(info, b"content")
        archive.comment = b"a comment"
    whole = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "prefixed.zip").write_bytes(b"#!/bin/sh\n" + whole)
    for name in ("a.zip", "prefixed.zip"):
        archive = ImageArchive(tmp_path / name)
        assert archive.read("ä b.jpg") == b"content"
        assert "folder/" not in archive.members


def test_a_full_path_wins_over_a_bare_name(tmp_path):
    archive = ImageArchive(write_zip(tmp_path / "a.zip", {"x/1.jpg": b"nested", "1.jpg": b"top", "y/1.jpg": b"other"}))
    assert [archive.read(name) for name in ("1.jpg", "x/1.jpg", "y/1.jpg")] == [b"top", b"nested", b"other"]


def test_a_compressed_archive_is_refused(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"1.jpg": b"abc"}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"a\.zip: 1\.jpg is compressed; store images: zip -0"):
        ImageArchive(path)


@pytest.mark.parametrize("kept", [0, 1, 100, 3000, -1, -30])
def test_an_archive_cut_short_is_refused(kept, tmp_path):
    whole = write_zip(tmp_path / "whole.zip", {f"{k}.jpg": bytes(1000) for k in range(5)}).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:kept])
    with pytest.raises(ValueError, match=r"cut\.zip is not a whole zip file \(.*\); fetch it again"):
        ImageArchive(tmp_path / "cut.zip")


def test_an_archive_with_a_hole_is_refused(tmp_path):
    whole = write_zip(tmp_path / "whole.zip", {f"{k}.jpg": bytes([k]) * 1000 for k in range(5)}).read_bytes()
    (tmp_path / "hole.zip").write_bytes(whole[:1500] + whole[1700:])
    archive = ImageArchive(tmp_path / "hole.zip")
    assert archive.read("4.jpg") == bytes([4]) * 1000
    with pytest.raises(
        ValueError, match=r"hole\.zip is damaged: 0\.jpg is not where its directory says; fetch it again"
    ):
        archive.read("0.jpg")


def test_an_archive_cut_short_after_it_was_opened_is_refused(tmp_path):
    archive = ImageArchive(write_zip(tmp_path / "a.zip", {f"{k}.jpg": bytes([k]) * 1000 for k in range(5)}))
    archive.read("4.jpg")
    os.truncate(tmp_path / "a.zip", 3000)
    assert archive.read("1.jpg") == bytes([1]) * 1000
    for name in ("2.jpg", "4.jpg"):
        with pytest.raises(ValueError, match=rf"a\.zip is damaged: {name} is not where its directory says"):
            archive.read(name)


def test_an_encrypted_member_is_refused(tmp_path):
    whole = write_zip(tmp_path / "a.zip", {"1.jpg": b"abc", "2.jpg": b"abc"}).read_bytes()
    entry = whole.rindex(b"PK\x01\x02") + 8
    (tmp_path / "a.zip").write_bytes(whole[:entry] + b"\x01" + whole[entry + 1 :])
    with pytest.raises(ValueError, match=r"a\.zip: 2\.jpg is encrypted; store images without a password"):
        ImageArchive(tmp_path / "a.zip")


def test_a_member_that_is_there_twice_is_refused(tmp_path):
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for data in (b"old", b"new"):
            archive.writestr("x/1.jpg", data)
    with pytest.raises(ValueError, match=r"a\.zip: x/1\.jpg is in it twice; pack it anew"):
        ImageArchive(tmp_path / "a.zip")


def test_any_damaged_byte_of_the_directory_is_read_over_or_refused(tmp_path):
    contents = {f"x/{k}.jpg": bytes([k]) * 50 for k in range(3)}
    whole = write_zip(tmp_path / "a.zip", contents).read_bytes()
    messages = []
    for place in range(whole.index(b"PK\x01\x02"), len(whole)):
        for value in {0, 255, whole[place] ^ 1} - {whole[place]}:
            (tmp_path / "a.zip").write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            try:
                archive = ImageArchive(tmp_path / "a.zip")
                for name in set(archive.members) & set(contents):
                    archive.read(name)
            except ValueError as error:
                messages.append(str(error))
    assert len(messages) > 100
    assert all(message.startswith(f"{tmp_path}/a.zip") and "\n" not in message for message in messages)


def test_members_beyond_four_gigabytes(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("train2017/1.jpg", b"first")
        for gigabytes in (5, 19):  # a hole before each, as large as COCO's pictures
            archive.start_dir = gigabytes << 30
            archive.writestr(f"train2017/{gigabytes}.jpg", bytes([gigabytes]) * 3000)
    assert (tmp_path / "a.zip").stat().st_size > 19 << 30
    archive = ImageArchive(tmp_path / "a.zip")
    assert [archive.read(name) for name in ("5.jpg", "1.jpg")] == [b"\5" * 3000, b"first"]
    assert archive.read("19.jpg") == b"\x13" * 3000


def test_more_members_than_a_plain_zip_can_count(tmp_path):
    names = [f"train2017/{k:012}.jpg" for k in range(70_000)]
    archive = ImageArchive(write_zip(tmp_path / "a.zip", {name: name.encode() for name in names}))
    assert len(archive.members) == len(names)
    for name in names[::997]:
        assert archive.read(name.rsplit("/", 1)[-1]) == name.encode()
    assert len(pickle.dumps(archive)) < 50 * len(names)


def test_a_missing_member_is_named(tmp_path):
    archive = ImageArchive(write_zip(tmp_path / "a.zip", {"1.jpg": b"abc"}))
    with pytest.raises(FileNotFoundError, match=r"2\.jpg is not in .*a\.zip"):
        archive.read("2.jpg")


def test_archives_travel_to_spawned_processes(tmp_path):
    archive = ImageArchive(write_zip(tmp_path / "a.zip", {f"{k}.jpg": bytes([k]) * 99 for k in range(4)}))
    archive.read("0.jpg")
    assert pickle.loads(pickle.dumps(archive)).read("3.jpg") == bytes([3]) * 99
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(archive.read, ["2.jpg", "1.jpg"])) == [bytes([2]) * 99, bytes([1]) * 99]


@settings(derandomize=True, database=None)
@given(st.dictionaries(st.text("ab./é", min_size=1, max_size=6), st.integers(0, 2**62), max_size=12), st.text("ab./é"))
def test_members_are_found_by_path_then_by_bare_name(offsets, absent):
    members = Members({path: (offset, 3) for path, offset in offsets.items()})
    assert set(members) == set(offsets)
    assert len(members) == len(offsets)
    for name in {absent, *offsets, *(path.rsplit("/", 1)[-1] for path in offsets)}:
        paths = [name] if name in offsets else sorted(path for path in offsets if path.rpartition("/")[2] == name)
        if (paths and "/" not in name) or name in offsets:
            assert members[name] == (offsets[paths[0]], 3)
        else:
            assert name not in members


def read_all(archive):
    """The members in an order that is this process's own."""
    names = list(archive.members)
    random.Random(os.getpid()).shuffle(names)
    return all(archive.read(name) == name.encode() * 50 for name in names)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_one_archive_at_the_same_time(method, tmp_path):
    names = [f"{k}.jpg" for k in range(2000)]
    archive = ImageArchive(write_zip(tmp_path / "a.zip", {name: name.encode() * 50 for name in names}))
    archive.read("0.jpg")
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context(method)) as pool:
        found = [pool.submit(read_all, archive) for _ in range(6)]
        assert read_all(archive)
        assert all(answer.result() for answer in found)


def test_archives_close_what_they_open(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"1.jpg": b"abc"})
    before = descriptors()
    archives = [ImageArchive(path) for _ in range(5)]
    assert descriptors() == before
    assert [archive.read("1.jpg") for archive in archives * 2] == [b"abc"] * 10
    assert descriptors() == before + 5
    del archives
    assert descriptors() == before


def test_folders_read_as_archives_do(tmp_path):
    contents = {"1.jpg": b"abc", "x/2.jpg": b"def", "x/1.jpg": b"ghi", "z/4.jpg": b"1", "y/4.jpg": b"2"}
    for name, data in contents.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(data)
    folder = open_images(tmp_path / "folder")
    archive = open_images(write_zip(tmp_path / "a.zip", contents))
    assert (type(folder), type(archive)) == (ImageFolder, ImageArchive)
    for name, data in contents.items():
        assert folder.read(name) == archive.read(name) == data
    assert folder.read("2.jpg") == archive.read("2.jpg") == b"def"
    assert folder.read("4.jpg") == archive.read("4.jpg") == b"2"
    for place in (folder, archive):
        with pytest.raises(FileNotFoundError):
            place.read("x")
    with pytest.raises(FileNotFoundError, match=r"^3\.jpg is not in .*folder$"):
        folder.read("3.jpg")


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        open_images(tmp_path / "a.zip")
    assert caught.value.filename == str(tmp_path / "a.zip")
