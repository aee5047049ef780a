"""Uses an installed wheel as a newcomer would, outside the checkout: `python installed_wheel.py base|extras`.

`base` needs no extra: names, attention, attach. `extras` needs train, data, viz and explore: the commands that people
start with, in a folder that is thrown away. Called by `make release`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

PORT = "7997"


def base() -> None:
    """Imports every public name; attention, and a host whose outputs stay the same after attach and detach."""
    import timm
    import torch

    import sape2

    for name in sape2.__all__:
        getattr(sape2, name)
    attention = sape2.SaPEAttention(dim=48, num_heads=3, encoding="rope+sape2", grid=(4, 6))
    assert attention(torch.randn(2, 24, 48), grid=(4, 6)).shape == (2, 24, 48)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=64).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = vit(images)
        sape2.attach(vit, "sape2:readout=direct")
        torch.testing.assert_close(vit(images), before, rtol=1e-4, atol=1e-5)
        sape2.detach(vit)
        assert vit(images).equal(before)


def extras() -> None:
    """Trains on the digits, measures, explains one image, and opens the page of the model that comes with the package."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Image.effect_noise((40, 30), 60).convert("RGB").save(folder / "photo.png")
        commands = (
            "train digits --epochs 1 --out run",
            "evaluate run --measures accuracy",
            "explain run photo.png --out photo.html",
        )
        for command in commands:
            subprocess.run([sys.executable, "-m", "sape2", *command.split()], cwd=folder, check=True)
        assert (folder / "photo.html").stat().st_size > 10_000
        page = subprocess.Popen([sys.executable, "-m", "sape2", "explore", "--port", PORT], cwd=folder)
        try:
            assert b"<html" in answer(f"http://127.0.0.1:{PORT}/")
        finally:
            page.terminate()


def answer(address: str, seconds: int = 120) -> bytes:
    """What a server that is still starting gives in the end."""
    for _ in range(seconds):
        try:
            return urllib.request.urlopen(address).read()
        except OSError:
            time.sleep(1)
    raise TimeoutError(f"{address} gave nothing in {seconds} s")


if __name__ == "__main__":
    {"base": base, "extras": extras}[sys.argv[1]]()
    print(f"{sys.argv[1]}: all right, Python {sys.version.split()[0]}")
