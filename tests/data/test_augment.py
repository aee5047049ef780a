"""Augmentation: the images of torchvision and timm, group by group and image by image, in one pass on any device."""

import random
from dataclasses import replace

import numpy as np
import plain_augmentation
import pytest
import torch
from device_cases import DEVICES, Waits, no_waits
from image_cases import synthetic
from torchvision.transforms import v2

from sape2.config import AugmentConfig, TrainConfig
from sape2.config.recipes import RECIPES, get_recipe
from sape2.data import augment as module
from sape2.data import images as kept
from sape2.data.augment import Plans, TrainStream, augment, draw, share_of
from sape2.data.mixing import BatchMixer, erase_areas
from sape2.data.policies import make_policy

AUGMENTS = {name: replace(get_recipe(name).augment, crop_area=None) for name in RECIPES}
HEAVY = AugmentConfig(crop_padding=2, flip=True, policy="randaugment", policy_magnitude=27, policy_group=1)


def stream_on(device, augment=HEAVY, **train):
    data = synthetic(40, shape=(3, 8, 8))
    data = replace(data, images=data.images.to(device), labels=data.labels.to(device))
    return TrainStream(data, augment, TrainConfig(epochs=2, warmup_epochs=0, batch_size=8, **{"workers": 0} | train), seed=0)


def seeded():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - timm draws from the global generators
    torch.manual_seed(0)


# --- the same images as by the libraries one by one ------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_gives_the_images_of_the_plain_form(name):
    """Pixel for pixel, so runs of earlier versions see the same images."""
    channels, (height, width) = get_recipe(name).model.in_channels, (16, 12)
    images = synthetic(48, shape=(channels, height, width)).images
    for seed in range(3):
        expected = plain_augmentation.augment_images(images, AUGMENTS[name], seed)
        assert torch.equal(plain_augmentation.ours(images, AUGMENTS[name], seed), expected)


@pytest.mark.parametrize("policy", ["randaugment", "autoaugment"])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 6, 10)])
def test_policies_give_what_torchvision_gives_group_by_group(policy, group, shape):
    images = synthetic(50, shape=shape).images
    config = AugmentConfig(policy=policy, policy_group=group, policy_magnitude=20)
    got, expected = plain_augmentation.ours(images, config, 3), plain_augmentation.augment_images(images, config, 3)
    assert torch.equal(got, expected)
    assert not torch.equal(got, images)


@pytest.mark.parametrize("policy", ["randaugment", "autoaugment"])
def test_every_operation_of_a_policy_does_the_same_to_many_images_as_to_one(policy):
    made = make_policy(AugmentConfig(policy=policy))
    settings = {"interpolation": made.interpolation, "fill": made._fill}
    images = synthetic(20, shape=(3, 9, 7)).images
    images[::4] = images[::4] // 4 + 17  # of little contrast
    for name, (magnitudes, signed) in made._AUGMENTATION_SPACE.items():
        bins = magnitudes(31, 9, 7)
        for magnitude in [0.0] if bins is None else [float(bins[27]), *[-float(bins[27])] * signed]:
            one, all_ = (
                torch.cat(
                    [made._apply_image_or_video_transform(part, name, magnitude, **settings) for part in images.split(size)]
                )
                for size in (1, 20)
            )
            assert torch.equal(one, all_), name


def test_an_operation_on_the_wrong_images_would_be_seen(monkeypatch):
    images = synthetic(24, shape=(3, 8, 8)).images
    right = module.do_rounds
    monkeypatch.setattr(
        module, "do_rounds", lambda images, rounds: right(images, [r._replace(order=r.order.roll(1)) for r in rounds])
    )
    assert not torch.equal(plain_augmentation.ours(images, HEAVY, 0), plain_augmentation.augment_images(images, HEAVY, 0))


@pytest.mark.parametrize("probability", [0.25, 1.0])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 6, 10), (3, 32, 32)])
def test_erased_areas_are_those_of_timm_image_by_image(probability, shape):
    images = torch.randn(30, *shape)
    seeded()
    expected = plain_augmentation.erase(images.clone(), probability)
    after = torch.rand(3), random.random()
    seeded()
    mixer = BatchMixer(AugmentConfig(erase=probability), 0.0, 10)
    got, _ = mixer(images.clone(), torch.arange(30) % 10)
    assert torch.equal(got, expected)
    assert not torch.equal(got, images)
    assert torch.equal(torch.rand(3), after[0])  # dropout draws on from there
    assert random.random() == after[1]


def test_a_share_of_a_batch_is_erased_as_in_the_batch():
    images, share = torch.randn(16, 3, 8, 8), share_of(16, 1, 2)
    mixer = BatchMixer(AugmentConfig(erase=1.0), 0.0, 10)
    parts = []
    for places in (torch.arange(16), share):
        seeded()
        part = images[places].clone()
        erase_areas(mixer.erase, part, places, 16)
        parts.append(part)
    assert torch.equal(parts[0][share], parts[1])


# --- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", ["none", "randaugment", "autoaugment"])
def test_a_device_sees_the_images_that_the_cpu_sees(device, policy):
    config = replace(HEAVY, policy=policy)
    there, here = stream_on(device, config), stream_on("cpu", config)
    for step in range(10):
        (images, labels), (expected, numbers) = there[step], here[step]
        assert labels.tolist() == numbers.tolist()
        differ = (images.cpu() != expected).float().mean()
        assert differ <= (0 if device == "cpu" or policy == "none" else 1e-3)  # a pixel at an edge of rounding


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_mixes_and_erases_what_the_cpu_mixes_and_erases(device):
    config = AugmentConfig(mixup=0.8, cutmix=1.0, erase=0.5)
    images, labels = torch.randn(16, 3, 8, 8), torch.arange(16) % 10
    seeded()
    expected = BatchMixer(config, 0.1, 10)(images.clone(), labels)
    seeded()
    got = BatchMixer(config, 0.1, 10)(images.clone().to(device), labels.to(device))
    for there, here in zip(got, expected, strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-6)


def test_images_that_a_device_keeps_are_augmented_there_from_plans_of_workers(monkeypatch):
    """The CPU stands for the device."""
    expected = list(stream_on("cpu").batches(3))
    monkeypatch.setattr(TrainStream, "device", property(lambda stream: torch.device("meta")))
    monkeypatch.setattr(module.Plan, "sent", lambda plan, device: plan)
    for workers in (0, 1):
        got = list(stream_on("cpu", workers=workers).batches(3))
        assert len(got) == 7
        assert all(torch.equal(a, b) for one, other in zip(got, expected, strict=True) for a, b in zip(one, other, strict=True))


def test_plans_hold_no_pixels():
    """So that workers need not have what a device keeps."""
    plans = stream_on("cpu").plans
    assert not [value for value in vars(plans).values() if isinstance(value, torch.Tensor) and value.dtype == torch.uint8]
    assert [type(value) for value in vars(plans).values() if not isinstance(value, (int, tuple))] == [
        AugmentConfig, TrainConfig, torch.Tensor, torch.Tensor,
    ]  # fmt: skip


def test_images_stay_on_the_cpu_unless_a_device_has_room(monkeypatch):
    data, room = synthetic(), {"bytes": 0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (room["bytes"], 10**9))
    moved = []
    monkeypatch.setattr(kept, "replace", lambda data, **changes: moved.append(sorted(changes)))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)
    assert data.kept_on(torch.device("cpu")) is data
    assert data.kept_on(torch.device("cuda")) is data
    room["bytes"] = 4 * data.images.nbytes
    data.kept_on(torch.device("cuda"))
    assert moved == [["images", "labels"]]


def test_where_images_are_augmented_is_said():
    assert stream_on("cpu").where_augmented() == "cpu, in the training process"
    assert stream_on("cpu", workers=2).where_augmented() == "cpu, in 2 data workers"
    assert stream_on("meta").where_augmented() == "meta, which keeps the images"


@pytest.mark.parametrize("policy", ["none", "randaugment", "autoaugment"])
def test_augmentation_on_a_device_waits_for_nothing(policy):
    stream = stream_on("meta", replace(HEAVY, policy=policy))
    with no_waits(torch.device("meta")):
        for step in range(10):
            images, labels = stream[step]
            assert (images.device.type, images.shape, images.dtype) == ("meta", (8, 3, 8, 8), torch.uint8)
            assert labels.shape == (8,)


def test_mixing_on_a_device_waits_for_nothing():
    config = AugmentConfig(mixup=0.8, cutmix=1.0, erase=0.5)
    with no_waits(torch.device("meta")):
        BatchMixer(config, 0.1, 10)(torch.empty(16, 3, 8, 8, device="meta"), torch.empty(16, dtype=torch.long, device="meta"))


@pytest.mark.parametrize(
    "wait",
    [
        lambda: torch.tensor([1.0], device="meta"),
        lambda: torch.ones(2).to("meta"),
        lambda: torch.empty(2, device="meta").copy_(torch.ones(2)),
        lambda: torch.empty((), device="meta").item(),
        lambda: torch.empty(2, device="meta").nonzero(),
        lambda: v2.functional.rotate(torch.empty(1, 3, 4, 4, dtype=torch.uint8, device="meta"), 20.0),
    ],
)  # fmt: skip
def test_what_waits_for_a_device_would_be_seen(wait):
    with pytest.raises((Waits, RuntimeError, NotImplementedError)), no_waits(torch.device("meta")):
        wait()


# --- draws -----------------------------------------------------------------------------------------------------------


def test_draws_of_a_share_are_those_of_the_batch():
    images = synthetic(16, shape=(3, 8, 8)).images
    whole = plain_augmentation.ours(images, HEAVY, 5)
    for rank in range(4):
        places = share_of(16, rank, 4)
        assert torch.equal(augment(images[places], draw(HEAVY, 5, places, 16, (3, 8, 8))), whole[places])


def test_boxes_draw_seeds_only_where_boxes_are_cut():
    train = TrainConfig(epochs=1, warmup_epochs=0, batch_size=4)
    assert Plans(8, (3, 8, 8), AugmentConfig(), train, 0, 0, 1)[1].seeds == []
    assert len(set(Plans(8, (3, 8, 8), AugmentConfig(crop_area=0.5), train, 0, 0, 1)[1].seeds)) == 4
