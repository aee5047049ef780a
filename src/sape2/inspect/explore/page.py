"""The web page of the microscope. Gradio provides controls and uploads; `views` draws the figures, page.js fetches them.

A click requests the new view from one plain route rather than gradio's queue, so it costs little more than drawing it. The
state is in the address; the files of a view are links with the same state. No data comes from or goes to another machine.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import threading
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from sape2.config.extras import from_extra
from sape2.config.recipes.changed import changed_in_words
from sape2.data.decoding import evaluation_crop
from sape2.data.picture import read_picture, unlike
from sape2.inspect.explore.columns import View
from sape2.inspect.explore.microscope import Microscope
from sape2.inspect.explore.state import State, parse_state
from sape2.inspect.explore.views import to_drawing, to_html
from sape2.inspect.templates import template

LARGEST_UPLOAD = "64mb"
USUAL_PORTS = range(7860, 7960)
TAKEN = (errno.EADDRINUSE, errno.EACCES)
HELP = (
    "Click a patch to make it the query patch i; Shift and click for a second patch n. Arrow keys move i, with Shift n; Escape "
    "removes n. Drag the image to shift it, with Alt by whole patches."
)

KEYS = "arrow keys move patch i, with Shift patch n"


def import_gradio() -> Any:
    """Gradio, told to stay on this machine; raises ImportError that says how to get it."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return from_extra("explore", "gradio", "sape2 explore needs gradio")


# --- answers ---------------------------------------------------------------------------------------------------------


class Desk:
    """Answers the requests of the routes, one at a time."""

    def __init__(self, microscope: Microscope) -> None:
        self.microscope = microscope
        self._lock = threading.Lock()

    def view(self, query: str) -> View:
        """Raises ValueError for an address that cannot be shown."""
        with self._lock:
            return self.microscope.view(parse_state(query, self.microscope.start))

    def answer(self, query: str) -> dict[str, str]:
        view = self.view(query)
        html, rest = to_html(view)
        return {"html": html, "rest": rest, "query": view.state.query(), "status": status(view)}

    def file(self, query: str, kind: str) -> tuple[bytes, str]:
        """The view as a file, and its media type."""
        view = self.view(query)
        if kind == "json":
            return view.to_json().encode(), "application/json"
        drawing = to_drawing(view)
        return (drawing.png(), "image/png") if kind == "png" else (drawing.svg(standalone=True).encode(), "image/svg+xml")

    def take(self, path: str | None) -> str:
        """An uploaded file: JSON with the image to show, or a message in one line, or both."""
        if path is None:
            return json.dumps({"message": "There was no file."})
        file = Path(path)
        run = self.microscope.subject.config
        config = run.model
        try:
            picture = read_picture(file, config, evaluation_crop(run.data))
        except (ValueError, OSError) as error:
            return json.dumps({"message": str(error).replace(str(file), file.name)})
        key = hashlib.sha256(picture.pixels.numpy().tobytes()).hexdigest()[:12]
        with self._lock:
            answer = {"image": self.microscope.add(key, picture)}
        told = []
        if min(picture.size) < config.patch_size:
            height, width = picture.size
            told.append(
                f"{file.name} has {width}x{height} pixels, less than one patch of {config.patch_size}x{config.patch_size}: "
                "what is shown is made up by enlarging it."
            )
        if found := unlike(picture, run.data, self.microscope.subject.trained_on or [config.image_size]):
            told.append(f"{file.name} is unlike the training images: {'; '.join(each.sentence for each in found)}.")
        return json.dumps(answer | ({"message": " ".join(told)} if told else {}))


def status(view: View) -> str:
    """A description of the view for people who do not see the panels."""
    column = view.columns[0]
    (name, probability), (y, x) = column.prediction[0], column.patch
    other = "" if column.other is None else f", n at row {column.other[0]}, column {column.other[1]}"
    return f"{column.name}. i at row {y}, column {x}{other}. Prediction: {name}, {probability:.1%}."


# --- the page --------------------------------------------------------------------------------------------------------


def build_app(microscope: Microscope) -> Any:
    """The whole page as an ASGI application."""
    gradio = import_gradio()
    from fastapi import FastAPI
    from starlette.responses import JSONResponse, Response

    desk = Desk(microscope)

    def guarded(answer: Callable[[str], Any]) -> Callable[[Any], Any]:
        def route(request: Any) -> Any:
            try:
                return answer(request.url.query)
            except ValueError as error:
                return JSONResponse({"error": " ".join(str(error).split())}, status_code=400)

        return route

    def export(kind: str) -> Callable[[str], Any]:
        def send(query: str) -> Any:
            data, media = desk.file(query, kind)
            name = {"Content-Disposition": f'attachment; filename="sape2-view.{kind}"'}
            return Response(data, media_type=media, headers=name)

        return send

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_route("/microscope/view", guarded(lambda query: JSONResponse(desk.answer(query))))
    for kind in ("png", "svg", "json"):
        app.add_route(f"/microscope/export.{kind}", guarded(export(kind)))
    fonts = ["system-ui", "sans-serif"]
    return gradio.mount_gradio_app(
        app,
        build_blocks(gradio, microscope, desk.take),
        path="/",
        footer_links=[],
        max_file_size=LARGEST_UPLOAD,
        ssr_mode=False,
        theme=gradio.themes.Base(font=fonts, font_mono=["ui-monospace", "monospace"], primary_hue="blue"),
        head=f"<style>{_text('page.css')}</style><script>{_text('page.js')}</script>",  # css= would be limited to a part
    )


def _text(name: str) -> str:
    return resources.files("sape2.inspect.explore").joinpath(name).read_text(encoding="utf-8")


def build_blocks(gradio: Any, microscope: Microscope, take: Callable[[str | None], str]) -> Any:
    """Controls on the left, the view on the right; on a phone the maps over the image, the controls, the rest of the view."""
    state, config, parts = microscope.start, microscope.subject.config, template("explore.html").module
    with gradio.Blocks(title="sape2 explore", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gradio.HTML(str(parts.top(microscope, changed_in_words(config), HELP)))
        with gradio.Row(elem_id="sape2-page"):
            with gradio.Column(elem_id="sape2-first"):
                gradio.HTML(str(parts.view(config.model.patch_size, KEYS)))
            with gradio.Column(elem_id="sape2-controls"):
                upload = gradio.UploadButton("Upload an image", elem_id="sape2-upload", size="md")
                controls = _controls(gradio, microscope, state)
                click = gradio.Radio([("patch i", "patch"), ("patch n", "other")], value="patch", label="A click chooses")
                click.elem_id = "sape2-click"
                gradio.HTML(str(parts.files(state.query())))
            with gradio.Column(elem_id="sape2-others"):
                gradio.HTML(str(parts.rest(KEYS)))
        told = gradio.Textbox(visible="hidden")
        sync = gradio.Button("sync", visible="hidden", elem_id="sape2-sync")
        outputs = list(controls.values())
        for name, control in controls.items():
            control.input(None, control, None, js=SET[name], api_visibility="private")
        upload.upload(take, upload, told, api_visibility="private", show_progress="hidden").then(
            None, told, outputs, js="(told) => sape2.uploaded(told)", api_visibility="private"
        )
        sync.click(None, None, outputs, js="() => sape2.controls()", api_visibility="private")
        blocks.load(None, None, outputs, js="() => sape2.start()", api_visibility="private")
    return blocks


SET = {  # what each control changes; both shifts stand in one pair
    "image": "(v) => { sape2.set({image: `test:${v}`}) }",
    "layer": "(v) => { sape2.set({layer: v}) }",
    "head": "(v) => { sape2.set({head: v}) }",
    "opacity": "(v) => { sape2.set({opacity: v}) }",
    "size": "(v) => { sape2.set({size: v}) }",
    "right": "(v) => { sape2.set({shift: `${sape2.pair('shift')[0]},${v}`}) }",
    "down": "(v) => { sape2.set({shift: `${v},${sape2.pair('shift')[1]}`}) }",
    "border": "(v) => { sape2.set({border: v}) }",
    "beside": "(v) => { sape2.set({beside: v}) }",
}


def _controls(gradio: Any, microscope: Microscope, state: State) -> dict[str, Any]:
    """The controls, in the order of `controls` in page.js."""
    config = microscope.subject.config.model
    heads = [("mean", 0), *((str(head), head) for head in range(1, config.num_heads + 1))]
    (height, width), last = config.image_size, len(microscope.samples) - 1
    sizes = [f"{size[0]}x{size[1]}" for size in microscope.sizes]
    return {
        "image": gradio.Slider(0, last, 0, step=1, label="Image" if microscope.names else "Test image", elem_id="sape2-image"),
        "layer": gradio.Slider(1, config.depth, state.layer, step=1, label="Layer", elem_id="sape2-layer"),
        "head": gradio.Radio(heads, value=state.head, label="Head", elem_id="sape2-head"),
        "opacity": gradio.Slider(0, 100, state.opacity, step=5, label="Map opacity (%)", elem_id="sape2-opacity"),
        "size": gradio.Dropdown(sizes, value=f"{height}x{width}", label="Size (height x width, px)", elem_id="sape2-size"),
        "right": gradio.Slider(-width, width, 0, step=1, label="Shift right (px)", elem_id="sape2-right"),
        "down": gradio.Slider(-height, height, 0, step=1, label="Shift down (px)", elem_id="sape2-down"),
        "border": gradio.Radio(["circular", "reflect"], value="circular", label="Border of a shifted image"),
        "beside": gradio.Dropdown(_beside(microscope), value=state.beside, label="Compare with", elem_id="sape2-beside"),
    }


def _beside(microscope: Microscope) -> list[tuple[str, str]]:
    config = microscope.subject.config.model
    run = [] if microscope.against is None else [(f"the other run: {microscope.against.name}", "run")]
    heads = [("mean of heads", "head:0"), *((f"head {n}", f"head:{n}") for n in range(1, config.num_heads + 1))]
    layers = [(f"layer {n}", f"layer:{n}") for n in range(1, config.depth + 1)]
    return [("nothing", "nothing"), *run, ("the image before the shift", "before"), *heads, *layers]


# --- server ----------------------------------------------------------------------------------------------------------


def open_socket(host: str, port: int | None) -> socket.socket:
    """Listening on the port, or on the first free one of the usual ones; raises ValueError if it is taken."""
    if not host:  # to a socket that is every address, and the page would be open to other machines
        raise ValueError("--host needs an address: 127.0.0.1 for this machine alone, 0.0.0.0 for all")
    reason, family = "", socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in USUAL_PORTS if port is None else [port]:
        try:
            return socket.create_server((host, candidate), family=family)
        except (OSError, OverflowError) as error:
            reason = str(error)
            if getattr(error, "errno", None) not in TAKEN:  # an address that is not here, on any port
                break
    wanted = f"{USUAL_PORTS[0]} to {USUAL_PORTS[-1]}" if port is None else str(port)
    raise ValueError(f"cannot listen on {host}, port {wanted} ({reason}); choose another --port or --host")


def serve(microscope: Microscope, host: str, port: int | None, say: Callable[[str], None]) -> None:
    """Serves the page until interrupted; calls `say` with its address once it can be opened."""
    with open_socket(host, port) as listening:
        app = build_app(microscope)
        import uvicorn

        shown = f"[{host}]" if ":" in host else host
        say(f"open http://{shown}:{listening.getsockname()[1]}/ (Ctrl-C ends it)")
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
