"""ImageNet-1k, 224x224 in patches of 16, so a 14x14 grid. All need --data: an image folder, parquet, or webdataset shards.

Expected accuracies are those of the source named in each recipe, not ours, until docs/results.md says otherwise. Images
stay in their files and are decoded as they are needed; docs/data.md says how fast that is and what bounds it.
"""

from __future__ import annotations

from dataclasses import replace

from sape2.config import AugmentConfig, DataConfig, RunConfig, TrainConfig, model_config, resized

IMAGENET = DataConfig(
    name="imagenet",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    validation_fraction=0.01,
    in_memory=False,
    center_crop=0.875,
)
# The augmentation of DeiT, apart from how it cuts its boxes.
DEIT = AugmentConfig(
    flip=True, policy="randaugment", policy_magnitude=27, policy_group=1, erase=0.25, mixup=0.8, cutmix=1.0, repeats=3
)


def imagenet() -> RunConfig:
    """ViT-S/16 (22M parameters) by the recipe of DeiT.

    Command:  sape2 train imagenet --data DIR --encoding ape
    Source:   arXiv:2012.12877, table 9, and facebookresearch/deit: DeiT-small 79.9 % with learned APE, last epoch; 300 epochs,
              batch 1024, AdamW 5e-4 per 512, weight decay 0.05, cosine to 1e-5, 5 warm-up epochs, drop path 0.1, mixup 0.8,
              cutmix 1, smoothing 0.1, RandAugment 9, erasing 0.25, three repeats, boxes of 8 to 100 % of the area.
    Differs:  RandAugment is torchvision's (magnitude 27 of 30 for 9 of 10; timm varies the magnitude and applies each
              operation with probability 1/2), erased areas reach 0.4 of the image (1/3 there), warm-up starts at 1e-5
              (1e-6 there), one training image in a hundred is the validation set, the precision is the machine's.
    Time:     not measured; made for several GPUs.
    """
    return RunConfig(
        recipe="imagenet",
        model=model_config("vit_small", image_size=224, patch_size=16, num_classes=1000, encoding="ape+sape2", drop_path=0.1),
        data=IMAGENET,
        augment=replace(DEIT, crop_area=0.08),
        train=TrainConfig(epochs=300, batch_size=1024, lr=1e-3, min_lr=1e-5, warmup_epochs=5, weight_decay=0.05, workers=8),
    )


def imagenet_base() -> RunConfig:
    """ViT-B/16 (86M parameters), as `imagenet`; the same source reports 81.8 % with learned APE.

    Command:  sape2 train imagenet_base --data DIR --encoding ape
    """
    config = imagenet()
    return replace(config, recipe="imagenet_base", model=resized(config.model, "vit_base"))


def imagenet_plain() -> RunConfig:
    """ViT-S/16 by the plain recipe of big_vision: 90 epochs, no repeats, no drop path, mean of the tokens.

    Command:  sape2 train imagenet_plain --data DIR --encoding sincos     (--epochs 300 for its long form)
    Source:   arXiv:2205.01580 and big_vision/configs/vit_s16_i1k.py: 76.5 % in 90 epochs, about 80 % in 300, with fixed
              sin-cos positions; batch 1024, Adam 1e-3, weight decay 1e-4 per step of full rate (0.1 times the rate here),
              10,000 warm-up steps (8 epochs), gradients clipped at 1, mixup 0.2, RandAugment 10, boxes of 5 to 100 %.
    Differs:  RandAugment is torchvision's (magnitude 30 of 30 for 10 of 10), the rate falls to 1e-5 (0 there), norms, biases
              and encodings do not decay (all weights there), --epochs changes the warm-up in proportion (fixed there).
    Time:     not measured; made for several GPUs.
    """
    return RunConfig(
        recipe="imagenet_plain",
        model=model_config("vit_small", image_size=224, patch_size=16, num_classes=1000, encoding="sincos+sape2", pool="mean"),
        data=replace(IMAGENET, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        augment=AugmentConfig(crop_area=0.05, flip=True, policy="randaugment", policy_magnitude=30, policy_group=1, mixup=0.2),
        train=TrainConfig(
            epochs=90,
            batch_size=1024,
            lr=1e-3,
            min_lr=1e-5,
            warmup_epochs=8,
            weight_decay=0.1,
            label_smoothing=0.0,
            clip_grad=1.0,
            workers=8,
        ),
    )
