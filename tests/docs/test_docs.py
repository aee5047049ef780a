"""The pages: links, commands and examples; the checks themselves on pages that are known to be wrong; the notebooks."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from notebooks.build import cells as cells_of
from notebooks.build import execute
from site_checks import broken_links, code_blocks, faults

from sape2.cli import build_parser
from sape2.config.recipes import RECIPES
from sape2.config.recipes.coco import DETECTION_RECIPES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
NOTEBOOKS = ("sape2_step_by_step", "put_it_into_your_vit")
# Pages whose examples are run elsewhere, in their own way.
OTHERS = {"README.md", "docs/export.md", "docs/adding_an_encoding.md"}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands(page: Path) -> list[str]:
    """Every line of a page that starts with sape2, continued lines joined."""
    lines = [line for block in code_blocks(page.read_text(), "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("sape2 ")]


def having(what: str) -> list[Path]:
    """The pages with a block of that language."""
    return [page for page in PAGES if code_blocks(page.read_text(), what)]


# --- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_anchors_and_images_lead_somewhere(page):
    assert broken_links(page) == []


def test_the_link_checker_sees_what_is_broken(tmp_path):
    (tmp_path / "other.md").write_text("# A heading, with `code`\n\n```python\n# no heading\n```\n")
    (tmp_path / "page.md").write_text(
        "# Here\n[here](page.md) [away](https://example.org) [self](#here) [there](other.md#a-heading-with-code)\n"
        '[nowhere](missing.md) ![none](missing.png) [no anchor](#gone) [code](other.md#no-heading) <img src="gone.svg">\n'
        "`[not](a-link.md)`\n```\n[nor](this.md)\n```\n"
    )
    expected = ["missing.md", "missing.png", "#gone", "other.md#no-heading", "gone.svg"]
    assert broken_links(tmp_path / "page.md") == expected


def test_every_page_of_the_site_is_in_its_navigation():
    """The contents tables of Sphinx, and the pages that docs/conf.py adds below others."""
    (below,) = re.findall(r"^BELOW = (\{.*?^\})", (DOCS / "conf.py").read_text(), flags=re.MULTILINE | re.DOTALL)
    named = {f"{Path(above).parent}/{page}.md" for above, pages in ast.literal_eval(below).items() for page in pages}
    for page in DOCS.rglob("*.md"):
        for block in code_blocks(page.read_text(), re.escape("{toctree}")):
            for line in block.splitlines():
                if line and not line.startswith(":"):
                    named |= {str(found.relative_to(DOCS)) for found in page.parent.glob(f"{line}.*")}
    missing = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} - named - {"index.md"}
    assert missing == set(), "add these to the contents of docs/index.md"


# --- commands and examples -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_the_commands_are_ones_that_sape2_knows(page):
    parser = build_parser()
    for line in commands(page):
        parser.parse_args(shlex.split(re.split(r"[;&|]", line)[0], comments=True)[1:])


def test_a_command_that_sape2_does_not_know_would_be_found():
    with pytest.raises(SystemExit):
        build_parser().parse_args(shlex.split("train digits --epoch-count 3"))


@pytest.mark.parametrize("page", [page for page in having("python") if name_of(page) not in OTHERS], ids=name_of)
def test_the_python_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "from peft import" in page.read_text():
        pytest.importorskip("peft")
    names: dict = {}
    for block in code_blocks(page.read_text(), "python"):
        exec(block, names)


def test_every_host_has_a_page_with_examples():
    hosts = {page.stem for page in having("python") if page.parent.name == "hosts"}
    assert hosts == {"README", "timm", "transformers", "torchvision", "pytorch", "trainer_accelerate_lora"}


def test_make_targets_on_pages_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for block in code_blocks(page.read_text(), "bash"):
            for target in re.findall(r"^make (\w+)", block, flags=re.MULTILINE):
                assert f"\n{target}:" in makefile, (name_of(page), target)


def test_make_hosts_tries_the_oldest_versions_of_pyproject_and_the_page_of_hosts_names_them():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extra, group = project["project"]["optional-dependencies"]["hosts"], project["dependency-groups"]["test"]
    bounds = {tuple(need.split(">=")) for need in (*project["project"]["dependencies"], *extra, *group)}
    (tried,) = re.findall(r"^HOSTS \?= (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    versions = dict(pin.split("==") for pin in tried.split())
    assert set(versions) == {"torch", "torchvision", "timm", "transformers", "peft"}
    promised = {name: {bound for of, bound in bounds if of == name} for name in versions}
    assert promised == {name: {version.removesuffix(".0")} for name, version in versions.items()}
    page = (DOCS / "hosts" / "README.md").read_text()
    oldest = [f"{versions['torch']}, {versions['torchvision']}", *(versions[name] for name in ("timm", "transformers", "peft"))]
    rows = re.findall(r"^\| (?:torch, torchvision|timm|transformers|peft \(LoRA\)) \| (\d[^|]*) \|", page, flags=re.MULTILINE)
    assert rows == oldest


def paths_that_are_missing(text: str) -> list[str]:
    named = re.findall(r"`((?:src|tests|docs|benchmarks)/[^`*]*)`", text)
    return [path for path in named if not (ROOT / path).exists()]


def test_the_map_of_contributing_names_files_and_folders_that_exist():
    assert paths_that_are_missing((ROOT / "CONTRIBUTING.md").read_text()) == []
    assert paths_that_are_missing("`src/sape2/encodings/`, `src/sape2/gone/` and `tests/gone.py`") == [
        "src/sape2/gone/",
        "tests/gone.py",
    ]


# --- recipes, citation -----------------------------------------------------------------------------------------------


def recipe_row(name: str) -> str:
    config = (RECIPES | DETECTION_RECIPES)[name]()
    training = config.train if name in RECIPES else config.training
    height, width = config.model.image_size
    size = f"{height}x{width}, patch {config.model.patch_size}"
    return f"| `{name}` | {config.model.label} | {size} | {training.epochs} | {training.batch_size} | {training.lr:g} |"


@pytest.mark.parametrize("name", [*RECIPES, *DETECTION_RECIPES])
def test_the_page_of_recipes_has_every_recipe_as_it_is(name):
    assert recipe_row(name) in (DOCS / "recipes.md").read_text()


def test_the_citation_names_this_software_and_the_paper():
    import sape2

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "license"} <= citation.keys()
    assert citation["version"] == sape2.__version__
    (paper,) = citation["references"]
    assert paper["title"] in (ROOT / "README.md").read_text()
    assert paper["identifiers"][0]["value"] == "arXiv:2505.09466"


# --- the built site --------------------------------------------------------------------------------------------------


def write_site(folder: Path, body: str, css: str = "") -> Path:
    (folder / "page.html").write_text(f"<html><head></head><body>{body}</body></html>")
    (folder / "style.css").write_text(css)
    return folder


def test_a_site_that_keeps_to_itself_has_no_faults(tmp_path):
    body = (
        '<link rel="stylesheet" href="style.css"><link rel="canonical" href="https://example.org/page.html">'
        '<h1 id="top">x</h1>'
        '<a href="https://example.org">away</a><a href="#top">up</a><a href="page.html#top">here</a>'
        '<img src="data:image/png;base64,">'
    )
    css = "/* https://example.org */ a { background: url('data:image/svg+xml,x') } @import 'style.css';"
    assert faults(write_site(tmp_path, body, css)) == []


@pytest.mark.parametrize(
    "body",
    [
        '<script src="https://cdn.example.org/math.js"></script>',
        '<script src="//cdn.example.org/math.js"></script>',
        '<link rel="stylesheet" href="https://fonts.example.org/css">',
        '<link rel="preconnect" href="https://fonts.example.org">',
        '<img src="http://example.org/badge.svg">',
        '<img srcset="style.css 1x, https://example.org/2x.png 2x">',
        '<iframe src="https://example.org"></iframe>',
        '<p style="background: url(https://example.org/x.png)">',
        "<style>@font-face { src: url('https://fonts.example.org/a.woff2') }</style>",
        '<a href="missing.html">x</a>',
        '<a href="#missing">x</a>',
        '<a href="page.html#missing">x</a>',
        '<img src="missing.png">',
    ],
)
def test_the_site_checker_sees_what_is_loaded_from_elsewhere_and_what_leads_nowhere(tmp_path, body):
    assert len(faults(write_site(tmp_path, body))) == 1


def test_the_site_checker_reads_style_sheets_and_refuses_an_empty_site(tmp_path):
    assert len(faults(write_site(tmp_path, "", "@import 'https://fonts.example.org/css';"))) == 1
    (tmp_path / "empty").mkdir()
    assert faults(tmp_path / "empty") == [f"{tmp_path / 'empty'} holds no page"]


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_keeps_to_itself(tmp_path):
    pytest.importorskip("myst_nb")
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(tmp_path / "site")]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert faults(tmp_path / "site") == []
    first = (tmp_path / "site" / "index.html").read_text()
    assert "<math" in first
    assert "mathjax" not in first.lower()


def boxes_that_scroll(folder: Path, css: str) -> int:
    """How many of two formulas, with indices and roots that reach far up and down, show a scroll bar at 1280 pixels."""
    sync_api = pytest.importorskip("playwright.sync_api")
    convert = pytest.importorskip("latex2mathml.converter").convert
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    formulas = [r"p_{im} = \sum_{j \ge m} g_{ij}", r"b_{in} = \lVert s^x_i - s^x_n \rVert_2 / \sqrt{d}"]
    body = "".join(f'<div class="math">{convert(formula, display="block")}</div>' for formula in formulas)
    (folder / "page.html").write_text(f"<!doctype html><html><head><style>{css}</style></head><body>{body}</body></html>")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto((folder / "page.html").as_uri())
        reaches_out = "(box) => box.scrollHeight > box.clientHeight || box.scrollWidth > box.clientWidth"
        return page.evaluate(f"[...document.querySelectorAll('div.math')].filter({reaches_out}).length")


@pytest.mark.browser
def test_a_formula_has_no_scroll_bar(tmp_path):
    assert boxes_that_scroll(tmp_path, (DOCS / "static" / "site.css").read_text()) == 0
    assert boxes_that_scroll(tmp_path, "div.math { overflow-x: auto } math { font-size: 1.1em }") == 2


# --- notebooks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_holds_the_cells_of_its_script_executed_and_stays_small(name):
    file = DOCS / "notebooks" / f"{name}.ipynb"
    cells = json.loads(file.read_text())["cells"]
    script = (DOCS / "notebooks" / f"{name}.py").read_text()
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in cells] == cells_of(script)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert file.stat().st_size < 500_000


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, tmp_path):
    pytest.importorskip("nbclient")
    made = execute(DOCS / "notebooks" / f"{name}.py", tmp_path)
    assert all(cell.get("execution_count") for cell in made.cells if cell.cell_type == "code")
