"""Detectors: what they are made of, one step, sizes that vary, resume, and the command."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from sape2.cli import main
from sape2.config import override
from sape2.config.detection import DetectionConfig, DetectorConfig
from sape2.config.recipes import get_detection_recipe, get_recipe
from sape2.config.recipes.coco import DETECTION_RECIPES
from sape2.data.pixels import RULE
from sape2.detection import compose, create_detector, run_detection
from sape2.detection.metrics import predict
from sape2.detection.splits import fingerprint, open_images
from sape2.detection.train import DetectionSteps, new_detector
from sape2.runs.rows import read_rows
from sape2.runs.run import Run

pytest.importorskip("faster_coco_eval")
TINY = [
    "model.dim=24", "model.depth=2", "model.num_heads=2", "num_global=1", "out_channels=16", "proposals=50", "box_features=32",
    "mask_channels=8", "train_images=7", "test_images=3", "epochs=2", "batch_size=3", "warmup_steps=1", "lr=2e-3",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(compose(tmp_path_factory.mktemp("data") / "digits", train_images=7, test_images=3))


@pytest.fixture
def tiny(data):
    def made(*assignments) -> DetectionConfig:
        config = get_detection_recipe("coco_digits")
        return override(replace(config, images=replace(config.images, source=data)), [*TINY, *assignments])

    return made


# --- the model -------------------------------------------------------------------------------------------------------


def small_detector(encoding="ape+sape2", **options):
    options = {"dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "num_global": 1, "window": 3} | options
    options |= {"out_channels": 16, "box_features": 32, "mask_channels": 8}
    return create_detector("vit_nano", encoding=encoding, image_size=64, num_classes=3, **options)


def test_every_parameter_gets_a_gradient_from_masks_of_all_levels():
    model = small_detector(masks=True, scales=(2.0, 1.0), extra_level=True).train()
    box = torch.tensor([[8.0, 8, 40, 56], [0, 0, 20, 20]])
    masks = torch.zeros(2, 64, 48, dtype=torch.uint8)
    masks[0, 8:56, 8:40] = masks[1, :20, :20] = 1
    losses = model([torch.rand(3, 64, 48)], [{"boxes": box, "labels": torch.tensor([1, 3]), "masks": masks}])
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    sum(losses.values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_detectors_of_one_seed_differ_in_their_encodings_only():
    def weights(encoding):
        torch.manual_seed(3)
        return small_detector(encoding).state_dict()

    plain, sape2 = weights("none"), weights("ape+sape2")
    assert set(sape2) > set(plain)
    assert all(torch.equal(plain[name], sape2[name]) for name in plain)


def test_encodings_norms_and_biases_do_not_decay(tiny):
    config = tiny("weight_decay=0.1")
    steps = DetectionSteps(new_detector(config), open_images(config)[0], config)
    names = dict(steps.weights.model.named_parameters())
    decays = {id(p): group["weight_decay"] for group in steps.optimizer.param_groups for p in group["params"]}
    assert len(decays) == len(names)
    assert decays[id(names["backbone.body.vit.patch_embed.proj.weight"])] == 0.1
    assert all(decays[id(p)] == 0 for name, p in names.items() if "encoding" in name or name.endswith("bias") or p.dim() == 1)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match=r"model\.windows"):
        small_detector(windows=3)
    with pytest.raises(ValueError, match=r"detector\.scales"):
        small_detector(scales=(4.0, 1.0))
    with pytest.raises(ValueError, match="5 levels"):
        DetectorConfig(anchor_sizes=(8, 16))


def test_an_image_is_seen_alike_alone_and_among_others_of_its_size():
    """What evaluation relies on, and why it does not mix sizes: padding is seen."""
    model = small_detector().eval()
    first, second, larger = torch.rand(3, 32, 64), torch.rand(3, 32, 64), torch.rand(3, 64, 64)

    def features(*images):
        return model.backbone(model.transform(list(images))[0].tensors)["0"][0]

    assert features(first).shape == (16, 16, 32)  # stride 2, nothing padded
    torch.testing.assert_close(features(first), features(first, second), rtol=0, atol=1e-5)
    mixed = features(first, larger)[:, : features(first).shape[1]]
    assert (mixed - features(first)).abs().max() > 1e-3


def test_predictions_of_every_image_in_batches_of_one_size(tiny):
    config = tiny("score_threshold=0.0", "masks=true", "batch_size=2")
    images, _ = open_images(config)
    assert len(set(images.sizes)) > 1
    seen, model = [], new_detector(config).train()
    model.roi_heads.eval()
    for batch, predictions, targets in predict(model, images, config):
        assert torch.is_grad_enabled()
        assert len({images.sizes[index] for index in batch}) == 1
        assert [target["image_id"] for target in targets] == [images.images[index]["id"] for index in batch]
        for row in predictions:
            assert row["masks"].shape == (len(row["boxes"]), *images.sizes[batch[0]])
            assert row["masks"].dtype == torch.bool
        seen += batch
    assert sorted(seen) == list(range(len(images)))
    assert (model.training, model.backbone.training, model.roi_heads.training) == (True, True, False)


# --- training --------------------------------------------------------------------------------------------------------


def losses_of(steps, samples, number):
    for _ in range(number):
        steps.take(samples)
        steps.progress.step += 1
    return [numbers["loss"] for _, numbers in steps.look()]


def test_a_few_steps_on_two_images_lower_the_loss(tiny):
    config = tiny("masks=true", "batch_size=2", "warmup_steps=0", "epochs=50")
    images, _ = open_images(config)
    steps = DetectionSteps(new_detector(config), images, config)
    alike = [i for i in range(len(images)) if images.sizes[i] == images.sizes[0]][:2]
    samples = [(image / 255, target) for image, target in (images[i] for i in alike)]
    found = losses_of(steps, samples, 12)
    assert sum(found[-3:]) < 0.9 * sum(found[:3])


def test_an_image_without_objects_can_be_learned_from(tiny):
    config = tiny("masks=true")
    images, _ = open_images(config)
    steps = DetectionSteps(new_detector(config), images, config)
    image, target = images[0]
    empty = {key: value[:0] for key, value in target.items() if key in ("boxes", "labels", "masks")}
    assert torch.isfinite(torch.tensor(losses_of(steps, [(image / 255, empty)], 2))).all()


def test_a_run_that_was_stopped_goes_on_exactly(tiny, tmp_path, monkeypatch):
    config = tiny("flip=true")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    rows = run_detection(config, whole, quiet=True)
    take = DetectionSteps.take

    def stop_at_the_last(self, batch):
        if self.progress.step == 3:
            raise KeyboardInterrupt
        take(self, batch)

    monkeypatch.setattr(DetectionSteps, "take", stop_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        run_detection(config, stopped, quiet=True)
    assert not (stopped / "model.safetensors").exists()
    monkeypatch.setattr(DetectionSteps, "take", take)
    assert run_detection(config, stopped, quiet=True) == rows
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, stopped))
    assert all(torch.equal(one[name], other[name]) for name in one)
    for key in ("epoch", "step", "lr", "loss", "loss_classifier"):
        first, second = ([row[key] for row in read_rows(folder / "metrics.jsonl")] for folder in (whole, stopped))
        assert first == second
    assert run_detection(config, whole, quiet=True) == rows  # finished: nothing is done again
    with pytest.raises(ValueError, match=r"differs in training\.lr"):
        run_detection(tiny("flip=true", "lr=1e-3"), whole)


def test_a_run_that_may_have_read_other_pixels_does_not_go_on(tiny, tmp_path):
    config = tiny()
    train, test = open_images(config)
    assert "reading_rule" not in fingerprint(config, train, test)  # our own images are plain
    published = replace(config, images=replace(config.images, name="coco"))
    seen = fingerprint(published, train, test)
    assert seen["reading_rule"] == RULE
    run = Run(tmp_path / "run", config)
    run.start(seen)
    run.check_images(seen)
    with pytest.raises(ValueError, match=rf"by rule {RULE}, now it is rule {RULE + 1}"):
        run.check_images(seen | {"reading_rule": RULE + 1})
    with pytest.raises(ValueError, match="saw other images: the number of its train images"):
        run.check_images(fingerprint(published, test, train))
    for images in (train, test):
        images.images = [entry | {"file_name": "photo.JPG"} for entry in images.images]
    assert "reading_rule" not in fingerprint(published, train, test)


def test_a_loss_that_is_not_finite_stops_the_run(tiny, tmp_path, monkeypatch):
    take = DetectionSteps.take
    monkeypatch.setattr(
        DetectionSteps, "take", lambda self, batch: take(self, [(image * float("nan"), target) for image, target in batch])
    )
    with pytest.raises(ValueError, match=r"loss is nan at step 0 .* no checkpoint yet.* training\.lr"):
        run_detection(tiny(), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "checkpoint").exists()


# --- recipes and the command -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DETECTION_RECIPES)
def test_every_recipe_makes_a_detector_and_survives_json(name):
    config = get_detection_recipe(name)
    assert config.recipe == name
    assert DetectionConfig.from_dict(json.loads(config.to_json())) == config
    assert "Command:" in DETECTION_RECIPES[name].__doc__
    if name == "coco_digits":
        assert sum(p.numel() for p in new_detector(config).parameters()) < 1.6e6


def test_the_command_trains_measures_and_prints_rows(tmp_path, capfd, data):
    sets = [part for assignment in TINY for part in ("--set", assignment)]
    command = ["detect", "coco_digits", "--data", data, "--encoding", "ape", "--masks", *sets, "--set", "epochs=1"]
    assert main([*command, "--out", str(tmp_path / "run"), "--json"]) == 0
    out, err = capfd.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert {"box_map", "box_map_50", "mask_map", "mask_mar_100"} <= {row["name"] for row in rows}
    assert all(row["encoding"] == "ape" and row["n"] == 3 and 0 <= row["value"] <= 1 for row in rows)
    assert rows == read_rows(tmp_path / "run" / "results.jsonl")
    assert "epoch 1/1" in err
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    assert "box_map_50" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["faster"], ["unknown detection recipe", "coco_digits"]),
        (["imagenet"], ["sape2 train imagenet"]),
        (["coco"], ["coco needs --data"]),
        (["coco", "--data", "nowhere"], ["no folder nowhere"]),
        (["coco", "--data", ""], ["--data is empty"]),
        (["coco_digits", "--set", "windw=3"], ["'windw'", "detector.window"]),
        (["coco_digits", "--set", "pool=class"], ["no prefix tokens"]),
        (["coco_digits", "--encoding", "sape3"], ["unknown encoding"]),
    ],
)
def test_mistakes_get_one_line(tmp_path, monkeypatch, capfd, argv, named):
    monkeypatch.chdir(tmp_path)
    assert main(["detect", *argv]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert all(text in err for text in named)


def test_a_folder_of_something_else_is_refused(tmp_path, tiny):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileNotFoundError, match=r"is not a run folder: it has no config\.json"):
        Run(tmp_path, tiny()).check_settings()
    Run(tmp_path, get_recipe("digits")).start()
    with pytest.raises(ValueError, match="holds a run of sape2 train, not one of sape2 detect"):
        Run(tmp_path, tiny()).check_settings()
