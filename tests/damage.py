"""Pictures as bytes: PNGs of every kind, and ways to damage a PNG or a JPEG."""

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of PNG's kinds of colour
Chunks = list[tuple[bytes, bytes]]


def join_chunks(chunks: Chunks) -> bytes:
    """A PNG of (kind, content), each with its right checksum."""
    parts = [
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    ]
    return b"".join([b"\x89PNG\r\n\x1a\n", *parts])


def split_chunks(data: bytes) -> Chunks:
    chunks, place = [], 8
    while place < len(data):
        behind = place + 8 + int.from_bytes(data[place : place + 4], "big")
        chunks.append((data[place + 4 : place + 8], data[place + 8 : behind]))
        place = behind + 4
    return chunks


def png(width: int, height: int, bits: int, colour: int, interlaced: bool = False, transparency: bytes = b"") -> bytes:
    """A PNG of noise, with every filter of rows."""
    rng = np.random.default_rng(bits + 16 * colour)
    rows = []
    for x, y, wide, high in PASSES if interlaced else ((0, 0, 1, 1),):
        columns = -(-(width - x) // wide)
        size = -(-columns * bits * CHANNELS[colour] // 8)
        for row in range(-(-(height - y) // high) if columns > 0 else 0):
            rows.append(bytes([row % 5]) + rng.bytes(size))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced))]
    chunks += [(b"PLTE", rng.bytes(3 * 2**bits))] if colour == 3 else []
    chunks += [(b"tRNS", transparency)] if transparency else []
    return join_chunks([*chunks, (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")])


def jpeg(mode: str, size: tuple[int, int] = (40, 30), **options: object) -> bytes:
    """A JPEG of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


KINDS = [(bits, colour) for colour in CHANNELS for bits in (1, 2, 4, 8, 16)]  # (bits, colour) of a PNG
KINDS = [(bits, colour) for bits, colour in KINDS if (bits > 4 or colour in (0, 3)) and (bits, colour) != (16, 3)]
PNGS = [png(*size, *kind, interlaced) for kind in KINDS for size in ((40, 30), (7, 90)) for interlaced in (False, True)]
OPTIONS: list[dict[str, object]] = [{}, {"progressive": True}, {"restart_marker_blocks": 2}]
JPEGS = [jpeg(mode, **options) for mode in ("RGB", "L", "CMYK") for options in OPTIONS]


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 20))):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def break_checksum(data: bytes, rng: random.Random) -> bytes:
    """Of a chunk: that of the header, of the palette or of the pixels."""
    chunks = split_chunks(data)
    before = join_chunks(chunks[: 1 + rng.randrange(len(chunks) - 1)])
    return before[:-1] + bytes([before[-1] ^ 1 << rng.randrange(8)]) + data[len(before) :]


def break_length(data: bytes, rng: random.Random) -> bytes:
    chunks = split_chunks(data)
    place = len(join_chunks(chunks[: rng.randrange(len(chunks))])) + rng.randrange(4)
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def swap_chunks(data: bytes, rng: random.Random) -> bytes:
    chunks = split_chunks(data)
    rng.shuffle(chunks)
    return join_chunks(chunks)


def change_header(data: bytes, rng: random.Random) -> bytes:
    """Other sizes, however large, other colours; with a right checksum."""
    (kind, content), *rest = split_chunks(data)
    return join_chunks([(kind, flip_bits(content, rng)), *rest])


def changing_pixels(change: Callable[[bytes, random.Random], bytes], packed: bool) -> Callable:
    """What changes the rows of a PNG, as they are `packed` or before; with right checksums of chunks."""

    def damage(data: bytes, rng: random.Random) -> bytes:
        chunks = []
        for kind, content in split_chunks(data):
            if kind == b"IDAT":
                content = change(content, rng) if packed else zlib.compress(change(zlib.decompress(content), rng))
            chunks.append((kind, content))
        return join_chunks(chunks)

    return damage


def break_filter(rows: bytes, rng: random.Random) -> bytes:
    return bytes([rng.randrange(5, 256)]) + rows[1:]


def break_last_checksum(packed: bytes, rng: random.Random) -> bytes:
    return packed[:-1] + bytes([packed[-1] ^ 1 << rng.randrange(8)])


def change_marker(data: bytes, rng: random.Random) -> bytes:
    places = [k + 1 for k in range(len(data) - 1) if data[k] == 0xFF and data[k + 1] not in (0, 0xFF)]
    place = rng.choice(places)
    return data[:place] + rng.randbytes(1) + data[place + 1 :]


def insert_marker(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(2, len(data))
    return data[:place] + b"\xff" + rng.randbytes(rng.randrange(1, 9)) + data[place:]


DAMAGES: dict[str, tuple[list[bytes], Callable[[bytes, random.Random], bytes]]] = {
    "checksum of a chunk": (PNGS, break_checksum),
    "checksum of the pixels": (PNGS, changing_pixels(break_last_checksum, packed=True)),
    "filter of a row": (PNGS, changing_pixels(break_filter, packed=False)),
    "too few pixels": (PNGS, changing_pixels(cut, packed=False)),
    "flipped bits of packed pixels": (PNGS, changing_pixels(flip_bits, packed=True)),
    "flipped bits": (PNGS + JPEGS, flip_bits),
    "cut": (PNGS + JPEGS, cut),
    "length of a chunk": (PNGS, break_length),
    "swapped chunks": (PNGS, swap_chunks),
    "changed header": (PNGS, change_header),
    "changed marker": (JPEGS, change_marker),
    "inserted marker": (JPEGS, insert_marker),
}


def damaged_pictures(seed: int, each: int) -> Iterator[tuple[str, bytes]]:
    """(kind of damage, bytes), `each` of every kind."""
    for kind, (pictures, damage) in DAMAGES.items():
        rng = random.Random(f"{seed}/{kind}")
        for _ in range(each):
            yield kind, damage(rng.choice(pictures), rng)
