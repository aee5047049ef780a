"""The single rule that turns an image file into 8-bit pixels. docs/data.md, "How an image is read", explains it to users.

Training, evaluation, explain, explore and detection all come through `read_image` or, with an image of Pillow's, `to_8_bits`.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageFile, ImagePalette, UnidentifiedImageError

# Its version, kept in data.json. Under 2, the transparent colour of PNG with 2, 4 or 3x16 bits was not found; under 1, also, 16
# bits were cut off at 255, orientation and transparency ignored.
RULE = 3
MAX_PIXELS = 89_478_485  # Pillow's limit, at which it warns; here an image above it is refused
MAX_BYTES = 256 * 2**20  # of an encoded image
ORIENTATION, BITS, COLOURS, PLANES, PALETTE = 0x0112, 258, 262, 284, 320  # tags; COLOURS is 0 where zero is white
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation -> what makes the image upright
NO_ALPHA = ("BMP", "DIB", "TGA")  # whose writers often leave an alpha channel of zeros: opaque, as browsers show it
SIDEWAYS = [TURNS[orientation] for orientation in (5, 6, 7, 8)]


class _ReadingWhole:
    """While it is entered, by however many threads, Pillow refuses files that end too early, whatever another program set."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._before: Any = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                ImageFile.LOAD_TRUNCATED_IMAGES = self._before


READING_WHOLE = _ReadingWhole()


@contextmanager
def named(where: str) -> Iterator[None]:
    """Any error of the reading within as a ValueError in one line that begins with `where`."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds for bytes that are no image
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{where} cannot be read as an image: {reason}") from error


def read_image(file: Path | bytes, channels: int, annotated: tuple[int, int] | None = None) -> Image.Image:
    """An encoded image as "RGB" (3 channels) or "L" (1); raises many kinds of errors, to be `named`.

    `annotated` is the (width, height) that annotations speak of: an image stored at that size is left as it is stored.
    """
    if channels not in (1, 3):
        raise ValueError(f"images are read with 1 or 3 channels; the model takes {channels}")
    with opened(file) as image:
        return to_8_bits(image, channels, annotated)


@contextmanager
def opened(file: Path | bytes) -> Iterator[Image.Image]:
    """The image with its header read, to be `named`."""
    with READING_WHOLE, io.BytesIO(file) if isinstance(file, bytes) else file.open("rb") as stream:
        size = stream.seek(0, io.SEEK_END)
        if size > MAX_BYTES:
            raise ValueError(f"{size} bytes are more than {MAX_BYTES}")
        with _header(stream) as image:
            yield image


def _header(stream: IO[bytes]) -> Image.Image:
    """Raises ValueError that says what the bytes are if they are no image, or too large a one."""
    stream.seek(0)
    try:
        image = Image.open(stream)
    except Image.DecompressionBombError as error:
        raise ValueError(f"too many pixels to be read safely ({error}); make it smaller first") from error
    except UnidentifiedImageError as error:
        stream.seek(0)
        raise ValueError(_what_it_is(stream.read(4096))) from error
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} are too many pixels to be read safely; make it smaller first")
    if image.format == "EPS":
        raise ValueError("it is EPS, a program that draws; save it as PNG first")  # Pillow would have Ghostscript run it
    if _is_misread(image):
        raise ValueError(
            "it is a TIFF that stores one channel after the other, and Pillow would give other pixels; save it with the "
            "channels of a pixel together (PlanarConfiguration 1), or as PNG"
        )
    _mend_tiff(image)
    _keep_clear_colour(image, stream)
    return image


def _what_it_is(start: bytes) -> str:
    """In words, for files that are often taken for images."""
    start = start.lstrip().lower()
    if not start:
        return "the file is empty"
    if start.startswith((b"<svg", b"<?xml")) and b"<svg" in start:
        return "it is SVG, which describes shapes; save it as PNG first"
    if start.startswith((b"<!doctype html", b"<html")):
        return "it is a web page, as servers send in place of an image; fetch the image again"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS; git lfs pull fetches the image"
    if start[4:8] == b"ftyp":
        kind = start[8:12].decode("ascii", "replace").strip()
        return f"it is of the kind {kind}, which is not read; save it as JPEG or PNG first"
    return "it is of no kind that Pillow knows"


def to_8_bits(image: Image.Image, channels: int, annotated: tuple[int, int] | None = None) -> Image.Image:
    """An image of Pillow's by the rule: deep pixels to 8 bits, transparency on white, upright, "RGB" or "L".

    Raises ValueError for values that have no known white.
    """
    image.load()
    turn = None if image.size == annotated else _turn(image)
    if _is_deep(image):
        image = _scaled(image)
    elif image.has_transparency_data:
        image = _on_white(image)
    if channels == 3 or image.mode == "LAB":  # Pillow knows its way from LAB to RGB only
        image = image.convert("RGB")
    image = image if channels == 3 else image.convert("L")
    return image if turn is None else image.transpose(turn)


def _keep_clear_colour(image: Image.Image, stream: IO[bytes]) -> None:
    """Gives the one colour of a PNG that is transparent as deep as Pillow reads the pixels, before anything reads them.

    Grey of 2 and 4 bits is spread to 8, so that colour is too. Colours of 16 bits lose their low bytes, in which they may
    differ from it, so these are read as well and the image gets an alpha channel.
    """
    clear, stored = image.info.get("transparency"), image.tile[0].args if getattr(image, "tile", None) else None
    if stored in ("L;2", "L;4") and isinstance(clear, int):
        white = 2 ** int(stored[-1]) - 1
        image.info["transparency"] = (clear & white) * (255 // white)
    elif stored == "RGB;16B" and isinstance(clear, tuple):
        stream.seek(0)
        with Image.open(io.BytesIO(stream.read())) as again:
            again.tile = [again.tile[0]._replace(args="RGB;16L")]  # the other byte of each pair
            low = np.asarray(again)
        del image.info["transparency"]
        values = np.asarray(image).astype(np.uint16) << 8 | low
        image.putalpha(Image.fromarray(np.where((values == clear).all(-1), 0, 255).astype(np.uint8)))


def _is_misread(image: Any) -> bool:
    """True for a TIFF in planes that Pillow decodes as if each were plain: deep, negative or packed ones are not.

    Files that are compressed go through libtiff, which knows them, but for two kinds of colours.
    """
    tags: Any = getattr(image, "tag_v2", {})
    if tags.get(PLANES) != 2:
        return False
    depth = {"1": 1, "I": 32, "F": 32}.get(image.mode, 8)
    plain = {*tags.get(BITS, (1,))} == {depth} and tags.get(COLOURS) in (1, 2, 3, 5)
    return image.mode in ("LA", "LAB") or (image.tile[0].codec_name == "raw" and not plain)


def _mend_tiff(image: Any) -> None:
    """Undoes what Pillow gets wrong of a TIFF, before anything reads the pixels.

    What is packed comes from libtiff in the byte order of this machine; of floats and signed integers with the high byte first
    Pillow swaps it again. A table of colours that has no number above 255 is one of bytes, as libtiff takes it; Pillow makes
    it black.
    """
    if image.format != "TIFF":
        return
    if any(tile.codec_name == "libtiff" for tile in image.tile):
        image.tile = [tile._replace(args=(re.sub(r"(;\d+)B", r"\1N", tile.args[0]), *tile.args[1:])) for tile in image.tile]
    colours = image.tag_v2.get(PALETTE, (256,))
    if image.mode in ("P", "PA") and max(colours) < 256:
        image.palette = ImagePalette.raw("RGB;L", bytes(colours))


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA", "La") or _is_deep(image)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) once it is turned as its EXIF says. Of TIFF, which Pillow turns itself, it already gives that size."""
    sideways = image.format != "TIFF" and _turn(image) in SIDEWAYS
    return (image.width, image.height) if sideways else (image.height, image.width)


def stays_turned(file: Path | bytes, annotated: tuple[int, int]) -> bool:
    """True if EXIF would turn an image that stays as it is stored, since annotations speak of that (width, height)."""
    with opened(file) as image:
        return image.format != "TIFF" and image.size == annotated and _turn(image) is not None


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The rotation that EXIF asks for; None if EXIF is damaged."""
    try:
        value = image.getexif().get(ORIENTATION)
    except Exception:  # Pillow raises many kinds; the pixels are whole
        return None
    return TURNS.get(value) if isinstance(value, int) else None


def _scaled(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits as "L": round(255 x / white). White does not depend on what the image shows."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS, (16,))[0] if image.mode.startswith("I;16") else 16
    white = 1.0 if image.mode == "F" else 2.0**bits - 1
    values = np.asarray(image, dtype=np.float64)
    if not (values.min() >= 0 and values.max() <= white):  # NaN among them
        raise ValueError(
            f"its {'floats' if image.mode == 'F' else 'integers'} go from {values.min():g} to {values.max():g}, but 0 is black "
            f"and {white:g} white; scale them, or save it with 8 or 16 bits"
        )
    shades = (values * (255 / white)).round().astype(np.uint8)
    if tags.get(COLOURS) == 0:
        shades = 255 - shades
    if isinstance(clear := image.info.get("transparency"), int):
        shades[values == clear] = 255
    return Image.fromarray(shades)


def _on_white(image: Image.Image) -> Image.Image:
    if image.format in NO_ALPHA and image.getchannel("A").getextrema() == (0, 0):
        return image.convert("RGB")
    image = image.convert("LA") if image.mode == "La" else image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
