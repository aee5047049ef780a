"""Recipes for a folder of your own images. `sape2.data.own` fills in the settings that depend on the images."""

from __future__ import annotations

from sape2.config import AugmentConfig, DataConfig, RunConfig, TrainConfig, model_config


def images() -> RunConfig:
    """vit_nano for a folder of one's own: classes, sizes, normalisation, splits and batch follow from the images.

    Command:  sape2 train images --data DIR     (DIR/CLASS/*.jpg, DIR/train/CLASS/*.jpg, parquet or shards)
    Design:   ours. What is filled in is printed, and kept in config.json; `--set` changes it. Mirrored images are taken
              for images of the same class: --set augment.flip=false where they are not.
    Time:     depends on the folder; --dry-run tells it.
    """
    return RunConfig(
        recipe="images",
        model=model_config("vit_nano", encoding="ape+sape2", pool="mean"),
        data=DataConfig(name="images"),
        augment=AugmentConfig(crop_padding=4, flip=True),
        train=TrainConfig(epochs=60, batch_size=32, lr=1e-3, min_lr=1e-5, warmup_epochs=6, weight_decay=0.05, workers=0),
    )
