"""Undamaged pictures give the pixels that torchvision reads; whatever else arrives is pixels too, or a sentence."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torchvision.io import ImageReadMode, decode_image

from detr.pixels import MAX_PARTS, MAX_PIXELS, MAX_SCANS, decode_pixels, read_header
from tests.damage import KINDS, join_chunks, jpeg, png, split_chunks

TRANSPARENCIES = {0: b"\0\1", 2: b"\0\1\0\2\0\3", 3: b"\0\x80"}


def by_torchvision(data):
    """Only of undamaged pictures: of others it dies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    return (image if image.dtype == torch.uint8 else image.int() >> 8).permute(1, 2, 0).numpy()


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def problem_of(data):
    with pytest.raises(ValueError, match=r"^(is|has) ") as error:
        decode_pixels(data)
    return str(error.value)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("bits", "colour"), KINDS)
def test_png_of_every_kind_equals_torchvision(bits, colour, interlaced):
    for width, height in ((1, 1), (1, 9), (9, 1), (3, 2), (33, 17)):
        for transparency in {b"", TRANSPARENCIES.get(colour, b"")}:
            data = png(width, height, bits, colour, interlaced, transparency)
            assert np.array_equal(decode_pixels(data), by_torchvision(data))
            assert read_header(data).size == (width, height)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}, {"quality": 10}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_of_every_kind_equals_torchvision(mode, options):
    for size in ((40, 30), (1, 1), (17, 90)):
        data = jpeg(mode, size, **options)
        assert np.array_equal(decode_pixels(data), by_torchvision(data))
        assert read_header(data)[:3] == ("JPEG", size, mode)


def test_a_large_picture_is_turned_into_rgb_in_parts():
    data = saved(noise(2000, 1500), "JPEG")
    assert np.array_equal(decode_pixels(data), by_torchvision(data))


def test_of_several_pictures_the_first_counts():
    one, other = noise(40, 30), Image.new("RGB", (40, 30))
    for data in (
        saved(one, "PNG", save_all=True, append_images=[other]),
        saved(one, "MPO", save_all=True, append_images=[other], quality=100),
    ):
        assert np.array_equal(decode_pixels(data), by_torchvision(data))


def test_bytes_behind_the_end_and_odd_chunks_do_no_harm():
    data = png(40, 30, 8, 2)
    header, *rest = split_chunks(data)
    odd = [
        (b"zTXt", b"broken"),
        (b"iCCP", b"\0"),
        (b"gAMA", bytes(4)),
        (b"acTL", b""),
        (b"fcTL", bytes(3)),
        (b"eXIf", b"x"),
    ]
    wrong = join_chunks([header, (b"tEXt", b"a\0b")])
    assert np.array_equal(decode_pixels(join_chunks([header, *odd, *rest])), by_torchvision(data))
    wrong = wrong[:-4] + bytes(4) + join_chunks(rest)[8:] + bytes(100)
    assert np.array_equal(decode_pixels(wrong), by_torchvision(data))


def test_rows_that_are_missing_are_found_and_black_ones_are_not_missed():
    width, height, row = 40, 30, bytes(1 + 40 * 3)
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))

    def picture(rows):
        return join_chunks([header, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")])

    assert not decode_pixels(picture(row * height)).any()
    assert not decode_pixels(picture(row * (height + 5))).any()
    assert problem_of(picture(row * 29)) == "is damaged: its pixels are 3509 bytes, expected 3630"
    assert problem_of(picture(row * 29 + row[1:])) == "is damaged: not enough image data"


def test_a_picture_of_more_pixels_than_are_taken_says_how_many():
    def claiming(width, height):
        return join_chunks([(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IEND", b"")])

    assert problem_of(claiming(20_000, 10_000)) == (
        "has 20000 x 10000 pixels, expected at most 50,000,000 in all; make it smaller"
    )
    assert problem_of(claiming(2**31, 2**31)).startswith("has 2147483648 x 2147483648 pixels")
    assert problem_of(claiming(MAX_PIXELS + 1, 1)).startswith("has 50000001 x 1 pixels")
    assert problem_of(claiming(0, 5)) == "is damaged: its header says 0 x 5 pixels"
    assert read_header(claiming(MAX_PIXELS, 1)).size == (MAX_PIXELS, 1)


def test_parts_and_scans_without_end_are_refused():
    header, *rest = split_chunks(png(40, 30, 8, 2))
    assert problem_of(join_chunks([header, *[(b"abCd", b"")] * MAX_PARTS, *rest])) == (
        "has more than 100,000 parts, which would take too long; save it anew"
    )
    data = jpeg("RGB")
    assert problem_of(data[:2] + b"\xff\xe1\0\2" * MAX_PARTS + data[2:]).startswith("has more than 100,000 parts")
    data = jpeg("RGB", progressive=True)
    last = data[data.rfind(b"\xff\xda") : -2]
    assert problem_of(data[:-2] + last * MAX_SCANS + b"\xff\xd9").endswith(" scans, expected at most 100")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        *[(saved(noise(9, 9), kind), f"{a} picture") for kind, a in {
            "GIF": "a GIF", "WEBP": "a WEBP", "BMP": "a BMP", "TIFF": "a TIFF", "AVIF": "an AVIF", "JPEG2000": "a JPEG 2000",
            "ICO": "an ICO", "PPM": "a PNM"}.items()],
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC picture"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"\n<!DOCTYPE html>\n<html>", "a web page"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg">', "an SVG drawing"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS (git lfs pull brings the file itself)"),
    ],
)  # fmt: skip
def test_what_people_have_under_the_name_of_a_picture_is_told(data, kind):
    assert problem_of(data) == f"is {kind}, expected a JPEG or PNG; convert it"


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "is no picture: its 0 bytes begin neither as a JPEG nor as a PNG"),
        (b"a text", "is no picture: its 6 bytes begin neither as a JPEG nor as a PNG"),
        (png(40, 30, 8, 2)[:30], "is damaged: its header is broken or cut short"),
        (jpeg("RGB")[:100], "is damaged: its header is broken or cut short"),
        (png(40, 30, 8, 2)[:-1], "is damaged or cut short: it does not end as a PNG ends"),
        (jpeg("RGB")[:-1], "is damaged or cut short: it does not end as a JPEG ends"),
        (join_chunks(split_chunks(png(40, 30, 8, 3))[:1] + split_chunks(png(40, 30, 8, 3))[2:]), "is damaged: it lacks its palette"),
        (jpeg("RGB").replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "has 3 channels of 12 bits, expected 1, 3 or 4 of 8 bits; convert it"),
        (jpeg("RGB").replace(b"\xff\xdb", b"\xff\xfe"), "is damaged: cannot decode image data"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_picture_is_told(data, problem):
    assert problem_of(data) == problem


def test_no_setting_of_pillow_matters(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    for data in (png(40, 30, 8, 2), jpeg("RGB")):
        assert np.array_equal(decode_pixels(data), by_torchvision(data))
    header, (_, packed), end = split_chunks(png(40, 30, 8, 2))
    assert problem_of(join_chunks([header, (b"IDAT", packed[:500]), end])) == "is damaged: not enough image data"
    assert problem_of(jpeg("RGB")[:900]) == "is damaged or cut short: it does not end as a JPEG ends"
