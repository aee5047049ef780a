"""Small images of every kind that files hold, some written byte by byte where Pillow does not write them."""

import io
import struct
import zlib

import numpy as np
import torch
from PIL import Image

from sape2.data import ImageData

ORIENTATION = 0x0112
GREYS = np.arange(256, dtype=np.uint8).reshape(16, 16)


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def deep(kind, white):
    """The greys 0 to 255 at the depth of `kind`."""
    return Image.fromarray((GREYS.astype(np.float64) * (white / 255)).round(6).astype(kind))


def colours(height=16, width=16):
    return np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)


def turned(orientation, height=16, width=16):
    """A photograph that is stored lying on its side, as EXIF says."""
    image = Image.fromarray(colours(height, width))
    image.getexif()[ORIENTATION] = orientation
    return image


def see_through(mode):
    """Grey or colours whose opacity goes from 0 to 255."""
    image = Image.fromarray(colours())
    image.putalpha(Image.fromarray(GREYS))
    return image.convert(mode)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_16_bits(values, extra=b""):
    """(height, width) or (height, width, 2 to 4) of 0..65535: grey, grey and alpha, colour, colour and alpha."""
    height, width, channels = (*values.shape, 1)[:3]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def png_of_few_bits(bits, line, clear):
    """One line of grey values of 1, 2 or 4 bits, of which `clear` is transparent."""
    packed = int("".join(f"{value:0{bits}b}" for value in line).ljust(8 * -(-len(line) * bits // 8), "0"), 2)
    data = b"\0" + packed.to_bytes(-(-len(line) * bits // 8), "big")
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", len(line), 1, bits, 0, 0, 0, 0))
    extra = chunk(b"tRNS", struct.pack(">H", clear))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def planar_tiff(planes, colours, packed=False):
    """A TIFF of channels (channels, height, width), one after the other; `colours` is its tag 262."""
    number, height, width = planes.shape
    parts = [zlib.compress(plane.tobytes()) if packed else plane.tobytes() for plane in planes]
    tags = {256: [width], 257: [height], 258: [8 * planes.itemsize] * number, 259: [8 if packed else 1], 262: [colours]}
    tags |= {273: [0] * number, 277: [number], 278: [height], 279: list(map(len, parts)), 284: [2]}
    tags |= {338: [2]} if number in (2, 4) else {}
    first = 14 + 12 * len(tags)  # byte of what is too long for an entry
    start = first + sum(4 * len(values) for values in tags.values() if len(values) > 1)
    tags[273] = [start + sum(map(len, parts[:place])) for place in range(number)]
    entries = long = b""
    for tag, values in tags.items():
        data = struct.pack(f"<{len(values)}I", *values)
        entries += struct.pack("<HHI", tag, 4, len(values)) + (
            data if len(values) == 1 else struct.pack("<I", first + len(long))
        )
        long += data if len(values) > 1 else b""
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + long + b"".join(parts)


def grey_tiff(width, bits, data, white_is_zero=False, order="<", packing=1, kind=1):
    """One line of grey pixels of that many bits; `packing` and `kind` are its tags 259 and 339."""
    photometric, place = (0 if white_is_zero else 1), 8 + 2 + 12 * 10 + 4
    tags = {256: width, 257: 1, 258: bits, 259: packing, 262: photometric, 273: place, 277: 1, 278: 1, 279: len(data)}
    tags |= {339: kind}
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    return start + entries + struct.pack(f"{order}I", 0) + data


def synthetic(size=23, classes=3, shape=(3, 4, 6)):
    """Random images in memory, of classes in turn."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (size, *shape), generator=generator, dtype=torch.uint8)
    names = ("cat", "dog", "eel")[:classes]
    return ImageData(images, torch.arange(size) % classes, names, (0.5,) * shape[0], (0.2,) * shape[0])
