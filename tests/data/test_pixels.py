"""The rule by which files become pixels: exact values of every kind, one reader for all commands, runs of another rule."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
import write_layouts
from image_cases import (
    GREYS,
    chunk,
    colours,
    deep,
    grey_tiff,
    planar_tiff,
    png_of_16_bits,
    png_of_few_bits,
    saved,
    see_through,
    turned,
)
from layout_cases import CLASSES, load, write_parquet
from PIL import Image, ImageFile, ImageOps

from sape2.config import ModelConfig
from sape2.config.recipes import get_recipe
from sape2.data import decode, normalize
from sape2.data.decoding import random_box
from sape2.data.picture import read_picture, take_picture
from sape2.data.pixels import READING_WHOLE, RULE, is_grey, named, opened, read_image, to_8_bits, upright_size
from sape2.runs.run import Run

MODEL = ModelConfig(image_size=(16, 16), patch_size=4, num_classes=3)


def read(file, channels=3, annotated=None):
    with named("here"):
        return np.asarray(read_image(file, channels, annotated))


def refused(file, channels=3):
    with pytest.raises(ValueError, match=r"^here ") as error:
        read(file, channels)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- depth -----------------------------------------------------------------------------------------------------------

DEEP = {
    "16 bits": saved(deep(np.uint16, 65535)),
    "16 bits, TIFF": saved(deep(np.uint16, 65535), "TIFF"),
    "16 bits, high byte first": saved(Image.fromarray((GREYS * np.uint16(257)).astype(">u2")), "TIFF"),
    "16 bits, JPEG 2000": saved(deep(np.uint16, 65535), "JPEG2000"),
    "16 bits, PGM": b"P5 16 16 65535\n" + (GREYS * np.uint16(257)).astype(">u2").tobytes(),
    "32 bits": saved(deep(np.int32, 65535), "TIFF"),
    "floats": saved(deep(np.float32, 1), "TIFF"),
    "8 bits": saved(Image.fromarray(GREYS)),
}


@pytest.mark.parametrize("name", DEEP)
def test_every_depth_gives_the_same_greys_exactly(name):
    assert np.array_equal(read(DEEP[name], 1), GREYS)
    assert np.array_equal(read(DEEP[name]), np.stack([GREYS] * 3, -1))


def test_values_between_are_rounded():
    values = np.array([[0, 128, 129, 385, 386, 65406, 65407, 65535]], dtype=np.uint16)
    assert read(saved(Image.fromarray(values)), 1).tolist() == [[0, 0, 1, 1, 2, 254, 255, 255]]


@pytest.mark.parametrize("file", [deep(np.uint16, 200), deep(np.int32, 200)], ids=["16 bits", "32 bits"])
def test_a_dark_image_stays_dark(file):
    assert read(saved(file, "TIFF")).max() == 1


def test_12_bits_have_a_white_of_their_own():
    assert read(grey_tiff(2, 12, b"\xff\xf8\x00"), 1).tolist() == [[255, 128]]


@pytest.mark.parametrize("bits", [8, 16])
def test_a_file_whose_zero_is_white_is_read_so(bits):
    data = struct.pack("<HH", 0, 65535) if bits == 16 else b"\x00\xff"
    assert read(grey_tiff(2, bits, data, white_is_zero=True), 1).tolist() == [[255, 0]]


def test_colours_of_16_bits_give_their_high_byte():
    values = np.stack([GREYS, GREYS.T, 255 - GREYS], -1)
    assert np.array_equal(read(png_of_16_bits(values * np.uint16(257))), values)
    assert np.array_equal(read(png_of_16_bits(values * np.uint16(256) + np.uint16(255))), values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 200.0]], np.float32), "floats go from 0 to 200,"),
        (np.array([[-0.1, 1]], np.float32), "floats go from -0.1 to 1"),
        (np.array([[np.nan, 1]], np.float32), "floats go from nan to nan"),
        (np.array([[0, np.inf]], np.float32), "floats go from 0 to inf"),
        (np.array([[-1, 3]], np.int32), "integers go from -1 to 3,"),
        (np.array([[0, 65536]], np.int32), "integers go from 0 to 65536"),
    ],
)
def test_values_without_a_known_white_are_refused(values, message):
    assert message in refused(saved(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("kind", "values"), [("f4", [0, 1, 0.5]), ("i2", [0, 127, 32767])], ids=["floats", "signed integers"])
def test_packed_numbers_are_in_the_order_of_their_file(kind, values, packed, order):
    numbers = np.array(values, dtype=order + kind)
    data = zlib.compress(numbers.tobytes()) if packed else numbers.tobytes()
    file = grey_tiff(3, 8 * numbers.itemsize, data, order=order, packing=8 if packed else 1, kind=3 if kind == "f4" else 2)
    assert read(file, 1).tolist() == [[0, 255, 128] if kind == "f4" else [0, 0, 127]]


@pytest.mark.parametrize("bits", [8, 16])
def test_a_table_of_colours_may_have_8_bits(bits):
    image = Image.fromarray(GREYS).convert("P")
    table = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    image.putpalette(table.tobytes())
    file = saved(image, "TIFF")
    long, short = ((table.T.astype("<u2") * factor).tobytes() for factor in (256, 1))
    assert file.count(long) == 1
    assert np.array_equal(read(file.replace(long, short) if bits == 8 else file), table[np.asarray(image)])


PLANES = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5) * 4


@pytest.mark.parametrize("packed", [False, True])
def test_channels_one_after_the_other_are_the_same_pixels(packed):
    assert (read(planar_tiff(PLANES, 2, packed)) == PLANES.transpose(1, 2, 0)).all()
    assert (read(planar_tiff(PLANES[:1], 1, packed), 1) == PLANES[0]).all()
    if packed:
        assert (read(planar_tiff(PLANES.astype(np.uint16) * 257, 2, packed)) == PLANES.transpose(1, 2, 0)).all()
        assert (read(planar_tiff(255 - PLANES[:1], 0, packed), 1) == PLANES[0]).all()


@pytest.mark.parametrize(
    "file",
    [
        planar_tiff(PLANES.astype(np.uint16) * 257, 2),
        planar_tiff(PLANES[:1].astype(np.uint16) * 257, 1),
        planar_tiff(255 - PLANES[:1], 0),
        planar_tiff(PLANES, 8),
        planar_tiff(PLANES, 8, packed=True),
        planar_tiff(PLANES[:2], 1, packed=True),
    ],
    ids=["16 bits", "16 bits grey", "zero is white", "LAB", "packed LAB", "packed grey with alpha"],
)
def test_channels_one_after_the_other_that_pillow_misreads_are_refused(file):
    assert "PlanarConfiguration 1" in refused(file)


# --- transparency ----------------------------------------------------------------------------------------------------


def on_white(values, alpha):
    values, alpha = np.asarray(values, dtype=np.float64), np.asarray(alpha, dtype=np.float64)
    return (values * alpha + 255 * (255 - alpha)) / 255


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_what_shows_through_is_white(mode, kind):
    image = see_through(mode)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    values = np.asarray(image.convert("RGBA"))
    found = read(saved(image, kind, **options))
    assert np.abs(found - on_white(values[..., :3], values[..., 3:])).max() <= 0.51
    assert (found[0, 0] == 255).all()
    assert (found[-1, -1] == values[-1, -1, :3]).all()


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_colours_multiplied_with_their_opacity_are_undone_first(mode):
    image = see_through("LA" if mode == "La" else "RGBA")
    values = np.asarray(to_8_bits(image, 3), dtype=int)
    assert np.abs(np.asarray(to_8_bits(image.convert(mode), 3), dtype=int) - values).max() <= 1


def test_an_opaque_alpha_changes_nothing():
    image = Image.fromarray(colours())
    opaque = image.copy()
    opaque.putalpha(255)
    assert np.array_equal(read(saved(opaque)), np.asarray(image))


def palette():
    image = Image.new("P", (3, 1))
    image.putdata([0, 1, 2])
    image.putpalette([9, 9, 9, 10, 20, 30, 200, 100, 0])
    return image


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_colour_of_the_palette_can_be_transparent(kind):
    assert read(saved(palette(), kind)).tolist() == [[[9, 9, 9], [10, 20, 30], [200, 100, 0]]]
    assert read(saved(palette(), kind, transparency=1)).tolist() == [[[9, 9, 9], [255, 255, 255], [200, 100, 0]]]


def test_colours_of_the_palette_can_be_half_transparent():
    found = read(saved(palette(), transparency=bytes([255, 0, 128])))
    assert found.tolist() == [[[9, 9, 9], [255, 255, 255], [227, 177, 127]]]


def test_a_palette_with_an_alpha_channel_is_laid_on_white():
    image = see_through("LA").convert("PA")
    assert np.array_equal(np.asarray(to_8_bits(image, 3)), np.asarray(to_8_bits(image.convert("RGBA"), 3)))


def bmp_with_alpha(values):
    """A BMP of four channels, whose header (BITMAPV4) says which of them is alpha."""
    height, width = values.shape[:2]
    head = struct.pack("<IiiHHIIiiII", 108, width, -height, 1, 32, 3, values.nbytes, 0, 0, 0, 0)
    head += struct.pack("<4I", 0xFF, 0xFF00, 0xFF0000, 0xFF000000) + bytes(52)
    return b"BM" + struct.pack("<IHHI", 14 + len(head) + values.nbytes, 0, 0, 14 + len(head)) + head + values.tobytes()


@pytest.mark.parametrize("kind", ["BMP", "TGA"])
@pytest.mark.parametrize("alpha", [0, 128])
def test_an_alpha_channel_that_was_never_written_is_no_transparency(kind, alpha):
    values = np.stack([GREYS, GREYS.T, 255 - GREYS, np.full_like(GREYS, alpha)], -1)
    file = bmp_with_alpha(values) if kind == "BMP" else saved(Image.fromarray(values), kind)
    wanted = on_white(values[..., :3], values[..., 3:]) if alpha else values[..., :3]
    assert np.abs(read(file) - wanted).max() <= 0.51


def test_one_colour_of_a_png_can_be_transparent():
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    assert read(saved(image, transparency=(1, 2, 3))).tolist() == [[[255, 255, 255], [4, 5, 6]]]
    deep_grey = png_of_16_bits(np.array([[257, 300]], np.uint16), chunk(b"tRNS", struct.pack(">H", 300)))
    assert read(deep_grey, 1).tolist() == [[1, 255]]


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_one_grey_of_few_bits_can_be_transparent(bits, channels):
    white = 2**bits - 1
    for clear in range(white + 1):
        expected = [255 if value == clear else value * 255 // white for value in range(white + 1)]
        found = read(png_of_few_bits(bits, range(white + 1), clear), channels)
        assert found.reshape(white + 1, channels)[:, 0].tolist() == expected


def test_one_colour_of_16_bits_can_be_transparent_and_its_neighbours_are_not(tmp_path):
    values = np.array([[[258, 772, 1286], [259, 772, 1286], [258, 772, 1030]]], np.uint16)
    file = png_of_16_bits(values, chunk(b"tRNS", struct.pack(">3H", 258, 772, 1286)))
    assert read(file).tolist() == [[[255, 255, 255], [1, 3, 5], [1, 3, 4]]]
    (tmp_path / "a.png").write_bytes(file)
    picture = take_picture(tmp_path / "a.png", ModelConfig(image_size=(1, 3), patch_size=1, in_channels=1))
    assert picture.pixels[0, 0, 0] == 255  # opened once, read as grey and as colours


def test_colour_with_alpha_of_16_bits_is_laid_on_white():
    values = np.array([[[65535, 0, 0, 65535], [0, 0, 0, 0]]], np.uint16)
    assert read(png_of_16_bits(values)).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    grey = np.array([[[257, 65535], [257, 0]]], np.uint16)
    assert read(png_of_16_bits(grey), 1).tolist() == [[1, 255]]


# --- colour ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_ink_becomes_light(kind):
    for ink, light in (((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 0, 255), (0, 0, 0)), ((0, 0, 0, 0), (255, 255, 255))):
        assert np.abs(read(saved(Image.new("CMYK", (8, 8), ink), kind)) - np.array(light, int)).max() <= 1


def test_brightness_and_colour_difference_become_colours():
    image = Image.fromarray(colours())
    found = np.asarray(to_8_bits(image.convert("YCbCr"), 3), dtype=int)
    assert np.abs(found - colours()).max() <= 3


def test_one_bit_is_black_or_white():
    image = Image.fromarray(np.array([[True, False]]))
    assert read(saved(image), 1).tolist() == [[255, 0]]
    assert read(saved(image, "TIFF")).tolist() == [[[255] * 3, [0] * 3]]


def test_lightness_and_two_colour_axes_become_colours_or_grey():
    greys = Image.fromarray(GREYS).convert("RGB").convert("LAB")
    assert np.abs(read(saved(greys, "TIFF")).astype(int) - GREYS[..., None]).max() <= 3
    assert np.abs(read(saved(greys, "TIFF"), 1).astype(int) - GREYS).max() <= 3


def test_a_model_of_one_channel_gets_the_grey_of_the_same_pixels():
    file = saved(see_through("RGBA"))
    assert np.array_equal(read(file, 1), np.asarray(Image.fromarray(read(file)).convert("L")))
    assert "1 or 3 channels" in refused(file, 4)


# --- orientation -----------------------------------------------------------------------------------------------------

UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize(
    ("kind", "orientation"), [*(("PNG", number) for number in UPRIGHT), ("JPEG", 6), ("WEBP", 7), ("TIFF", 5)]
)
def test_an_image_is_turned_as_its_exif_says(orientation, kind):
    image = turned(orientation, 4, 6)
    options = {"lossless": True} if kind == "WEBP" else {}
    file = saved(image, kind, exif=image.getexif(), **options)
    found = read(file)
    if kind != "JPEG":
        assert np.array_equal(found, UPRIGHT[orientation](colours(4, 6)))
    with Image.open(io.BytesIO(file)) as opened:
        assert np.array_equal(found, np.asarray(ImageOps.exif_transpose(opened).convert("RGB")))


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM", b"Exif\0\0 no TIFF at all"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_leaves_the_image_as_it_is_stored(exif):
    plain = Image.fromarray(colours())
    assert np.array_equal(read(saved(plain, "JPEG", exif=exif)), read(saved(plain, "JPEG")))


@pytest.mark.parametrize("value", [0, 9, 300])
def test_an_orientation_that_is_none_turns_nothing(value):
    image = turned(value, 4, 6)
    assert np.array_equal(read(saved(image, exif=image.getexif())), colours(4, 6))


def test_deep_and_transparent_images_are_turned_too():
    for image in (deep(np.uint16, 65535), see_through("RGBA")):
        upright = read(saved(image))
        image.getexif()[0x0112] = 6
        assert np.array_equal(read(saved(image, exif=image.getexif())), np.rot90(upright, -1))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])  # Pillow turns TIFF itself
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_the_size_of_an_image_is_known_before_it_is_turned(orientation, kind):
    image = turned(orientation, 4, 6)
    file = saved(image, kind, exif=image.getexif())
    with opened(file) as found:
        assert upright_size(found) == read(file).shape[:2]


def test_what_is_grey_is_known_from_the_header():
    for name, file in DEEP.items():
        with opened(file) as image:
            assert is_grey(image), name
    with opened(saved(see_through("RGBA"))) as image:
        assert not is_grey(image)


def test_annotated_pixels_are_those_the_annotations_speak_of():
    image = turned(6, 4, 6)
    file = saved(image, exif=image.getexif())
    assert np.array_equal(read(file, annotated=(6, 4)), colours(4, 6))
    assert np.array_equal(read(file, annotated=(4, 6)), np.rot90(colours(4, 6), -1))


# --- several frames, no image ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_read(kind):
    first, second = (Image.new("RGB", (8, 8), value) for value in ("#0a141e", "white"))
    options = {"lossless": True} if kind == "WEBP" else {}
    file = saved(first, kind, save_all=True, append_images=[second], **options)
    assert (read(file) == [10, 20, 30]).all()


def test_what_is_no_image_is_said_in_words():
    assert "empty" in refused(b"")
    assert "SVG" in refused(b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    assert "web page" in refused(b"\n<!DOCTYPE html><html></html>")
    assert "git lfs pull" in refused(b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n")
    assert "kind heic" in refused(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert "Pillow" in refused(b"GIF89a, or is it")


@pytest.mark.parametrize("name", DEEP)
def test_a_file_that_ends_too_early_is_refused(name):
    refused(DEEP[name][: len(DEEP[name]) // 2])


# --- one reader ------------------------------------------------------------------------------------------------------

SAME = {
    "16 bits": saved(deep(np.uint16, 65535)),
    "lying": saved(turned(6), exif=turned(6).getexif()),
    "transparent": saved(see_through("RGBA")),
    "grey and transparent": saved(see_through("LA")),
    "palette": saved(see_through("RGBA").convert("P"), transparency=bytes(range(256))),
    "floats": saved(deep(np.float32, 1), "TIFF"),
}


def write_everywhere(root, file):
    """The one file as every image of every layout; gives folders by layout."""
    labels = [0, 1, 2] * 2
    for split in ("train", "test"):
        samples = [(row, file, "png", label) for row, label in enumerate(labels)]
        write_layouts.write_folder(root / "folder" / split, iter(samples), CLASSES)
        write_layouts.write_shards(root / "webdataset", split, iter(samples), 25)
        write_parquet(root / "parquet" / f"{split}.parquet", [file] * len(labels), labels)
    return {layout: root / layout for layout in ("folder", "webdataset", "parquet")}


@pytest.mark.parametrize("name", SAME)
def test_training_evaluation_and_explain_read_the_same_pixels(name, tmp_path):
    wanted = torch.from_numpy(read(SAME[name]).copy()).permute(2, 0, 1)
    for folder in write_everywhere(tmp_path, SAME[name]).values():
        for in_memory in (True, False):
            splits = load(folder, MODEL, in_memory=in_memory)
            for split in (splits.train, splits.validation, splits.test):
                assert all(torch.equal(image, wanted) for image in split.images)
    path = tmp_path / "one.png"
    path.write_bytes(SAME[name])
    assert torch.equal(read_picture(path, MODEL).pixels, wanted)
    assert np.array_equal(decode({"path": str(path)}, MODEL, "here"), wanted.permute(1, 2, 0))


@pytest.mark.parametrize("name", [name for name in SAME if name != "lying"])
def test_detection_reads_the_same_pixels(name, tmp_path):
    from sape2.detection.coco import open_split

    (tmp_path / "train" / "images").mkdir(parents=True)
    (tmp_path / "train" / "images" / "one.png").write_bytes(SAME[name])
    images = [{"id": 1, "file_name": "one.png", "height": 16, "width": 16}]
    values = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "train" / "annotations.json").write_text(json.dumps(values))
    pixels = open_split(tmp_path, "train")[0][0]
    assert np.array_equal(pixels.permute(1, 2, 0), read(SAME[name]))


# --- runs of another rule --------------------------------------------------------------------------------------------


@pytest.fixture
def seen(tmp_path):
    """A run whose data.json says what is given; with it, what the same images give now."""
    now = load(write_everywhere(tmp_path / "data", SAME["lying"])["folder"], MODEL).train.fingerprint

    def written(**changes):
        before = {key: value for key, value in (now | changes).items() if value is not None}
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "data.json").write_text(json.dumps(before))
        return Run(tmp_path / "run", get_recipe("digits")), now

    return written


def test_a_run_of_another_rule_does_not_go_on(seen):
    run, now = seen(reading_rule=RULE + 1)
    with pytest.raises(ValueError, match=rf"by rule {RULE + 1}, now it is rule {RULE} .*choose another --out") as error:
        run.check_images(now)
    assert "\n" not in str(error.value)
    (run.folder / "data.json").unlink()  # the way out that the message names
    run.check_images(now)


def test_a_run_of_the_same_rule_or_of_arrays_goes_on(seen):
    run, now = seen()
    run.check_images(now)
    run, now = seen(layout="arrays", reading_rule=None)
    run.check_images(now)


def test_a_finished_run_of_another_rule_gets_a_note_and_is_measured(seen):
    assert seen()[0].note_of_rule is None
    assert seen(layout="arrays", reading_rule=None)[0].note_of_rule is None
    run, now = seen(reading_rule=RULE + 1)
    run.weights("last").touch()
    run.check_images(now)
    assert f"by rule {RULE + 1}; here images are read by rule {RULE}" in str(run.note_of_rule)


# --- what other programs set -----------------------------------------------------------------------------------------


def test_half_a_file_is_refused_whatever_another_program_told_pillow(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole = saved(Image.effect_noise((64, 64), 50), "JPEG")
    assert "truncated" in refused(whole[: len(whole) // 2])
    with READING_WHOLE, READING_WHOLE:
        assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_no_program_is_run_to_draw_an_image():
    assert "it is EPS" in refused(saved(Image.new("RGB", (8, 8)), "EPS"))


def test_pixels_and_boxes_are_the_same_under_another_default_of_torch():
    images = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4)
    values = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))  # of no other test, whose tensors would be kept
    boxes = [random_box(20, 30, 0.3, seed) for seed in range(20)]
    torch.set_default_dtype(torch.float64)
    try:
        found, again = normalize(images, *values), [random_box(20, 30, 0.3, seed) for seed in range(20)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, normalize(images, *values))
    assert again == boxes
