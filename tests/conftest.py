import os
import shutil
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for a network
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels of Triton run on the CPU; it counts when Triton is first imported

import jaxtyping
import pytest
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as for a job in the background, whose training would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def as_users_call_it():
    """Without the type checks of the tests, which would refuse an argument before the code says what is wrong with it."""
    yield from _without_type_checks()


@pytest.fixture(scope="module")
def as_users_run_it():
    """The same for all tests of a module, and for what it trains for them."""
    yield from _without_type_checks()


def _without_type_checks():
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# --- headless Chromium of the system, for tests marked `browser` --------------------------------------------------

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")  # no longer: Playwright keeps a loop running
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install --group browser")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()
