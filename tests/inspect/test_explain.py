"""`sape2 explain`: one page or picture about one image, whatever the file, and one line for what cannot be."""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sape2.cli import main
from sape2.config import override
from sape2.config.recipes import get_recipe
from sape2.data.picture import read_picture
from sape2.inspect.drawing import Drawing
from sape2.inspect.explain import explain
from sape2.models.trained import build_model, load_run_model
from sape2.runs.checkpoint import save_weights
from sape2.runs.run import Run

RGB = override(
    get_recipe("digits"),
    ["image_size=16", "patch_size=4", "in_channels=3", "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]"],
).model


pytestmark = pytest.mark.usefixtures("as_users_run_it")


def make_run(folder, *settings):
    """A finished run of two layers, untrained: to explain takes weights, not good ones."""
    config = override(get_recipe("digits"), ["model.depth=2", *settings])
    Run(folder, config).start()
    save_weights(folder / "model.safetensors", build_model(config))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(path)
    return path


def status_of(*argv):
    try:
        return main([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code


class Page(HTMLParser):
    """Tags, their attributes and whether every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.attributes, self.tags, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def outside(text):
    """What a page would fetch from elsewhere."""
    page = Page(text)
    fetched = [
        value for _, name, value in page.attributes if name in ("src", "href", "srcset") and not value.startswith("data:")
    ]
    return (
        fetched
        + re.findall(r"https?://|@import|url\(", re.sub(r"base64,[^']+", "", text))
        + ["script"] * page.tags.count("script")
    )


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_needs_nothing_else(run, photo, tmp_path):
    assert status_of("explain", run, photo, "--out", tmp_path / "page.html") == 0
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert outside(text) == []
    assert page.open == []
    assert page.tags.count("figure") == 4  # overlays, pairs, gates and positions, distance
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert (
        len(labels) == page.tags.count("svg") == 10
    )  # image, bias, attention and prediction; two layers, two axes, two layers
    assert all(labels)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".html"] == ["page.html"]


@pytest.mark.parametrize("name", ["n" * 240, "名" * 80])
def test_an_image_of_a_long_name_gets_a_page(run, photo, name, capfd):
    image = photo.rename(photo.with_name(f"{name}.png"))
    assert status_of("explain", run, image) == 0
    written = Path(capfd.readouterr().out.splitlines()[-1].removeprefix("written: "))
    assert written.name.startswith(f"explain-{name[:20]}")
    assert f"<title>{name}.png</title>" in written.read_text()


def test_the_checker_sees_what_a_page_would_fetch():
    assert outside("<html><img src='https://a.org/b.png'><script>x</script></html>") == [
        "https://a.org/b.png",
        "https://",
        "script",
    ]


def test_the_numbers_on_the_page_are_those_of_the_model(run, photo, capfd, tmp_path):
    assert status_of("explain", run, photo, "--out", tmp_path / "page.html", "--json") == 0
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    model = load_run_model(Run.open_finished(run))
    pixels = read_picture(photo, model.config).pixels
    config = get_recipe("digits").data
    images = ((pixels / 255 - config.mean[0]) / config.std[0])[None]
    with torch.no_grad():
        probabilities, maps = model(images)[0].softmax(-1), model.maps(images)
    likely = [row for row in rows if row["name"] == "probability"]
    assert [row["value"] for row in likely] == pytest.approx(probabilities.topk(5).values.tolist(), rel=1e-5)
    assert [row["class"] for row in likely] == [str(c) for c in probabilities.topk(5).indices.tolist()]
    (bias,) = [row for row in rows if row["name"] == "bias_mean" and row["layer"] == 2]
    assert bias["value"] == pytest.approx(maps[1]["bias"].mean().item(), rel=1e-5)
    text = (tmp_path / "page.html").read_text()
    assert f"{likely[0]['value']:.1%}" in text
    assert f"{bias['value']:.4f}" in text


def test_an_image_unlike_the_training_images_is_called_so(run, photo, tmp_path, capfd):
    Image.fromarray(np.asarray(Image.open(photo).resize((200, 150)))).save(photo)
    why = "it has 200x150 pixels, the training images at most 8x8: 22 times larger"
    assert status_of("explain", run, photo, "--out", tmp_path / "page.html") == 0
    assert f"note: unlike the training images: {why}" in capfd.readouterr().out
    text = (tmp_path / "page.html").read_text()
    assert text.index("<h1>") < text.index("This image is unlike the training images:") < text.index("<svg")
    assert why in text
    assert status_of("explain", run, photo, "--json") == 0
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    (row,) = [row for row in rows if row["name"] == "unlike_size"]
    assert (row["message"], row["unit"], row["measure"]) == (why, "times", "explain")
    assert row["value"] == pytest.approx(150**0.5 * 200**0.5 / 8)


def test_nothing_is_said_of_an_image_like_the_training_images(run, tmp_path, capfd):
    digit = np.random.default_rng(0).integers(0, 2, (8, 8), dtype=np.uint8) * 160
    Image.fromarray(digit).save(tmp_path / "digit.png")
    assert status_of("explain", run, tmp_path / "digit.png", "--out", tmp_path / "page.html") == 0
    assert "unlike" not in capfd.readouterr().out + (tmp_path / "page.html").read_text()


def test_the_image_is_cut_as_evaluate_cuts_it(photo, tmp_path, capfd):
    whole, cut = make_run(tmp_path / "whole"), make_run(tmp_path / "cut", "data.center_crop=0.5")
    pages = []
    for folder in (whole, cut):
        assert status_of("explain", folder, photo, "--json") == 0
        pages.append((folder / "figures" / "explain-photo.html").read_text())
        capfd.readouterr()
    assert "resized to the model&#39;s 8x8, which changes its proportions" in pages[0]
    assert "its middle cut out at the model&#39;s 8x8" in pages[1]


def test_classes_have_the_names_of_the_images_as_text(run, photo, tmp_path, capfd):
    folder = make_run(tmp_path / "named")
    names = [f"<class {letter}>" for letter in "abcdefghij"]
    (folder / "data.json").write_text(json.dumps({"classes": names}))
    assert status_of("explain", folder, photo, "--json") == 0
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert {row["class"] for row in rows if row["name"] == "probability"} <= set(names)
    text = (folder / "figures" / "explain-photo.html").read_text()
    assert "<class" not in text  # escaped
    assert "&lt;class" in text


@pytest.mark.parametrize(
    ("encoding", "figures", "title"),
    [
        ("none", 3, "Attention"),
        ("ape", 3, "Attention"),
        ("rope", 3, "Attention"),
        ("rpe", 3, "Bias"),
        ("cope", 4, "Bias"),
        ("rope+sape2:axes=x,count=both", 4, "Bias"),
    ],
)
def test_an_encoding_without_bias_gets_attention_maps(photo, tmp_path, encoding, figures, title):
    folder = make_run(tmp_path / "run", f"model.encoding={encoding}", "model.pool=class")
    assert status_of("explain", folder, photo, "--out", tmp_path / "page.html") == 0
    text = (tmp_path / "page.html").read_text()
    assert text.count("<figure") == figures
    assert f"<h2>{title} between patches</h2>" in text
    assert ("there is nothing to check" in text) == (title == "Attention")
    assert all(low != high for low, high in scales(text))


def scales(text):
    """What stands at both ends of each scale: texts at the same height below a strip of colours."""
    drawn = re.findall(r"<image [^>]*height='6.00'[^>]*/><text [^>]*>([^<]*)</text><text [^>]*>([^<]*)</text>", text)
    assert drawn
    return drawn


def test_the_scales_of_a_page_are_found():
    strip, low, high = "<image x='0' height='6.00' href='x'/>", "<text x='0'>0.005</text>", "<text x='9'>0.006</text>"
    assert scales(strip + low + high) == [("0.005", "0.006")]


def test_the_page_opens_with_bias_and_attention_of_the_first_patch_over_the_image(run, photo, tmp_path):
    assert status_of("explain", run, photo, "--out", tmp_path / "page.html", "--patch", "1,2", "--layer", 2) == 0
    opening = re.search(r"<figure>.*?</figure>", (tmp_path / "page.html").read_text(), re.DOTALL)[0]
    pixels = read_picture(photo, get_recipe("digits").model).pixels
    data = get_recipe("digits").data
    with torch.no_grad():
        maps = load_run_model(Run.open_finished(run)).maps(((pixels / 255 - data.mean[0]) / data.std[0])[None])[1]
    for name, unit in (("bias", "logits"), ("attention", "attention weight")):
        shown = [float(value) for value in re.findall(rf"row \d, column \d: (\S+) {unit}<", opening)]
        assert shown == pytest.approx(maps[name][0].mean(0)[1 * 4 + 2].tolist(), rel=1e-4)
    assert opening.count("fill-opacity") == 2 * 16
    assert opening.count("Prediction") >= 1


def test_layer_head_and_patches_can_be_chosen(run, photo, tmp_path):
    page = tmp_path / "page.html"
    assert status_of("explain", run, photo, "--out", page, "--layer", 2, "--head", 1, "--patch", "1,2", "--patch", "3,0") == 0
    text = page.read_text()
    assert "a: row 1, column 2; b: row 3, column 0" in text
    assert "of patch a (row 1, column 2) in layer 2, by head" in text
    assert "Layer 2, head 1, patch a (row 1, column 2)." in text


def test_a_layer_without_bias_is_shown_by_its_attention(photo, tmp_path):
    folder = make_run(tmp_path / "run", "model.encoding=sape2:every=2")
    for layer, title in ((1, "Attention"), (2, "Bias")):
        assert status_of("explain", folder, photo, "--out", tmp_path / "page.html", "--layer", layer) == 0
        assert f"<h2>{title} between patches</h2>" in (tmp_path / "page.html").read_text()


def test_what_breaks_a_limit_is_said_on_the_page(photo, tmp_path, capfd):
    folder = make_run(tmp_path / "run", "model.encoding=sape2:num_positions=2")
    assert status_of("explain", folder, photo) == 0
    assert "lie beyond the last of 2 rows" in capfd.readouterr().out
    assert "lie beyond the last of 2 rows" in (folder / "figures" / "explain-photo.html").read_text()


def test_the_picture_says_which_image_and_model_and_what_was_predicted(run, photo, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(Drawing, "save", lambda drawing, path: saved.append(drawing))
    assert status_of("explain", run, photo, "--out", tmp_path / "picture.png") == 0
    texts = [html.unescape(words) for words in re.findall(r"<text[^>]*>([^<]*)</text>", saved[0].svg())]
    assert re.fullmatch(r"photo\.png: predicted \d, \d+\.\d%", texts[0])
    assert texts[1].startswith("vit_nano* with ape+sape2, trained on digits for 60 epochs (seed 0; model.depth=2)")
    assert {"Prediction", "Bias from patch a", "Attention from patch a"} <= set(texts)


# --- the page in a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep_page(tmp_path_factory):
    """Of nine layers, which no usual number of columns fills."""
    folder = make_run(tmp_path_factory.mktemp("deep") / "run", "model.depth=9")
    image = folder / "grey.png"
    ramp("L").save(image)
    return explain(folder, image)[0]


FILLED = """() => [...document.querySelectorAll('.panels')].map(panels => {
    const area = box => (box.width + 16) * (box.height + 16);  // with the gap
    const shown = [...panels.querySelectorAll('svg')].map(svg => area(svg.getBoundingClientRect()));
    return shown.reduce((sum, part) => sum + part, 0) / area(panels.getBoundingClientRect());
})"""


@pytest.mark.browser
@pytest.mark.parametrize("width", [500, 1000, 1440])
def test_panels_fill_their_rows(browser, deep_page, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(deep_page.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    filled = page.evaluate(FILLED)
    page.close()
    assert len(filled) == 4
    assert min(filled) >= 0.85, filled


@pytest.mark.browser
def test_the_measure_of_filled_rows_sees_a_hole(browser):
    page = browser.new_page(viewport={"width": 1000, "height": 900})
    page.set_content("<div class=panels style='width:900px'><svg style='display:block' width=300 height=100></svg></div>")
    assert page.evaluate(FILLED)[0] < 0.5
    page.close()


# --- pictures --------------------------------------------------------------------------------------------------------


def test_a_picture_appears_whole_or_not_at_all(run, photo, tmp_path, monkeypatch, capfd):
    out = tmp_path / "out" / "picture.PNG"
    assert status_of("explain", run, photo, "--out", out) == 0
    before = out.read_bytes()
    assert Image.open(out).size[0] > 500

    def broken(path, data):
        path.open("wb").write(data[:50])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", broken)
    capfd.readouterr()
    assert status_of("explain", run, photo, "--out", out) == 2
    assert "no space left" in capfd.readouterr().err
    assert out.read_bytes() == before
    assert list(out.parent.iterdir()) == [out]


# --- images ----------------------------------------------------------------------------------------------------------


def ramp(mode):
    return Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert(mode)


ODD = {
    "one.png": lambda: Image.new("RGB", (1, 1), "red"),
    "wide.png": lambda: Image.new("L", (3000, 2), 7),
    "grey.png": lambda: ramp("L"),
    "grey_alpha.png": lambda: ramp("LA"),
    "alpha.png": lambda: ramp("RGBA"),
    "palette.gif": lambda: ramp("P"),
    "bits.png": lambda: ramp("1"),
    "cmyk.jpg": lambda: ramp("CMYK"),
    "deep.png": lambda: Image.fromarray(np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)),
    "deep.tiff": lambda: Image.fromarray(np.linspace(0, 65535, 256).reshape(16, 16).astype(np.int32)),
    "float.tiff": lambda: Image.fromarray(np.linspace(0, 1, 256).reshape(16, 16).astype(np.float32)),
    "photo.webp": lambda: ramp("RGB"),
}


@pytest.mark.parametrize("name", ODD)
def test_any_image_is_read(tmp_path, name):
    ODD[name]().save(tmp_path / name)
    for model in (RGB, get_recipe("digits").model):
        pixels = read_picture(tmp_path / name, model).pixels
        assert pixels.shape == (model.in_channels, *model.image_size)
        assert pixels.dtype == torch.uint8


@pytest.mark.parametrize("name", ["grey.png", "deep.png", "deep.tiff", "float.tiff"])
def test_every_depth_gives_the_same_ramp(tmp_path, name):
    ODD[name]().save(tmp_path / name)
    expected = torch.linspace(0, 255, 256).view(1, 16, 16)
    found = read_picture(tmp_path / name, RGB).pixels
    assert (found - expected).abs().max() <= 1


def test_a_dark_image_of_16_bits_stays_dark(tmp_path):
    Image.fromarray(np.full((4, 4), 200, dtype=np.uint16)).save(tmp_path / "dark.png")
    assert read_picture(tmp_path / "dark.png", RGB).pixels.max() == 1


def test_transparency_is_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_picture(tmp_path / "clear.png", RGB).pixels == 255).all()


def test_exif_turns_the_image(tmp_path):
    image, exif = Image.new("RGB", (20, 10), "black"), Image.Exif()
    image.paste("white", (0, 0, 10, 10))  # the left half
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: the left becomes the top
    image.save(tmp_path / "turned.png", exif=exif)
    picture = read_picture(tmp_path / "turned.png", RGB)
    assert picture.pixels[:, :6].float().mean() > 250
    assert picture.pixels[:, -6:].float().mean() < 5
    assert "10x20 pixels" in picture.notes
    assert "changes its proportions" in picture.notes


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("L", (8, 8), value) for value in (10, 250)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    picture = read_picture(tmp_path / "moving.gif", RGB)
    assert picture.pixels.float().mean() == pytest.approx(10, abs=1)
    assert "first of 2 frames" in picture.notes


# --- mistakes --------------------------------------------------------------------------------------------------------


def tree(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def mistake(capfd, tmp_path, run):
    """The one line that the command prints, with exit status 2 and nothing written."""

    def line_of(*argv):
        capfd.readouterr()
        before = tree(tmp_path), tree(run)
        status = status_of("explain", *argv)
        out, err = capfd.readouterr()
        assert (status, out) == (2, "")
        assert err.startswith("sape2")
        assert err.count("\n") == 1
        assert (tree(tmp_path), tree(run)) == before
        return err

    return line_of


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--layer", 3], "--layer must be from 1 to 2, which the model has; got 3"),
        (["--layer", 0], "from 1 to 2"),
        (["--head", 4], "--head must be from 1 to 3"),
        (["--patch", "4,0"], "--patch is ROW,COLUMN from 0,0 to 3,3; got 4,0"),
        (["--patch", "1"], "whole numbers from 0, such as 3,5; got '1'"),
        (["--patch=-1,0"], "whole numbers from 0"),
        (["--out", "page.pdf"], "must end in .html or .png; got page.pdf"),
        (["--weights", "best"], "there is no"),
    ],
    ids=str,
)
def test_a_choice_that_cannot_be_is_told_in_one_line(mistake, run, photo, argv, message):
    assert message in mistake(run, photo, *argv)


def test_the_image_is_not_written_over(mistake, run, photo, tmp_path):
    (tmp_path / "photo.png").write_bytes(photo.read_bytes())
    (tmp_path / "link.png").symlink_to("photo.png")
    for out in ("photo.png", "link.png"):
        assert f"{out} is read by this command" in mistake(run, tmp_path / "photo.png", "--out", tmp_path / out)


def test_files_that_are_no_images_are_told_in_one_line(mistake, run, photo, tmp_path):
    (tmp_path / "notes.png").write_text("not an image")
    (tmp_path / "half.png").write_bytes(photo.read_bytes()[:200])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "shapes.svg").write_text("<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>")
    for name, why in (("notes.png", ""), ("half.png", ""), ("empty.jpg", "the file is empty"), ("shapes.svg", "it is SVG")):
        assert f"{name} cannot be read as an image: {why}" in mistake(run, tmp_path / name)
    assert "there is no such file" in mistake(run, tmp_path / "nowhere.png")
    assert "is a folder" in mistake(run, tmp_path)


def test_an_image_of_too_many_pixels_is_told_in_one_line(mistake, run, photo, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # 768 are more than twice as many
    assert "too many pixels" in mistake(run, photo)


def test_a_large_image_below_that_is_read_without_a_word(run, photo, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    assert status_of("explain", run, photo, "--out", tmp_path / "page.html") == 0
    assert capfd.readouterr().err == ""


def test_a_run_that_is_not_there_or_not_finished_is_told_in_one_line(mistake, photo, tmp_path):
    assert "no run folder" in mistake(tmp_path / "nowhere", photo)
    Run(tmp_path / "begun", get_recipe("digits")).start()
    assert "is not finished" in mistake(tmp_path / "begun", photo)
