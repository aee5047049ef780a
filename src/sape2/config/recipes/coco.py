"""Detection with Faster R-CNN or Mask R-CNN on a windowed ViT, for `sape2 detect`."""

from __future__ import annotations

from sape2.config import model_config
from sape2.config.detection import DetectionConfig, DetectorConfig, ImagesConfig, TrainingConfig


def coco() -> DetectionConfig:
    """Mask R-CNN on ViT-B at 1024x1024 by the schedule of ViTDet; made for GPUs.

    Command:  sape2 detect coco --data DIR --encoding ape
              (another size: --model vit_small)
    Source:   arXiv:2203.16527 and its configs in detectron2: patch 16, windows of 14, 4 global blocks, AdamW 1e-4, batch
              64, 100 epochs, weight decay 0.1, drop path 0.1, a tenth of the rate at 8/9 and at 26/27, 250 warm-up
              updates, scale jitter 0.1 to 2, flips.
    Differs:  from scratch, without the MAE weights and the layer-wise decay of the rate that go with them; gradients
              clipped at 1; windows are not padded; the heads are torchvision's.
    Time:     not measured; no accuracy is claimed.
    """
    return DetectionConfig(
        recipe="coco",
        model=model_config(
            "vit_base",
            encoding="ape+sape2:readout=squared_distance",
            image_size=1024,
            patch_size=16,
            num_classes=80,
            pool="mean",
            drop_path=0.1,
            gradient_checkpointing=True,
        ),
        detector=DetectorConfig(masks=True, window=14, num_global=4),
        images=ImagesConfig(name="coco", scale_jitter=(0.1, 2.0)),
        training=TrainingConfig(schedule="steps", clip_grad=1.0, workers=8),
    )


def coco_digits() -> DetectionConfig:
    """Handwritten digits on photographs, images up to 96x96 of three shapes, composed when first needed; for a CPU.

    Command:  sape2 detect coco_digits --encoding ape+sape2
    Design:   ours. Patches of 8, so grids of 12x12, 8x12 and 12x8 in windows of 6; strides 4, 8 and 16. No flips: a
              mirrored digit is none. Few proposals of an image reach the heads, which is where a CPU spends its time.
    Time:     measured for 4 of the 24 epochs: 8 minutes of one core of an AMD EPYC, box mAP 0.35 (docs/detection.md).
    """
    return DetectionConfig(
        recipe="coco_digits",
        model=model_config(
            "vit_nano", encoding="ape+sape2", image_size=96, patch_size=8, num_classes=10, pool="mean"
        ),
        detector=DetectorConfig(
            window=6,
            num_global=2,
            scales=(2.0, 1.0, 0.5),
            extra_level=False,
            out_channels=64,
            anchor_sizes=(20, 28, 40),
            proposals=200,
            box_samples=32,
            box_features=256,
            mask_channels=64,
        ),
        images=ImagesConfig(name="coco_digits", train_images=1000, test_images=200, flip=False),
        training=TrainingConfig(
            epochs=24, batch_size=8, lr=1e-3, min_lr=1e-5, warmup_steps=100, weight_decay=0.05, clip_grad=1.0, precision="fp32",
            workers=0,
        ),
    )  # fmt: skip


DETECTION_RECIPES = {"coco": coco, "coco_digits": coco_digits}
