"""What a step of training sees: the order of a run, its batches, augmentation, mixed images and targets."""

import random

import numpy as np
import plain_augmentation
import pytest
import torch
from image_cases import synthetic

from sape2.config import AugmentConfig, TrainConfig
from sape2.data import ImageData, normalize
from sape2.data.augment import TrainStream, epoch_order, share_of
from sape2.data.mixing import BatchMixer

POLICIES = ["randaugment", "autoaugment"]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- the order of a run ----------------------------------------------------------------------------------------------


def stream_of(data=None, augment=None, seed=0, rank=0, world=1, **train):
    train = TrainConfig(**{"epochs": 3, "warmup_epochs": 0, "batch_size": 4, "workers": 0} | train)
    return TrainStream(data or synthetic(), augment or AugmentConfig(), train, seed, rank, world)


HEAVY = AugmentConfig(crop_padding=1, flip=True, policy="randaugment", policy_group=2)


def test_a_step_gives_the_same_batch_however_it_is_reached():
    in_order = list(stream_of(augment=HEAVY).batches(0))
    assert len(in_order) == 15
    assert all(same(stream_of(augment=HEAVY)[step], batch) for step, batch in enumerate(in_order))
    assert all(same(got, batch) for got, batch in zip(stream_of(augment=HEAVY).batches(7), in_order[7:], strict=True))
    backwards = stream_of(augment=HEAVY)
    assert all(same(backwards[step], in_order[step]) for step in reversed(range(15)))


def test_workers_do_not_change_the_batches():
    alone = list(stream_of(augment=HEAVY, workers=0).batches(2))
    one = list(stream_of(augment=HEAVY, workers=1).batches(2))
    assert len(one) == 13
    assert all(same(a, b) for a, b in zip(alone, one, strict=True))


def test_the_run_seed_changes_the_order_and_the_augmentation():
    crops = AugmentConfig(crop_padding=2)
    assert not torch.equal(epoch_order(50, seed=0, epoch=0), epoch_order(50, seed=1, epoch=0))
    one_image = synthetic(1).images.repeat(8, 1, 1, 1)
    first, second = (plain_augmentation.ours(one_image, crops, seed) for seed in (0, 1))
    assert not torch.equal(first, second)


def test_every_step_is_augmented_anew():
    one_image = ImageData(
        synthetic(1).images.repeat(8, 1, 1, 1), torch.zeros(8, dtype=torch.long), ("cat",), (0.5,) * 3, (0.2,) * 3
    )
    stream = stream_of(one_image, AugmentConfig(crop_padding=2))
    assert len({stream[step][0].numpy().tobytes() for step in range(6)}) == 6  # two batches in each of three epochs


def test_epochs_have_different_orders_and_each_image_once():
    orders = [epoch_order(50, seed=0, epoch=epoch) for epoch in range(3)]
    assert all(order.sort().values.tolist() == list(range(50)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 3


def test_the_last_incomplete_batch_is_dropped():
    stream = stream_of(synthetic(23))
    assert (stream.steps_per_epoch, stream.total_steps) == (5, 15)
    for epoch in range(3):
        seen = [image.numpy().tobytes() for step in range(5) for image in stream[5 * epoch + step][0]]
        assert len(set(seen)) == 20


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_a_batch_between_them(world):
    whole = stream_of(augment=HEAVY)
    for step in (0, 6):
        images, labels = whole[step]
        parts = [stream_of(augment=HEAVY, rank=rank, world=world)[step] for rank in range(world)]
        places = torch.cat([share_of(4, rank, world) for rank in range(world)])
        assert [len(part[1]) for part in parts] == [4 // world] * world
        assert torch.equal(torch.cat([part[0] for part in parts])[places.argsort()], images)
        assert torch.equal(torch.cat([part[1] for part in parts])[places.argsort()], labels)


def test_repeats_show_fewer_images_more_often_in_an_epoch_of_unchanged_length():
    order = epoch_order(23, seed=0, epoch=0, repeats=3)
    assert len(order) == 23
    assert order.unique(return_counts=True)[1].tolist().count(3) == 7  # 23 = 7 x 3 + 2
    assert len(order.unique()) == 8
    assert stream_of(augment=AugmentConfig(repeats=3)).steps_per_epoch == 5


def test_labels_stay_with_their_images():
    data = synthetic()
    label_of = {image.numpy().tobytes(): int(label) for image, label in zip(data.images, data.labels, strict=True)}
    for images, labels in stream_of(data).batches(0):
        assert [label_of[image.numpy().tobytes()] for image in images] == labels.tolist()


def test_a_batch_larger_than_the_training_set_is_refused():
    with pytest.raises(ValueError, match=r"24 .*23"):
        stream_of(synthetic(23), batch_size=24)


def test_a_batch_that_the_processes_cannot_share_is_refused():
    with pytest.raises(ValueError, match="4, 3 and 1"):
        stream_of(world=3)
    with pytest.raises(ValueError, match="4 / 4"):
        stream_of(augment=AugmentConfig(mixup=0.5), world=4)


# --- augmentation ----------------------------------------------------------------------------------------------------


def test_normalize_is_the_formula():
    images = torch.arange(256, dtype=torch.uint8).view(2, 2, 8, 8)
    mean, std = (0.5, 0.1), (0.25, 0.3)
    expected = (images.double() / 255 - torch.tensor(mean).double()[:, None, None]) / torch.tensor(std).double()[:, None, None]
    got = normalize(images, mean, std)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected.float(), rtol=0, atol=5e-7)  # values up to 4: two roundings in float32


def test_batches_of_image_data_are_normalised_and_in_order():
    data = synthetic()
    batches = list(data.batches(10))
    assert [len(labels) for _, labels in batches] == [10, 10, 3]
    assert torch.equal(torch.cat([images for images, _ in batches]), normalize(data.images, data.mean, data.std))
    assert torch.equal(torch.cat([labels for _, labels in batches]), data.labels)


def shifted(image, down, right):
    """out[y, x] = image[y + down, x + right], zeros outside, as a literal loop."""
    result = torch.zeros_like(image)
    _, height, width = image.shape
    for y in range(height):
        for x in range(width):
            if 0 <= y + down < height and 0 <= x + right < width:
                result[:, y, x] = image[:, y + down, x + right]
    return result


def test_random_crop_shifts_every_image_by_a_shift_of_its_own():
    images, padding = synthetic(120, shape=(2, 4, 5)).images, 1
    cropped = plain_augmentation.ours(images, AugmentConfig(crop_padding=padding), seed=0)
    moves = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    found = [[move for move in moves if torch.equal(shifted(a, *move), b)] for a, b in zip(images, cropped, strict=True)]
    assert all(len(fits) == 1 for fits in found)  # each is one of the nine shifts, and one only
    counts = [sum(fits == [move] for fits in found) for move in moves]
    assert min(counts) >= 3  # expected 13 of 120 each, standard deviation 3.4


def test_half_of_the_images_are_flipped():
    images = torch.tensor([0, 255], dtype=torch.uint8).expand(2000, 1, 1, 2).contiguous()
    got = plain_augmentation.ours(images, AugmentConfig(flip=True), seed=0)
    flipped = got[:, 0, 0, 0] == 255
    assert torch.equal(got[flipped], images[flipped].flip(-1))
    assert torch.equal(got[~flipped], images[~flipped])
    assert abs(int(flipped.sum()) - 1000) < 4 * 22.4  # four standard deviations


def test_no_augmentation_is_the_image_itself():
    images = synthetic().images
    assert torch.equal(plain_augmentation.ours(images, AugmentConfig(), seed=0), images)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 6, 10)])
def test_policies_keep_shape_and_type_and_follow_from_the_seed(policy, shape):
    images = synthetic(16, shape=shape).images
    config = AugmentConfig(policy=policy, policy_group=4)
    first, again, other = (plain_augmentation.ours(images, config, seed) for seed in (0, 0, 1))
    assert (first.shape, first.dtype) == (images.shape, torch.uint8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, images)


@pytest.mark.parametrize("policy", POLICIES)
def test_augmentation_neither_reads_nor_moves_the_global_generators(policy):
    images = synthetic(8, shape=(3, 8, 8)).images
    config = AugmentConfig(crop_padding=1, flip=True, policy=policy)
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002 - as above
    first = plain_augmentation.ours(images, config, seed=0)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]  # noqa: NPY002
    torch.manual_seed(123)
    assert torch.equal(plain_augmentation.ours(images, config, seed=0), first)


def test_a_group_shares_one_draw_of_the_policy():
    one = synthetic(1, shape=(3, 8, 8)).images.repeat(32, 1, 1, 1)
    kinds = {}
    for group in (1, 8, 32):
        got = plain_augmentation.ours(one, AugmentConfig(policy="autoaugment", policy_group=group), seed=0).split(group)
        assert all(torch.equal(part, part[:1].expand_as(part)) for part in got)
        kinds[group] = len({part.numpy().tobytes() for part in got})
    assert kinds[32] == 1
    assert kinds[8] > 1
    assert kinds[1] > kinds[8]


# --- mixing ----------------------------------------------------------------------------------------------------------


def batch(size=8, classes=10):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.arange(size) % classes


def seeded_mix(config, smoothing, images, labels, seed=0, classes=10):
    np.random.seed(seed)  # noqa: NPY002 - timm draws from the global generators
    random.seed(seed)
    torch.manual_seed(seed)
    return BatchMixer(config, smoothing, classes)(images.clone(), labels)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_targets_are_smoothed_exactly(smoothing):
    images, labels = batch()
    got, targets = seeded_mix(AugmentConfig(), smoothing, images, labels)
    expected = torch.full((8, 10), smoothing / 10)
    expected[torch.arange(8), labels] += 1 - smoothing
    assert torch.equal(got, images)
    torch.testing.assert_close(targets, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("mix", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0, "erase": 0.5}])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_targets_sum_to_one(mix, smoothing):
    images, labels = batch()
    mixed = 0
    for seed in range(10):
        got, targets = seeded_mix(AugmentConfig(**mix), smoothing, images, labels, seed)
        assert got.shape == images.shape
        torch.testing.assert_close(targets.sum(1), torch.ones(8), rtol=0, atol=1e-6)
        assert targets.min() >= smoothing / 10 - 1e-7
        mixed += targets.max() < 1 - smoothing
    assert mixed >= 1


def test_mixup_mixes_images_as_it_mixes_targets():
    images, labels = batch()
    got, targets = seeded_mix(AugmentConfig(mixup=0.8), 0.1, images, labels)
    share = (targets[0, labels[0]] - 0.01) / 0.9  # of an image; the rest is its mirror image in the batch
    assert 0 < share < 1
    torch.testing.assert_close(got, share * images + (1 - share) * images.flip(0), rtol=0, atol=1e-5)


def test_cutmix_takes_every_pixel_from_one_of_two_images():
    images, labels = batch()
    got, targets = seeded_mix(AugmentConfig(cutmix=1.0), 0.0, images, labels)
    own = (got == images).all(1)
    assert torch.equal(own | (got == images.flip(0)).all(1), torch.ones_like(own))
    torch.testing.assert_close(targets[torch.arange(8), labels], own.float().mean((1, 2)))


def test_erasing_changes_that_share_of_the_images_and_no_target():
    images, labels = batch(400)
    got, targets = seeded_mix(AugmentConfig(erase=0.25), 0.0, images, labels)
    changed = (got != images).flatten(1).any(1).sum()
    assert abs(int(changed) - 100) < 4 * 8.7  # four standard deviations
    assert torch.equal(targets.argmax(1), labels)
