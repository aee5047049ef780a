"""The recipes for a quick start, on scikit-learn's digits."""

from __future__ import annotations

from sape2.config import AugmentConfig, DataConfig, RunConfig, TrainConfig, model_config


def digits() -> RunConfig:
    """1,797 grey 8x8 images in patches of 2, so a 4x4 grid. Seconds on a CPU.

    Command:  sape2 train digits
    """
    return RunConfig(
        recipe="digits",
        model=model_config("vit_nano", image_size=8, patch_size=2, in_channels=1, encoding="ape+sape2", pool="mean"),
        data=DataConfig(name="digits", mean=(0.305,), std=(0.376,)),
        augment=AugmentConfig(mixup=0.4),
        train=TrainConfig(epochs=60, batch_size=64, lr=1e-3, warmup_epochs=5, workers=0),
    )
