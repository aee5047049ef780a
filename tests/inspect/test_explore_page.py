"""The page of the microscope as a person uses it: headless Chromium (tests/conftest.py). Skipped where gradio is missing.

AXE_JS names a copy of axe.min.js (npm: axe-core) for the test of contrast and names; SCREENSHOTS a folder to keep
screenshots in.
"""

import json
import os
import re
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

WAIT = 120_000  # ms; processors of test machines are shared
pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("as_users_run_it")]
if find_spec("gradio") is None:  # not imported here: that takes seconds, also of those who only collect the tests
    pytest.skip("needs gradio: pip install --group browser", allow_module_level=True)


@pytest.fixture(scope="module")
def scope():
    pytest.importorskip("sklearn")
    from sape2.inspect.explore import open_microscope

    return open_microscope()


@pytest.fixture(scope="module")
def address(scope):
    """Where the page is served, by a thread."""
    from sape2.inspect.explore.page import build_app, open_socket

    app = build_app(scope)
    import uvicorn

    with open_socket("127.0.0.1", None) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        server.should_exit = True
        thread.join(30)


@pytest.fixture
def opened(browser, address):
    """`opened(query, width)` gives the page once it shows a view; nothing may be logged as an error or asked of other hosts."""
    pages, errors, asked = [], [], []

    def open_page(query="", width=1280, height=900):
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(WAIT)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address + query, timeout=WAIT)
        page.wait_for_selector("#sape2-view[data-query]")
        pages.append(page)
        return page

    open_page.errors = errors
    yield open_page
    for page in pages:
        page.close()
    assert errors == []
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def shows(page, *parts):
    """Waits until the view is that of an address with these parts."""
    test = "parts => parts.every(part => `&${document.getElementById('sape2-view').dataset.query}&`.includes(`&${part}&`))"
    page.wait_for_function(test, arg=list(parts))


def maps_of(scope, pixels, layer):
    data = scope.subject.config.data
    images = ((pixels / 255 - data.mean[0]) / data.std[0])[None]
    with torch.no_grad():
        return {name: value[0].numpy() for name, value in scope.subject.model.maps(images)[layer - 1].items()}


def titles(page, section):
    """What the panels of a section say where one points: (row, column, what) -> number."""
    found = page.eval_on_selector_all(f".sape2-{section} title", "all => all.map(one => one.textContent)")
    matches = [re.fullmatch(r"row (\d+), column (\d+): ([a-z ]*?)(-?[\d.e+-]+)( [a-z ]+)?", text) for text in found]
    return [(int(m[1]), int(m[2]), (m[3] or m[5] or "").strip(), float(m[4])) for m in matches if m]


def click(page, patch, **options):
    page.locator(f".sape2-answer rect[data-patch='{patch}']").first.click(**options)


# --- what one does ---------------------------------------------------------------------------------------------------


def test_a_person_clicks_a_patch_changes_layer_and_head_and_reads_the_numbers_of_maps(opened, scope):
    page = opened()
    click(page, "2,3")
    shows(page, "patch=2,3")
    page.locator("#sape2-layer input[type=number]").fill("2")
    page.keyboard.press("Enter")
    shows(page, "patch=2,3", "layer=2")
    page.locator("#sape2-head label", has_text="3").click()
    shows(page, "layer=2", "head=3")
    click(page, "5,4", modifiers=["Shift"])
    shows(page, "patch=2,3", "other=5,4")
    maps = maps_of(scope, scope.samples.images[0], 2)
    i = 2 * 8 + 3
    shown = titles(page, "answer")
    bias = {(y, x): value for y, x, what, value in shown if what == "logits"}
    assert len(bias) == 64
    wanted = maps["bias"][2, i].reshape(8, 8)
    np.testing.assert_allclose([bias[at] for at in np.ndindex(8, 8)], wanted.ravel(), rtol=1e-4, atol=1e-6)
    gates = [value for y, _, what, value in titles(page, "lines") if what == "gate" and y == 2][:8]
    np.testing.assert_allclose(gates, maps["gates_x"][2, i], rtol=1e-4)
    words = page.inner_text(".sape2-pair > p")
    assert f"Bias: {wanted[5, 4]:.3f} logits" in words


def test_an_upload_is_shown_and_a_bad_one_told(opened, scope, tmp_path):
    page = opened()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    page.locator("#sape2-upload ~ input[type=file], input[type=file]").first.set_input_files(tmp_path / "photo.png")
    page.wait_for_function("document.getElementById('sape2-view').dataset.query.includes('image=upload:')")
    assert "32x32 pixels (L)" in page.inner_text(".sape2-answer")
    click(page, "1,1")
    shows(page, "patch=1,1")
    maps = maps_of(scope, torch.from_numpy(pixels)[None], scope.start.layer)
    bias = [value for *_, what, value in titles(page, "answer") if what == "logits"]
    np.testing.assert_allclose(bias, maps["bias"][scope.start.head - 1, 9], rtol=1e-4, atol=1e-6)
    from test_explore import UPLOADS

    for name, (write, message) in UPLOADS.items():
        write(tmp_path / name)
        page.locator("input[type=file]").first.set_input_files(tmp_path / name)
        page.wait_for_function("text => document.getElementById('sape2-alert').textContent.includes(text)", arg=message)
        assert page.locator("#sape2-alert").is_visible()


def test_the_keyboard_alone_is_enough(opened):
    page = opened("?patch=3,3")
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "sape2-view":
            break
    assert page.evaluate("document.activeElement.id") == "sape2-view"
    for key in ("ArrowUp", "ArrowLeft", "Shift+ArrowDown"):
        page.keyboard.press(key)
    shows(page, "patch=2,2", "other=3,2")
    page.keyboard.press("Escape")
    shows(page, "patch=2,2", "other=none")
    page.locator("#sape2-right input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    shows(page, "shift=0,1")
    assert page.locator("#sape2-status").inner_text().startswith("shipped model")


def test_the_mouse_drags_the_image(opened):
    page = opened("?patch=4,4&beside=before")
    box = page.locator(".sape2-answer svg").first.bounding_box()
    pixel = box["width"] / 32
    page.mouse.move(box["x"] + 100, box["y"] + 150)
    page.mouse.down()
    page.mouse.move(box["x"] + 100 + 4 * pixel, box["y"] + 150, steps=3)
    page.mouse.up()
    shows(page, "shift=0,4", "patch=4,4")
    assert page.locator(".sape2-moved tbody tr").count() == 10
    page.wait_for_function("document.querySelector('#sape2-right input[type=number]').value === '4'")


def test_an_address_is_a_view(opened):
    page = opened("?layer=3&head=2&patch=1,6&other=0,0&beside=layer:1&size=48x48&shift=4,0")
    shows(page, "layer=3", "patch=1,6", "size=48x48")
    page.wait_for_function("document.querySelector('#sape2-layer input[type=number]').value === '3'")
    assert "layer=3" in page.url
    click(page, "2,2")
    shows(page, "patch=2,2")
    assert "patch=2,2" in page.url
    with page.expect_download() as download:
        page.locator("a[data-export=json]").click()
    state = json.loads(Path(download.value.path()).read_text())["state"]
    assert (state["layer"], state["patch"], state["beside"], state["size"]) == (3, [2, 2], "layer:1", [48, 48])


def test_an_address_that_cannot_be_is_told_and_the_start_is_shown(opened):
    page = opened("?layer=9")
    assert "layer must be from 1 to 4; got 9" in page.inner_text("#sape2-alert")
    shows(page, "layer=4")
    assert len(opened.errors) == 1  # Chromium logs the answer 400
    opened.errors.clear()


@pytest.mark.parametrize("width", [390, 1000, 1280])
def test_nothing_is_wider_than_the_screen(opened, tmp_path, width):
    page = opened("?other=2,5&beside=head:2&shift=0,4", width=width)
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    page.screenshot(path=folder / f"explore-{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = page.eval_on_selector_all(
        ".sape2-view svg text",
        """all => all.map(one =>
        parseFloat(one.getAttribute('font-size')) * one.ownerSVGElement.getBoundingClientRect().width
        / one.ownerSVGElement.viewBox.baseVal.width)""",
    )
    assert min(sizes) >= 9


def boxes(page, selector):
    """[left, top, right, bottom] of each, on the whole page."""
    return page.eval_on_selector_all(
        selector,
        "all => all.map(one => one.getBoundingClientRect()).map(b => [b.left, b.top + scrollY, b.right, b.bottom + scrollY])",
    )


def test_the_view_takes_the_width_that_there_is(opened):
    page = opened("?patch=3,3", width=1280)
    assert min(left for left, *_ in boxes(page, "#sape2-controls, #sape2-view")) <= 48
    for section in ("answer", "lines", "tables", "maps"):
        panels = boxes(page, f".sape2-{section} .sape2-panel svg")
        assert max(right for *_, right, _ in panels) >= 1280 - 64, section


def test_the_first_view_holds_image_bias_attention_prediction_and_the_controls_of_the_maps(opened):
    page = opened("?patch=3,3", width=1280, height=800)
    panels = boxes(page, ".sape2-answer .sape2-panel svg")
    named = page.eval_on_selector_all(".sape2-answer .sape2-panel svg text:first-of-type", "all => all.map(t => t.textContent)")
    assert named == ["Image", "Bias from i", "Attention from i", "Prediction"]
    assert len({round(top) for _, top, _, _ in panels}) == 1  # beside each other
    assert min(right - left for left, _, right, _ in panels) >= 200
    reached = boxes(page, "#sape2-image, #sape2-layer, #sape2-head, #sape2-opacity")
    assert len(reached) == 4
    assert max(bottom for *_, bottom in panels + reached) <= 800


def test_the_opacity_of_the_maps_is_changed_at_once_and_kept_in_the_address_and_the_file(opened):
    page = opened("?patch=3,3&opacity=20")
    drawn = "getComputedStyle(document.querySelector('.sape2-answer rect[fill-opacity]')).fillOpacity"
    assert page.evaluate(drawn) == "0.2"
    page.evaluate("sape2.set({opacity: 75})")
    assert page.evaluate(drawn) == "0.75"
    shows(page, "opacity=75", "patch=3,3")
    assert "opacity=75" in page.url
    with page.expect_download() as download:
        page.locator("a[data-export=svg]").click()
    assert "fill-opacity='0.75'" in Path(download.value.path()).read_text()


def test_on_a_phone_the_image_comes_first_then_the_controls_then_the_rest(opened):
    page = opened("?patch=3,3", width=500)
    (answer,), (controls,), (lines,) = (boxes(page, name) for name in (".sape2-answer", "#sape2-controls", ".sape2-lines"))
    assert answer[3] <= controls[1]
    assert controls[3] <= lines[1]
    click(page, "2,3")
    page.locator("#sape2-rest").focus()
    page.keyboard.press("ArrowUp")
    shows(page, "patch=1,3")


def test_every_colour_has_a_scale_with_numbers_and_a_unit(opened):
    page = opened("?patch=3,3")
    units = {"gate (share)", "position (rows)", "vector (logits)", "logits", "attention weight"}
    for section, panels in (("answer", slice(1, 3)), ("lines", slice(None)), ("maps", slice(None))):
        for panel in page.locator(f".sape2-{section} .sape2-panel").all()[panels]:
            texts = panel.locator("text").all_text_contents()
            scales = panel.locator("image[height='6.00']").count()
            assert scales >= 1
            assert sum(bool(re.fullmatch(r"-?[\d.]+(e-\d+)?", text)) for text in texts) >= 2 * scales
            assert units & set(texts)


@pytest.mark.skipif("AXE_JS" not in os.environ, reason="AXE_JS does not name a copy of axe.min.js")
def test_axe_finds_nothing_wrong(opened):
    page = opened("?other=2,5&shift=0,4")
    page.add_script_tag(path=os.environ["AXE_JS"])
    found = page.evaluate("async () => (await axe.run(document, {runOnly: ['wcag2a', 'wcag2aa']})).violations")
    assert {f["id"]: [node["html"][:200] for node in f["nodes"]] for f in found} == {}
