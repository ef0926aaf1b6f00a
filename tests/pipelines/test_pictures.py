import ast
import io
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from pipelines.data import pictures
from pipelines.data.pictures import Picture, find, inspect, list_members, look, read
from tests.running import ROOT


def picture(seed=0, kind="JPEG", size=(40, 30), **extra):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **extra)
    return file.getvalue()


def archive(path, files, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as zipped:
        for name, data in files.items():
            zipped.writestr(name, data)
    return path


def test_no_members_no_pictures(tmp_path):
    path = archive(tmp_path / "a.zip", {})
    assert list_members(path) == []
    assert inspect(path, [], []) == []
    (tmp_path / "folder").mkdir()
    assert list_members(tmp_path / "folder") == []


def test_members_of_archive_and_folder_are_read_alike(tmp_path):
    files = {"x/1.jpg": picture(1), "2.png": picture(2, "PNG"), "ä.jpg": picture(3)}
    path = archive(tmp_path / "a.zip", files)
    with zipfile.ZipFile(path) as zipped:
        zipped.extractall(tmp_path / "folder")
    for place in (path, tmp_path / "folder"):
        held = list_members(place)
        assert {m.name for m in held} == set(files)
        with path.open("rb") as file:
            stream = file if place is path else None
            assert {m.name: read(place, stream, m) for m in held} == files
        assert [p.digest for p in inspect(place, held, [True] * 3)] == [look(files[m.name], True).digest for m in held]


def test_a_full_path_wins_over_a_bare_name(tmp_path):
    held = list_members(archive(tmp_path / "a.zip", {"x/1.jpg": b"1", "1.jpg": b"2", "y/2.jpg": b"3", "z/2.jpg": b"4"}))
    found = find(["1.jpg", "x/1.jpg", "2.jpg", "3.jpg"], held)
    assert [[m.name for m in one] for one in found] == [["1.jpg"], ["x/1.jpg"], ["y/2.jpg", "z/2.jpg"], []]


def test_a_member_that_is_not_where_its_directory_says_does_not_open(tmp_path):
    path = archive(tmp_path / "a.zip", {"1.jpg": picture(1), "2.jpg": picture(2)})
    first, second = list_members(path)
    path.write_bytes(path.read_bytes().replace(b"PK\x03\x04", b"PK\x00\x00", 1))
    assert [p.opens for p in inspect(path, [first, second], [False] * 2)] == [False, True]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_what_is_seen_of_a_picture(kind):
    seen = look(picture(kind=kind), True)
    assert seen == Picture(True, 40, 30, kind, "RGB", 1, True, True, seen.digest)
    assert len(seen.digest) == 16


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9, -1])
def test_every_cut_is_seen_without_decoding(kind, kept):
    data = picture(kind=kind, size=(200, 200))
    cut = data[: int(kept * len(data)) if kept > 0 else kept] if kind == "JPEG" or kept > 0 else data[:-9]
    assert not look(cut, False).whole


PEAK = """
def print_peak(*values):
    status = open("/proc/self/status", encoding="utf-8").read()
    print(int(status.partition("VmHWM:")[2].split()[0]) // 1024, *values)  # kB
"""
DAMAGED = f"""{PEAK}
import sys
from detr.pixels import decode_pixels
from pipelines.data.pictures import look
from tests.damage import DAMAGES, damaged_pictures
held = dict.fromkeys(DAMAGES, 0)
for number, (kind, data) in enumerate(damaged_pictures(seed=int(sys.argv[1]), each=45)):
    print(number, kind, data.hex(), file=sys.stderr)
    try:
        problem = "" if decode_pixels(data).dtype == "uint8" else "other pixels"
        held[kind] += 1
    except ValueError as error:
        problem = str(error)
    seen = look(data, True)
    assert seen.problem == problem
    assert (seen.opens and seen.whole and seen.decodes) == (not problem)
    assert problem.startswith(("is ", "has ")) or not problem
print_peak(number + 1, held)
"""
BOMBS = f"""{PEAK}
import struct, zlib
from detr.pixels import decode_pixels
from tests.damage import join_chunks, png, split_chunks
header, *rest = split_chunks(png(40, 30, 8, 2))
packer = zlib.compressobj()
much = b"".join(packer.compress(bytes(2**20)) for _ in range(200)) + packer.flush()
wide = (b"IHDR", struct.pack(">IIBBBBB", 2000, 2000, 1, 0, 0, 0, 1))
text = b"a" + bytes(2) + much
for chunks in (
    [header, *[(b"zTXt", text)] * 20, *rest],
    [header, (b"iCCP", text), *rest],
    [header, *[(b"IDAT", b"")] * 90_000, *rest],
    [header, rest[0], (b"IDAT", much), rest[-1]],
    [wide, (b"IDAT", much), rest[-1]],
):
    decode_pixels(join_chunks(chunks))
print_peak()
"""


def run_apart(code, *arguments):
    """What a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, f"ended with {done.returncode} at {done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("seed", ["0", "1"])
def test_no_damaged_picture_ends_a_process_and_what_the_gate_passes_training_decodes(seed):
    mebibytes, number, held = run_apart(DAMAGED, seed).split(maxsplit=2)
    assert int(number) == 540
    assert int(mebibytes) < 400
    held = ast.literal_eval(held)
    never = ("checksum of a chunk", "checksum of the pixels", "filter of a row", "too few pixels", "cut")
    assert not any(held[kind] for kind in never)
    assert held["inserted marker"] > 0


def test_small_files_that_claim_much_take_little_memory():
    assert int(run_apart(BOMBS)) < 100


def test_bytes_behind_the_end_do_no_harm():
    assert look(picture() + bytes(5000), True).whole


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert look(picture(exif=exif), False).orientation == orientation


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "is no picture: its 0 bytes begin neither as a JPEG nor as a PNG"),
        (b"x", "is no picture: its 1 bytes begin neither as a JPEG nor as a PNG"),
        (b"\xff\xd8\xff", "is damaged: its header is broken or cut short"),
        (picture(kind="GIF"), "is a GIF picture, expected a JPEG or PNG; convert it"),
    ],
)
def test_what_does_not_open_says_why(data, problem):
    assert look(data, True) == Picture(False, problem=problem)


def test_more_pictures_behind_the_first_are_a_jpeg(tmp_path):
    file = io.BytesIO()
    Image.open(io.BytesIO(picture())).save(
        file, "MPO", save_all=True, append_images=[Image.open(io.BytesIO(picture(1)))]
    )
    seen = look(file.getvalue(), True)
    assert (seen.format, seen.whole, seen.decodes) == ("JPEG", True, True)


def test_many_are_inspected_by_several_processes_in_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "CHUNK", 3)
    path = archive(tmp_path / "a.zip", {f"{k}.jpg": picture(k, size=(20 + k, 20)) for k in range(10)})
    assert [p.width for p in inspect(path, list_members(path), [k % 2 == 0 for k in range(10)])] == list(range(20, 30))
