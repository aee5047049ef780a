// The page's own part: the state in the address, clicks and keys on panels, one request for what is to be shown.
window.sape2 = (() => {
  const names = ["image", "layer", "head", "patch", "other", "size", "shift", "border", "beside", "opacity"];
  let state = new URLSearchParams();
  let wanted = null; // the query to ask for next; those in between are passed over
  let asking = false;
  let dragging = null;
  const find = (id) => document.getElementById(id);
  const pair = (name, between = ",") => (state.get(name) || "").split(between).map(Number);

  function say(text) {
    const alert = find("sape2-alert");
    alert.textContent = text;
    alert.hidden = !text;
  }

  async function ask(query) {
    const response = await fetch(`microscope/view?${query}`);
    const answer = await response.json();
    const view = find("sape2-view");
    if (!response.ok) {
      if (!wanted) state = new URLSearchParams(view.dataset.query || "");
      return say(answer.error);
    }
    say("");
    if (!wanted) state = new URLSearchParams(answer.query); // else a key pressed meanwhile would be lost
    view.innerHTML = answer.html;
    view.style.setProperty("--opacity", Number(new URLSearchParams(answer.query).get("opacity")) / 100);
    find("sape2-rest").innerHTML = answer.rest;
    view.dataset.query = answer.query;
    find("sape2-status").textContent = answer.status;
    const address = new URLSearchParams(location.search);
    names.forEach((name) => address.delete(name));
    const rest = address.toString();
    history.replaceState(null, "", `?${answer.query}${rest && `&${rest}`}`);
    document.querySelectorAll("[data-export]").forEach((link) => {
      link.href = `microscope/export.${link.dataset.export}?${answer.query}`;
    });
  }

  async function show(query, since = performance.now()) {
    wanted = { query, since };
    if (asking) return;
    asking = true;
    while (wanted) {
      const { query, since } = wanted;
      wanted = null;
      try {
        await ask(query);
      } catch {
        say("The server does not answer; start sape2 explore again.");
      }
      find("sape2-view").dataset.ms = (performance.now() - since).toFixed(1);
    }
    asking = false;
  }

  function set(changes) {
    const next = new URLSearchParams(state);
    Object.entries(changes).forEach(([name, value]) => next.set(name, value));
    if ("size" in changes) ["patch", "other"].forEach((name) => next.set(name, rescaled(name, changes.size)));
    if ("opacity" in changes) find("sape2-view").style.setProperty("--opacity", changes.opacity / 100);
    state = next; // so that a second change before the answer keeps the first
    return show(decodeURIComponent(next.toString()));
  }

  // The patch at the same place of the image when the size changes.
  function rescaled(name, size) {
    if (state.get(name) === "none") return "none";
    const was = pair("size", "x"), now = size.split("x").map(Number);
    return pair(name).map((at, axis) => Math.floor(((at + 0.5) * now[axis]) / was[axis])).map((at, axis) => {
      const cells = now[axis] / patchSide();
      return Math.max(0, Math.min(at, cells - 1));
    }).map((at, axis) => Math.floor(at)).join(",");
  }

  const patchSide = () => Number(find("sape2-view").dataset.patchSide);
  const cells = () => pair("size", "x").map((side) => side / patchSide());

  // What the gradio controls show, in their order.
  function controls() {
    const [dy, dx] = pair("shift");
    const image = state.get("image") || "";
    const sample = image.startsWith("test:") ? Number(image.slice(5)) : 0;
    return [sample, Number(state.get("layer")), Number(state.get("head")), Number(state.get("opacity")),
      state.get("size"), dx, dy, state.get("border"), state.get("beside")];
  }

  async function start() {
    const given = new URLSearchParams(location.search);
    const asked = new URLSearchParams();
    names.forEach((name) => given.has(name) && asked.set(name, given.get(name)));
    listen();
    await show(asked.toString());
    if (!find("sape2-view").dataset.query) {
      const why = find("sape2-alert").textContent;
      await show("");
      say(why);
    }
    return controls();
  }

  async function uploaded(told) {
    const answer = JSON.parse(told);
    if (answer.image) await set({ image: answer.image, shift: "0,0" });
    if (answer.message) say(answer.message);
    return controls();
  }

  function choose(patch, second) {
    const clickChoosesOther = document.querySelector("#sape2-click input[value='other']")?.checked;
    return set({ [second || clickChoosesOther ? "other" : "patch"]: patch });
  }

  const KEYS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

  function pressed(event) {
    if (event.key === "Escape") set({ other: "none" });
    const step = KEYS[event.key];
    if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const name = event.shiftKey ? "other" : "patch";
    const from = state.get(name) === "none" ? pair("patch") : pair(name);
    const most = cells();
    set({ [name]: from.map((at, axis) => Math.max(0, Math.min(at + step[axis], most[axis] - 1))).join(",") });
  }

  // With a mouse the image can be pulled along: by pixels, with Alt by whole patches.
  function grabbed(event) {
    const image = event.target.closest(".sape2-answer .sape2-column:first-child svg");
    if (event.pointerType !== "mouse" || event.button || !image || !event.target.dataset.patch) return;
    const scale = pair("size", "x")[1] / image.getBoundingClientRect().width;
    dragging = { x: event.clientX, y: event.clientY, scale, from: pair("shift"), moved: false };
  }

  function pulled(event) {
    if (!dragging) return;
    const unit = event.altKey ? patchSide() : 1;
    const by = [event.clientY - dragging.y, event.clientX - dragging.x].map((px) => unit * Math.round((px * dragging.scale) / unit));
    if (!dragging.moved && !by.some(Boolean)) return;
    dragging.moved = true;
    const most = pair("size", "x");
    const shift = dragging.from.map((at, axis) => Math.max(-most[axis], Math.min(at + by[axis], most[axis]))).join(",");
    if (shift !== state.get("shift")) set({ shift });
  }

  function released() {
    const moved = dragging?.moved;
    dragging = null;
    if (moved) setTimeout(() => document.querySelector("#sape2-sync button, button#sape2-sync")?.click());
    return moved;
  }

  function listen() {
    let justDragged = false;
    for (const view of [find("sape2-view"), find("sape2-rest")]) {
      view.addEventListener("click", (event) => {
        const patch = event.target.dataset?.patch;
        if (patch && !justDragged) choose(patch, event.shiftKey);
        justDragged = false;
      });
      view.addEventListener("keydown", pressed);
      view.addEventListener("pointerdown", (event) => {
        justDragged = false; // the click after a drag is lost where the image was drawn again
        grabbed(event);
      });
    }
    window.addEventListener("pointermove", pulled);
    window.addEventListener("pointerup", () => { justDragged = Boolean(released()); });
  }

  return { set, pair, controls, start, uploaded, state: () => state.toString() };
})();
