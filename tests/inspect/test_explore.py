"""The microscope: its numbers are those of `maps`, every state is checked, uploads and files are what they say."""

import itertools
import json
import re
import socket
import struct
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sape2.cli import main
from sape2.config import override
from sape2.config.recipes import get_recipe
from sape2.data import ImageData
from sape2.inspect import explore
from sape2.inspect.explore import SHIPPED, open_microscope
from sape2.inspect.explore.change import changes
from sape2.inspect.explore.microscope import LARGEST_GRID, Microscope, Subject
from sape2.inspect.explore.page import Desk, open_socket
from sape2.inspect.explore.state import State, parse_state
from sape2.inspect.explore.views import sections, to_html
from sape2.models.trained import build_model, load_run_model
from sape2.runs.run import Run

pytestmark = pytest.mark.usefixtures("as_users_run_it")


def subject(name="run", encoding="ape+sape2", **settings):
    """An untrained model of two layers on 8x8 images, with a table that is large enough to see."""
    assignments = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    config = override(get_recipe("digits"), ["model.depth=2", f"model.encoding={encoding}", *assignments])
    model = build_model(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "table" in key and "encoding" in key:
                parameter.normal_()
    return Subject(name, model, config)


def samples(channels=1, size=8):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, channels, size, size), dtype=torch.uint8, generator=generator)
    return ImageData(images, torch.tensor([3, 1, 2]), tuple("0123456789"), (0.305,), (0.376,))


def microscope(encoding="ape+sape2", against=None, **settings):
    return Microscope(subject(encoding=encoding, **settings), samples(), against=against)


@pytest.fixture(scope="module")
def scope():
    return microscope()


def maps_of(scope, image, layer):
    data = scope.subject.config.data
    images = (scope.samples.images[image : image + 1] / 255 - data.mean[0]) / data.std[0]
    with torch.no_grad():
        maps = scope.subject.model.maps(images)[layer - 1]
        probabilities = scope.subject.model(images)[0].softmax(-1)
    return {name: value[0].numpy() for name, value in maps.items()}, probabilities.numpy()


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["mean", "class"])
@pytest.mark.parametrize("head", [0, 2])
def test_every_number_is_that_of_maps(pool, head):
    scope = microscope(pool=pool)
    state = replace(scope.start, image="test:1", layer=2, head=head, patch=(1, 2), other=(3, 0))
    maps, probabilities = maps_of(scope, 1, 2)
    pick = (lambda values: values.mean(0)) if head == 0 else (lambda values: values[head - 1])
    (column,) = scope.view(state).columns
    prefix = maps["attention"].shape[-1] - 16
    for axis in ("x", "y"):
        for name, found in (("gates", "gates"), ("positions", "positions"), ("vectors", "vector")):
            np.testing.assert_allclose(getattr(column.axes[axis], found), pick(maps[f"{name}_{axis}"])[6], rtol=1e-6)
    np.testing.assert_allclose(column.bias.ravel(), pick(maps["bias"])[6], rtol=1e-6)
    np.testing.assert_allclose(column.attention.ravel(), pick(maps["attention"])[6 + prefix, prefix:], rtol=1e-6)
    likely = np.sort(probabilities)[::-1][:5]
    np.testing.assert_allclose([probability for _, probability in column.prediction], likely, rtol=1e-5)
    assert column.prediction[0][0] == str(probabilities.argmax())


def test_the_table_read_at_the_positions_is_the_vector(scope):
    (column,) = scope.view(scope.start).columns
    for seen in column.axes.values():
        read = np.interp(seen.positions.clip(0, len(seen.products) - 1), np.arange(len(seen.products)), seen.products)
        np.testing.assert_allclose(read, seen.vector, atol=1e-5)


@pytest.mark.parametrize("encoding", ["sape2", "rope+sape2", "sape2:dot=key,sign=minus", "sape2:readout=squared_distance"])
def test_the_distances_of_the_vectors_make_the_bias_of_a_pair(encoding):
    scope = microscope(encoding)
    (column,) = scope.view(replace(scope.start, patch=(0, 1), other=(2, 3))).columns
    sign = -1 if "minus" in encoding else 1
    assert set(column.distances()) == {"x", "y"}
    assert sign * sum(column.distances().values()) == pytest.approx(column.bias[2, 3], rel=1e-4)


def test_attention_without_the_bias_is_softmax_of_content_alone(scope):
    """With and without differ by exp(bias), row by row: literally, in a loop."""
    (column,) = scope.view(replace(scope.start, head=1)).columns
    weights = [a * np.exp(b) for a, b in zip(column.attention_without_bias.ravel(), column.bias.ravel(), strict=True)]
    np.testing.assert_allclose(np.array(weights) / sum(weights), column.attention.ravel(), rtol=1e-4)


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("none", {"answer", "pair"}),
        ("ape", {"answer", "pair"}),
        ("rope", {"answer", "pair"}),
        ("rpe", {"answer", "maps", "pair"}),
        ("cope", {"answer", "lines", "tables", "maps", "pair"}),
        ("sape2:axes=raster", {"answer", "lines", "tables", "maps", "pair"}),
        ("sape2:count=both,readout=direct", {"answer", "lines", "tables", "maps", "pair"}),
        ("sape2:gates=none,num_positions=2", {"answer", "lines", "tables", "maps", "pair"}),
    ],
)
def test_every_encoding_opens_and_shows_what_there_is(encoding, shown):
    scope = microscope(encoding)
    view = scope.view(replace(scope.start, other=(0, 0)))
    assert {section.key for section in sections(view)} == shown
    assert (view.columns[0].bias is None) == (encoding in ("none", "ape", "rope"))
    assert "nan" not in "".join(to_html(view))
    json.loads(view.to_json())


def test_a_second_column_is_another_head_layer_run_or_the_image_not_moved(scope):
    both = Microscope(scope.subject, scope.samples, against=subject("other run", "rope"))
    state = replace(both.start, layer=1, head=1)
    for beside in ("head:2", "layer:2"):
        what, _, which = beside.partition(":")
        first, second = both.view(replace(state, beside=beside)).columns
        alone = both.view(replace(state, beside="nothing", **{what: int(which)})).columns[0]
        np.testing.assert_array_equal(second.attention, alone.attention)
        assert not np.array_equal(first.attention, second.attention)
    first, second = both.view(replace(state, beside="run")).columns
    assert (first.encoding, second.encoding, second.bias) == ("ape+sape2", "rope", None)
    moved = replace(state, shift=(0, 2), patch=(1, 3), beside="before")
    _, second = both.view(moved).columns
    assert second.patch == (1, 2)  # one patch of two pixels to the left of where it is now
    still = both.view(replace(state, patch=(1, 2), beside="nothing")).columns[0]
    np.testing.assert_array_equal(second.bias, still.bias)


def test_a_shift_moves_the_pixels_and_a_size_changes_the_grid(scope):
    view = scope.view(replace(scope.start, shift=(1, -3)))
    np.testing.assert_array_equal(view.columns[0].pixels, np.roll(scope.samples.images[0].numpy(), (1, -3), (1, 2)))
    larger = scope.view(replace(scope.start, size=(16, 12))).columns[0]
    assert larger.grid == (8, 6) == larger.bias.shape
    assert larger.axes["x"].gates.shape == (6,)
    assert larger.axes["y"].gates.shape == (8,)


# --- what moves ------------------------------------------------------------------------------------------------------


def test_what_is_equivariant_moves_along_and_what_is_not_does_not():
    """Without absolute positions and with cyclic counts everything moves with a circular shift by whole patches."""
    steps = {"sape2:count=cyclic": True, "sape2": False, "ape+sape2:count=cyclic": False}
    for encoding, exact in steps.items():
        scope = microscope(encoding)
        moved = {change.what: change for change in scope.view(replace(scope.start, shift=(2, 4))).moved}
        assert (moved["bias"].moved < 1e-5) == exact
        assert (moved["attention"].moved < 1e-5) == exact
        assert (moved["probabilities of the classes"].in_place < 1e-5) == exact
        assert moved["bias"].in_place > 0.1


def test_bias_along_rows_moves_with_whole_rows_only():
    scope = microscope("sape2:axes=x", depth=1)
    down, right = (
        {c.what: c.moved for c in scope.view(replace(scope.start, layer=1, shift=s)).moved} for s in ((2, 0), (0, 2))
    )
    assert down["bias"] < 1e-5
    assert down["gates along rows"] < 1e-5
    assert right["gates along rows"] < 1e-5  # gates are of pairs
    assert right["positions along rows"] > 1e-2  # sums are anchored at the border


def test_what_left_the_image_is_not_counted():
    before = np.arange(16.0).reshape(4, 4) + 1  # (N, N) of a grid of 1x4
    after = np.full((4, 4), 99.0)
    after[1:, 1:] = before[:3, :3]
    pair = [{"bias": values} for values in (before, after)]
    still = [np.ones((4, 2))] * 2, [np.ones(3)] * 2
    inside = changes(pair, *still, (1, 4), (0, 1), "reflect")[0]
    assert inside.what == "bias"
    assert inside.moved == 0
    assert changes(pair, *still, (1, 4), (0, 1), "circular")[0].moved > 1


# --- state -----------------------------------------------------------------------------------------------------------


def test_an_address_holds_the_whole_state(scope):
    state = State("test:2", 2, 0, (1, 3), (0, 2), (16, 8), (-3, 4), "reflect", "layer:1", 35)
    assert parse_state(state.query(), scope.start) == state
    assert parse_state("", scope.start) == scope.start
    assert parse_state("other=none&head=2", state) == replace(state, other=None, head=2)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("image=test:3", "image must be test:0 to test:2, or an upload; got 'test:3'"),
        ("image=../../etc/passwd", "image must be"),
        ("image=upload:abc", "is no longer here"),
        ("layer=3", "layer must be from 1 to 2; got 3"),
        ("layer=x", "layer needs a whole number; got 'x'"),
        ("head=4", "head must be from 0 to 3; got 4"),
        ("patch=4,0", "patch is row,column from 0,0 to 3,3; got 4,0"),
        ("other=0,-1", "other is row,column"),
        ("patch=1", "patch needs two whole numbers such as 3,5; got '1'"),
        ("opacity=101", "opacity must be from 0 to 100; got 101"),
        ("opacity=0.5", "opacity needs a whole number; got '0.5'"),
        ("size=9x8", "does not divide into patches"),
        ("size=800x800", f"makes 160000 patches; at most {LARGEST_GRID}"),
        ("shift=0,9", "shift must be from -8 to 8; got 9"),
        ("border=torn", "border must be one of circular, reflect; got 'torn'"),
        ("beside=run", "there is no other run"),
        ("beside=head:7", "beside head must be from 0 to 3; got 7"),
        ("beside=cat", "beside must be nothing, head:N, layer:N, before or run; got 'cat'"),
        ("colour=red", "the address asks for 'colour'; known:"),
    ],
)
def test_an_address_that_cannot_be_shown_is_told_in_one_line(scope, query, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Desk(scope).answer(query)
    assert "\n" not in str(caught.value)


def test_runs_on_other_images_are_not_set_beside_each_other(scope):
    with pytest.raises(ValueError, match=r"image_size is \(8, 8\) in one and \(16, 16\) in the other"):
        Microscope(scope.subject, scope.samples, against=subject("larger", image_size=16))


# --- answers and files -----------------------------------------------------------------------------------------------


def test_an_answer_holds_the_view_the_whole_address_and_words(scope):
    answer = Desk(scope).answer("patch=1,2&other=3,3")
    html = answer["html"] + answer["rest"]
    assert parse_state(answer["query"], State()) == replace(scope.start, patch=(1, 2), other=(3, 3))
    (column,) = scope.view(parse_state(answer["query"], scope.start)).columns
    assert f"row 0, column 3: {column.bias[0, 3]:.5g} logits" in html
    assert f"row 1, column 0: gate {column.axes['x'].gates[0]:.5g}" in html
    assert html.count("data-patch='1,2'") >= 7  # the image, two maps over it, line, three maps
    assert f"row 0, column 3: {column.bias[0, 3]:.5g} logits" in answer["html"]  # over the image, in the first view
    assert f"row 0, column 3: {column.attention[0, 3]:.5g} attention weight" in answer["html"]
    assert "i at row 1, column 2, n at row 3, column 3" in answer["status"]
    assert "http" not in html


def test_files_of_a_view(scope, tmp_path):
    desk, query = Desk(scope), "patch=1,2&other=3,3&beside=head:2&shift=1,0"
    data, media = desk.file(query, "json")
    assert media == "application/json"
    found = json.loads(data)
    (first, second), state = scope.view(parse_state(query, scope.start)).columns, found["state"]
    assert (state["patch"], state["shift"]) == ([1, 2], [1, 0])
    np.testing.assert_allclose(found["columns"][1]["bias"], second.bias)
    np.testing.assert_allclose(found["columns"][0]["axes"]["y"]["positions"], first.axes["y"].positions)
    assert found["moved"]
    (tmp_path / "view.png").write_bytes(desk.file(query, "png")[0])
    assert Image.open(tmp_path / "view.png").size[0] > 1000
    assert desk.file(query, "svg")[0].startswith(b"<svg xmlns=")


def test_a_click_costs_little():
    """A click may take 200 ms; this is the server's part of it, in processor time, for vit_nano on 8x8 patches."""
    scope = Microscope(subject(image_size=32, patch_size=4), samples(size=32))
    desk, seconds = Desk(scope), []
    for column in range(7):
        start = time.process_time()
        desk.answer(f"patch=3,{column}&other=2,5")
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.15


# --- uploads ---------------------------------------------------------------------------------------------------------


def vast_png(path):
    """200 megapixels by its header; nobody should get as far as the pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20000, 10000, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


UPLOADS = {
    "notes.txt": (lambda path: path.write_text("not an image"), "notes.txt cannot be read as an image"),
    "vast.png": (vast_png, "vast.png cannot be read as an image: too many pixels to be read safely"),
    "shapes.svg": (lambda path: path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"), "it is SVG"),
    "empty.png": (lambda path: path.write_bytes(b""), "the file is empty"),
    "one.png": (lambda path: Image.new("L", (1, 1)).save(path), "one.png has 1x1 pixels, less than one patch of"),
}


@pytest.mark.parametrize("name", UPLOADS)
def test_a_bad_upload_is_told_in_one_line(scope, tmp_path, name):
    write, message = UPLOADS[name]
    write(tmp_path / name)
    answer = json.loads(Desk(scope).take(str(tmp_path / name)))
    assert message in answer["message"]
    assert "\n" not in answer["message"]
    assert str(tmp_path) not in answer["message"]  # where the server keeps it is nobody's business
    assert ("image" in answer) == (name == "one.png")
    assert ("unlike the training images: it has 1x1 pixels" in answer["message"]) == (name == "one.png")


def test_an_upload_is_looked_at_as_the_data_set_is(scope, tmp_path):
    Image.fromarray(scope.samples.images[2, 0].numpy()).save(tmp_path / "photo.png")
    desk = Desk(scope)
    image = json.loads(desk.take(str(tmp_path / "photo.png")))["image"]
    found = desk.view(f"image={image}")
    np.testing.assert_array_equal(found.columns[0].bias, desk.view("image=test:2").columns[0].bias)
    assert found.notes == "uploaded: 8x8 pixels (L)"


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_shipped_model_is_small_trained_and_says_how_it_was_made():
    config = Run.open(SHIPPED).config
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 2_000_000
    assert "sape2" in config.model.encoding
    command = re.search(r"^sape2 (train cifar10_sprint .*)$", (SHIPPED / "README.md").read_text(), flags=re.MULTILINE)[1]
    from sape2.cli import build_parser
    from sape2.cli.options import resolve

    assert resolve(build_parser().parse_args(command.split())).identity() == config.identity()
    assert {parameter.dtype for parameter in load_run_model(Run.open_finished(SHIPPED)).parameters()} == {torch.float32}


def test_without_a_run_photographs_and_drawings_are_looked_at_under_their_names():
    scope = open_microscope()
    for number, name in enumerate(scope.names):
        view = scope.view(replace(scope.start, image=f"test:{number}"))
        assert view.notes == name
        assert view.columns[0].bias.std() > 0
    assert len(scope.names) == len(scope.samples)
    assert scope.samples.images.flatten(1).float().std(1).min() > 10  # none is empty


def test_images_of_other_classes_are_not_told_by_the_names_of_theirs(tmp_path):
    """Ten classes of any kind were shown with the shipped model, whose first class is airplane."""
    for split, name in itertools.product(("train", "test"), [f"kind {at}" for at in range(10)]):
        (tmp_path / split / name).mkdir(parents=True)
        for at in range(2):
            colour = (len(split), int(name[-1]), at)
            Image.new("RGB", (32, 32), colour).save(tmp_path / split / name / f"{at}.png")
    with pytest.raises(ValueError, match=r"the classes airplane, .*; kind 0, \.\.\. of .* are others"):
        open_microscope(data=str(tmp_path))


def test_the_package_takes_the_shipped_files_along():
    import tomllib

    root = Path(__file__).parents[2]
    packages = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    source = root / "src"
    folders = {source / name.replace(".", "/"): patterns for name, patterns in packages.items()}
    taken = {path for folder, patterns in folders.items() for each in patterns for path in folder.glob(each)}
    others = {path for path in (source / "sape2").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert taken == others


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "no run folder"),
        (["--port", "0"], "--port needs whole numbers from 1 on"),
        (["--port", "70000"], "cannot listen on 127.0.0.1, port 70000"),
        (["--host", "nowhere.invalid"], "cannot listen on nowhere.invalid"),
    ],
)
def test_what_cannot_be_served_is_told_in_one_line(argv, message, capfd, monkeypatch):
    monkeypatch.setattr(explore, "import_gradio", lambda: None)
    if argv != ["nowhere"]:
        monkeypatch.setattr(explore, "open_microscope", lambda *arguments: None)
    assert main(["explore", *argv]) == 2
    out, err = capfd.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


def test_without_gradio_the_extra_is_named(monkeypatch, capfd):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    assert main(["explore"]) == 2
    assert "sape2 explore needs gradio: pip install 'sape2[explore]'" in capfd.readouterr().err


@pytest.mark.parametrize(("host", "told"), [("", "--host needs an address"), ("no.such.host.invalid", "cannot listen on")])
def test_an_address_that_is_none_is_told_at_once(host, told, monkeypatch):
    """An empty one, of a variable that is not set, opened the page to all machines; an unknown one was tried on 100 ports."""
    tried, create = [], socket.create_server
    monkeypatch.setattr(socket, "create_server", lambda *given, **named: tried.append(given) or create(*given, **named))
    with pytest.raises(ValueError, match=told):
        open_socket(host, None)
    assert len(tried) == bool(host)


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_an_address_of_ipv6_is_listened_on():
    with open_socket("::1", None) as listening:
        assert listening.getsockname()[0] == "::1"


def test_a_port_that_is_taken_is_told_and_the_next_one_found():
    with open_socket("127.0.0.1", None) as first:
        taken = first.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {taken} .*choose another --port"):
            open_socket("127.0.0.1", taken)
        with open_socket("127.0.0.1", None) as second:
            assert second.getsockname()[1] > taken
