"""The pixels of JPEG and PNG pictures, for all that look at one: the gate, training, serving, predict. h w its size.

Pillow decodes, by its decoders of pixels alone: what a file says besides (texts, profiles, more frames) is passed over
unread, so that it can neither take memory nor matter, and no setting that a program makes in Pillow changes a result.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

MAX_PIXELS = 50_000_000  # of a picture; a small file can claim any number, and decoding takes up to 10 bytes for each
MAX_SCANS = 100  # of a JPEG; cameras and encoders make 1 to 14, and every one can take as long as a picture
MAX_PARTS = 100_000  # chunks of a PNG, segments of a JPEG
STRIP_BYTES, PIECE_BYTES = 2**22, 2**14  # of pixels that are turned into RGB, of a stream that is unpacked, at a time
JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd7\xff])")  # of a JPEG, but for those that stand alone among the pixels
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15, with size and channels
START, END, SCAN, APP1 = 0xD8, 0xD9, 0xDA, 0xE1
CHANNELS = {1: "L", 3: "RGB", 4: "CMYK"}
MODES = {  # of a PNG by (bits, colour): Pillow's mode, its name for how the pixels lie in the file, channels
    **{(1, 0): ("1", "1", 1), (2, 0): ("L", "L;2", 1), (4, 0): ("L", "L;4", 1), (8, 0): ("L", "L", 1)},
    **{(1, 3): ("P", "P;1", 1), (2, 3): ("P", "P;2", 1), (4, 3): ("P", "P;4", 1), (8, 3): ("P", "P", 1)},
    **{(8, 2): ("RGB", "RGB", 3), (8, 4): ("LA", "LA", 2), (8, 6): ("RGBA", "RGBA", 4)},
    **{(16, 0): ("I;16", "I;16B", 1), (16, 2): ("RGB", "RGB;16B", 3)},
    **{(16, 4): ("RGBA", "LA;16B", 2), (16, 6): ("RGBA", "RGBA;16B", 4)},
}
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))  # of Adam7
OTHERS = {  # what else people have under the name of a picture, by how it begins
    rb"GIF8": "a GIF picture",
    rb"RIFF.{4}WEBP": "a WEBP picture",
    rb"BM.{4}\0\0\0\0": "a BMP picture",
    rb"II\*\0|MM\0\*|II\+\0|MM\0\+": "a TIFF picture",
    rb".{4}ftypavi[fs]": "an AVIF picture",
    rb".{4}ftyp(hei|hev|mif|msf)": "a HEIC picture",
    rb"\xff\x0a|\0\0\0\x0cJXL ": "a JPEG XL picture",
    rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  ": "a JPEG 2000 picture",
    rb"8BPS": "a PSD picture",
    rb"\0\0[\1\2]\0": "an ICO picture",
    rb"P[1-7]\s": "a PNM picture",
    rb"\x76\x2f\x31\x01": "an EXR picture",
    rb".{128}DICM": "a DICOM picture",
    rb"%PDF": "a PDF document",
    rb"\s*(<\?xml[^>]*>\s*)?<svg": "an SVG drawing",
    rb"(?i)\s*<(!doctype html|html|head)": "a web page",
    rb"version https://git-lfs": "a pointer of Git LFS (git lfs pull brings the file itself)",
    rb"PK\x03\x04": "a zip file",
}
T = TypeVar("T")


class Header(NamedTuple):
    """What a picture's file says of itself."""

    format: str  # JPEG or PNG
    size: tuple[int, int]  # width, height
    mode: str  # Pillow's, of the pixels as they are stored: RGB, L, CMYK, ...
    exif: bytes
    whole: bool  # ends as its format ends
    problem: str = ""  # why the pixels cannot be had, as far as that shows without decoding


def read_header(data: bytes) -> Header:
    """The header of a JPEG or PNG. Raises ValueError with the predicate of a sentence ("is a ...") for all else."""
    return _read(data)[0]


def decode_pixels(data: bytes) -> np.ndarray:
    """The RGB pixels [h, w, 3] uint8 of a JPEG or PNG. Raises ValueError with the predicate of a sentence.

    Grey counts three times, 16 bits by their upper 8; transparency is left out, and the colour below it shows; print
    colours become RGB by Pillow's rule. No EXIF turn, no gamma, no profile. Of an animation the still picture counts.
    """
    header, decode = _read(data)
    if header.problem:
        raise ValueError(header.problem)
    try:
        return _to_rgb(decode())
    except (ValueError, zlib.error) as error:
        raise ValueError(f"is damaged: {error}") from error


def _read(data: bytes) -> tuple[Header, Callable[[], Image.Image]]:
    """The header of a picture, and what decodes it."""
    if data.startswith(JPEG):
        return _read_jpeg(data)
    if data.startswith(PNG):
        return _read_png(data)
    for start, kind in OTHERS.items():
        if re.match(start, data[:1000], re.DOTALL):
            raise ValueError(f"is {kind}, expected a JPEG or PNG; convert it")
    raise ValueError(f"is no picture: its {len(data)} bytes begin neither as a JPEG nor as a PNG")


def _expect_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"has {width} x {height} pixels, expected at most {MAX_PIXELS:,} in all; make it smaller")
    if not width * height:
        raise ValueError(f"is damaged: its header says {width} x {height} pixels")


def _expect_few(parts: Iterable[T]) -> Iterator[T]:
    for count, part in enumerate(parts):
        if count == MAX_PARTS:
            raise ValueError(f"has more than {MAX_PARTS:,} parts, which would take too long; save it anew")
        yield part


def _read_jpeg(data: bytes) -> tuple[Header, Callable[[], Image.Image]]:
    """As `_read`. It finds the very frame that libjpeg finds, since Pillow's decoder trusts in the width."""
    frame, exif, start = b"", b"", 0
    for marker, place, content in _expect_few(_jpeg_segments(data)):
        if marker in FRAMES and not frame:
            frame = content
        elif marker in FRAMES or marker == START:
            break
        elif marker == APP1 and content.startswith(b"Exif\0\0"):
            exif = exif or content
        elif marker == SCAN:
            start = place
            break
    if not start or len(frame) < 6:
        raise ValueError("is damaged: its header is broken or cut short")
    bits, height, width, channels = struct.unpack(">BHHB", frame[:6])
    _expect_size(width, height)
    if bits != 8 or channels not in CHANNELS:
        raise ValueError(f"has {channels} channels of {bits} bits, expected 1, 3 or 4 of 8 bits; convert it")
    whole = data.rfind(b"\xff\xd9") >= start
    problem = "" if whole else "is damaged or cut short: it does not end as a JPEG ends"
    decode = partial(_decode_jpeg, data, CHANNELS[channels], (width, height), start)
    return Header("JPEG", (width, height), CHANNELS[channels], exif, whole, problem), decode


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(marker, where its content begins, content) of each segment before the end of the picture."""
    place = 2
    while (found := MARKER.search(data, place)) and found[1][0] != END:
        begin = found.end() + 2
        length = int.from_bytes(data[found.end() : begin], "big")
        place = begin + max(length - 2, 0)
        yield found[1][0], begin, data[begin:place]


def _decode_jpeg(data: bytes, mode: str, size: tuple[int, int], start: int) -> Image.Image:
    if data.count(bytes((0xFF, SCAN)), start) >= MAX_SCANS:  # what is no scan has the same bytes at times
        scans = sum(marker == SCAN for marker, _, _ in _jpeg_segments(data))
        if scans > MAX_SCANS:
            raise ValueError(f"it has {scans} scans, expected at most {MAX_SCANS}")
    return Image.frombytes(mode, size, data, "jpeg", "CMYK;I" if mode == "CMYK" else mode, "")


def _read_png(data: bytes) -> tuple[Header, Callable[[], Image.Image]]:
    """As `_read`. Chunks that say nothing of the pixels are passed over, their checksums too."""
    chunks = _expect_few(_png_chunks(data))
    kind, content, intact = next(chunks, (b"", b"", False))
    if kind != b"IHDR" or len(content) != 13 or not intact:
        raise ValueError("is damaged: its header is broken or cut short")
    width, height, bits, colour, packing, filters, interlace = struct.unpack(">IIBBBBB", content)
    _expect_size(width, height)
    if (bits, colour) not in MODES or packing or filters or interlace > 1:
        raise ValueError(f"is damaged: its header is not that of a PNG ({content[8:].hex(' ')})")
    packed, palette, exif, problem = bytearray(), b"", b"", ""
    for kind, content, intact in chunks:
        if kind[:1].isupper() and not intact:
            problem = problem or f"is damaged: the checksum of its chunk {kind.decode('latin-1')} is wrong"
        if kind == b"IDAT":
            packed += content
        elif kind == b"PLTE":
            palette = palette or bytes(content)
        elif kind == b"eXIf":
            exif = exif or bytes(content)
    whole = kind == b"IEND"
    if not whole:
        problem = "is damaged or cut short: it does not end as a PNG ends"
    mode = MODES[bits, colour][0]
    decode = partial(_decode_png, packed, (width, height), bits, colour, interlace, palette)
    return Header("PNG", (width, height), mode, exif, whole, problem), decode


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview, bool]]:
    """(kind, content, whether its checksum is right) of each whole chunk up to IEND."""
    view, place, kind = memoryview(data), len(PNG), b""
    while kind != b"IEND" and place + 12 <= len(data):
        behind = place + 8 + int.from_bytes(view[place : place + 4], "big")
        if behind + 4 > len(data):
            break
        kind = bytes(view[place + 4 : place + 8])
        intact = zlib.crc32(view[place + 4 : behind]) == int.from_bytes(view[behind : behind + 4], "big")
        yield kind, view[place + 8 : behind], intact
        place = behind + 4


def _decode_png(
    packed: bytearray, size: tuple[int, int], bits: int, colour: int, interlace: int, palette: bytes
) -> Image.Image:
    mode, raw, channels = MODES[bits, colour]
    if mode == "P" and not palette:
        raise ValueError("it lacks its palette")
    image = Image.frombytes(mode, size, packed, "zip", raw, interlace)
    if interlace or not np.asarray(_copy_rows(image, size[1] - 1, 1)).any():
        _expect_all_rows(packed, size, bits * channels, interlace)
    if mode == "P":
        image.putpalette(palette[:768].ljust(768, b"\0"))
    return image


def _expect_all_rows(packed: bytearray, size: tuple[int, int], bits: int, interlace: int) -> None:
    """Raises ValueError where pixels are missing: where a stream ends behind a row, Pillow leaves the rest black."""
    width, height = size
    passes = PASSES if interlace else ((0, 0, 1, 1),)
    sizes = [(-(-(width - x) // wide), -(-(height - y) // high)) for x, y, wide, high in passes]
    expected = sum(h * (1 + -(-w * bits // 8)) for w, h in sizes if w > 0 and h > 0)
    unpacker, found = zlib.decompressobj(), 0
    for place in range(0, len(packed), PIECE_BYTES):
        if found >= expected or unpacker.eof:
            break
        found += len(unpacker.decompress(packed[place : place + PIECE_BYTES]))
    if found < expected:
        raise ValueError(f"its pixels are {found} bytes, expected {expected}")


def _to_rgb(image: Image.Image) -> np.ndarray:
    """The pixels [h, w, 3] of an image, which is turned into RGB a few rows at a time to save memory."""
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, min(height, STRIP_BYTES // (4 * width)))
    palette = np.array(image.getpalette() or [], np.uint8).reshape(-1, 3)
    for top in range(0, height, rows):
        part = pixels[top : top + rows]
        strip = _copy_rows(image, top, len(part))
        if image.mode == "I;16":
            part[:] = (np.asarray(strip) >> 8)[..., None]
        elif image.mode == "P":
            part[:] = palette[np.asarray(strip)]
        elif image.mode in ("1", "L", "LA"):
            part[:] = np.asarray(strip.convert("L"))[..., None]
        else:
            part[:] = np.asarray(strip.convert("RGB"))
    return pixels


def _copy_rows(image: Image.Image, top: int, rows: int) -> Image.Image:
    """As Image.crop, which would refuse sizes by Image.MAX_IMAGE_PIXELS."""
    copied = Image.new(image.mode, (image.width, rows))
    copied.paste(image, (0, -top))
    return copied
