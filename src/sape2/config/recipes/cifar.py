"""CIFAR-10 and CIFAR-100, 32x32 in patches of 4, so an 8x8 grid. All need --data.

Expected accuracies are those of the source named in each recipe, not ours, until docs/results.md says otherwise.
"""

from __future__ import annotations

from dataclasses import replace

from sape2.config import AugmentConfig, DataConfig, RunConfig, TrainConfig, model_config
from sape2.config.recipes.imagenet import DEIT

CIFAR10 = DataConfig(name="cifar10", mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
CIFAR100 = DataConfig(name="cifar100", mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))


def cifar10() -> RunConfig:
    """vit_micro (192 wide, 9 deep, 12 heads, 2.7M parameters) by the recipe that is known to work.

    Command:  sape2 train cifar10 --data DIR --encoding ape
    Source:   aanna0701/SPT_LSA_ViT: 93.58 % with learned APE, best epoch on the test set; 300 passes over the images,
              class token, drop path 0.1 in every layer.
    Differs:  drop path grows linearly up to 0.1; a tenth of the training images is the validation set.
    """
    return RunConfig(
        recipe="cifar10",
        model=model_config("vit_micro", encoding="ape+sape2", drop_path=0.1),
        data=CIFAR10,
        augment=AugmentConfig(
            crop_padding=4, flip=True, policy="autoaugment", erase=0.25, mixup=1.0, cutmix=1.0, mix_probability=0.5
        ),
        train=TrainConfig(epochs=300, batch_size=128, lr=1e-3, min_lr=1e-5, warmup_epochs=30, weight_decay=0.05),
    )


def cifar100() -> RunConfig:
    """As `cifar10`; the same source reports 73.81 % with learned APE.

    Command:  sape2 train cifar100 --data DIR --encoding ape
    """
    config = cifar10()
    return replace(config, recipe="cifar100", model=replace(config.model, num_classes=100), data=CIFAR100)


def cifar10_paper() -> RunConfig:
    """ViT-Small (384/12/6) by the settings of the SaPE2 paper and of the development repository behind it.

    Command:  sape2 train cifar10_paper --data DIR --encoding ape+sape2:num_positions=10
    Source:   arXiv:2505.09466, table 1: 93.98 % with SaPE2 + APE, 87.41 % with APE; no seeds, best epoch on the test set.
              400 epochs, batch 128 x 4, AdamW 5e-4 per 512, weight decay 0.05, cosine to 1e-5, 5 warm-up epochs, drop
              path 0.1, mixup 0.8, cutmix 1, smoothing 0.1, RandAugment 9, erasing 0.25, three repeats, fp16 there.
    Differs:  RandAugment is torchvision's (magnitude 27 of 30 for 9 of 10; timm applies each operation with
              probability 1/2), a tenth of the training images is the validation set, the precision is the machine's.
    Time:     not measured; made for a GPU.
    """
    return RunConfig(
        recipe="cifar10_paper",
        model=model_config("vit_small", encoding="ape+sape2:num_positions=10", drop_path=0.1),
        data=CIFAR10,
        augment=replace(DEIT, crop_padding=4),
        train=TrainConfig(epochs=400, batch_size=512, lr=5e-4, min_lr=1e-5, warmup_epochs=5, weight_decay=0.05, workers=4),
    )


def cifar100_paper() -> RunConfig:
    """As `cifar10_paper`; the paper reports 72.23 % with SaPE2 + APE and 66.54 % with APE.

    Command:  sape2 train cifar100_paper --data DIR --encoding ape+sape2:num_positions=10
    """
    config = cifar10_paper()
    return replace(config, recipe="cifar100_paper", model=replace(config.model, num_classes=100), data=CIFAR100)


def cifar10_budget() -> RunConfig:
    """vit_nano (0.46M parameters) for machines without a GPU: few epochs, so light augmentation and a higher rate.

    Command:  sape2 train cifar10_budget --data DIR --encoding ape
    """
    return RunConfig(
        recipe="cifar10_budget",
        model=model_config("vit_nano", encoding="ape+sape2", pool="mean"),
        data=CIFAR10,
        augment=AugmentConfig(crop_padding=4, flip=True),
        train=TrainConfig(epochs=30, batch_size=128, lr=2e-3, min_lr=1e-5, warmup_epochs=3, weight_decay=0.05),
    )


def cifar10_short() -> RunConfig:
    """`cifar10_budget` in two epochs: what a comparison of many encodings with seeds can afford on two CPU cores.

    Command:  sape2 train cifar10_short --data DIR --encoding ape
    Scaled:   all training images once more rather than few of them often; half the batch, so 1,406 updates; the
              warm-up keeps its tenth of the schedule. Everything else is `cifar10_budget`'s.
    """
    config = cifar10_budget()
    short = replace(config.train, epochs=2, batch_size=64, warmup_epochs=0.2)
    return replace(config, recipe="cifar10_short", train=short)


def cifar10_glance() -> RunConfig:
    """`cifar10_short` with a quarter of its images: for a study of dozens of encodings with seeds on two CPU cores.

    Command:  sape2 compare cifar10_glance --data DIR --encodings ape,rope,ape+sape2 --seeds 3
    Scaled:   half of the training images (as many of each class, the same for all seeds), once; half the batch, so 703
              updates, half as many as `cifar10_short`. The warm-up keeps its tenth. Everything else is `cifar10_budget`'s.
    """
    config = cifar10_short()
    glance = replace(config.train, epochs=1, batch_size=32, warmup_epochs=0.1)
    return replace(config, recipe="cifar10_glance", data=replace(CIFAR10, train_limit=22_500), train=glance)


def cifar10_sprint() -> RunConfig:
    """vit_nano under Muon with Nesterov momentum: a whole training in minutes on two CPU cores.

    Command:  sape2 train cifar10_sprint --data DIR --encoding ape
    Source:   ours; searched on the validation split (docs/decisions/0011-sprint.md). Muon for the matrices of the blocks,
              NAdamW for the rest, a linear decay to 0, crop and flip.
    Expect:   0.825 on the test set with `ape` after the last epoch (seed 0, run twice: 0.8254 and 0.8247).
    Time:     11.1 min of training steps on two cores of an AMD EPYC with bf16, `ape`, alone on the machine.
    """
    return RunConfig(
        recipe="cifar10_sprint",
        model=model_config("vit_nano", encoding="ape+sape2", pool="mean"),
        data=CIFAR10,
        augment=AugmentConfig(crop_padding=4, flip=True),
        train=TrainConfig(
            optimizer="nmuon",
            epochs=12,
            batch_size=128,
            lr=2e-3,
            muon_lr=0.01,
            muon_momentum=0.95,
            betas=(0.9, 0.95),
            schedule="linear",
            min_lr=0.0,
            warmup_epochs=1.2,
            weight_decay=0.05,
            label_smoothing=0.1,
        ),
    )


def cifar100_sprint() -> RunConfig:
    """`cifar10_sprint` for CIFAR-100: the same settings, not searched again.

    Command:  sape2 train cifar100_sprint --data DIR --encoding ape
    """
    config = cifar10_sprint()
    return replace(config, recipe="cifar100_sprint", model=replace(config.model, num_classes=100), data=CIFAR100)


def cifar10_sprint_micro() -> RunConfig:
    """`cifar10_sprint` with vit_micro (2.7M parameters) and a hundred epochs, for machines with a GPU.

    Command:  sape2 train cifar10_sprint_micro --data DIR --encoding ape
    Differs:  AutoAugment and drop path 0.1, as in `cifar10`, for the length; warm-up keeps its tenth.
    Time:     not measured; made for a GPU.
    """
    config = cifar10_sprint()
    return replace(
        config,
        recipe="cifar10_sprint_micro",
        model=model_config("vit_micro", encoding="ape+sape2", pool="mean", drop_path=0.1),
        augment=replace(config.augment, policy="autoaugment"),
        train=replace(config.train, epochs=100, warmup_epochs=10),
    )
