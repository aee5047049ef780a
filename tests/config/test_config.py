"""The config: JSON both ways, overrides, and errors that name the field and the value."""

import dataclasses
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sape2.config import (
    MODELS,
    AugmentConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    model_config,
    override,
    with_epochs,
)
from sape2.config.checks import hints, in_words
from sape2.config.detection import DetectorConfig, ImagesConfig, TrainingConfig
from sape2.config.recipes import RECIPES, get_recipe

SECTIONS = ("model", "data", "augment", "train")
fractions = st.floats(0, 1, exclude_max=True)
open_fractions = st.floats(0, 1, exclude_min=True, exclude_max=True)
positive = st.floats(0, 1e6, exclude_min=True)


pytestmark = pytest.mark.usefixtures("as_users_run_it")


def small_run(**sections):
    return RunConfig(**{"recipe": "test", "model": ModelConfig(), "data": DataConfig()} | sections)


def settings_of(config):
    """{"train.lr": 0.001, ...}: every setting that --set can change."""
    values = config.to_dict()
    return {f"{section}.{key}": value for section in SECTIONS for key, value in values[section].items()}


@st.composite
def runs(draw):
    """A valid config of any kind; the fields that limit each other are drawn together."""
    heads, patch, channels = draw(st.integers(1, 8)), draw(st.integers(1, 16)), draw(st.sampled_from([1, 3]))
    model = ModelConfig(
        name=draw(st.text()),
        encoding=draw(st.text()),
        image_size=(patch * draw(st.integers(1, 9)), patch * draw(st.integers(1, 9))),
        patch_size=patch,
        in_channels=channels,
        dim=heads * draw(st.integers(1, 64)),
        num_heads=heads,
        mlp_ratio=draw(st.floats(1, 1e6)),
        pool=draw(st.sampled_from(["class", "mean"])),
        num_registers=draw(st.integers(0, 4)),
        layer_scale=draw(st.none() | positive),
        drop_path=draw(fractions),
        gradient_checkpointing=draw(st.booleans()),
    )
    data = DataConfig(
        name=draw(st.text()),
        source=draw(st.none() | st.text()),
        mean=tuple(draw(st.lists(st.floats(-10, 10), min_size=channels, max_size=channels))),
        std=tuple(draw(st.lists(positive, min_size=channels, max_size=channels))),
        validation_fraction=draw(open_fractions),
        train_limit=draw(st.none() | st.integers(1, 10**9)),
    )
    augment = AugmentConfig(
        crop_padding=draw(st.integers(0, 8)),
        flip=draw(st.booleans()),
        policy=draw(st.sampled_from(["none", "randaugment", "autoaugment"])),
        erase=draw(st.floats(0, 1)),
        mixup=draw(st.floats(0, 10)),
    )
    epochs, accumulation = draw(st.integers(1, 1000)), draw(st.integers(1, 8))
    train = TrainConfig(
        epochs=epochs,
        warmup_epochs=draw(st.floats(0, epochs, exclude_max=True)),
        batch_size=2 * accumulation * draw(st.integers(1, 64)),
        accumulation=accumulation,
        lr=(lr := draw(positive)),
        min_lr=draw(st.floats(0, lr)),
        clip_grad=draw(st.none() | positive),
        ema_decay=draw(st.none() | open_fractions),
        precision=draw(st.sampled_from(["auto", "fp32", "bf16", "fp16"])),
    )
    return RunConfig(draw(st.text()), model, data, augment, train, seed=draw(st.integers(0, 2**62)))


# --- JSON ------------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(runs())
def test_a_config_survives_json(config):
    assert RunConfig.from_dict(json.loads(config.to_json())) == config


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_setting_of_a_recipe_can_be_set_to_what_it_is(recipe):
    config = get_recipe(recipe)
    same = [f"{name}={json.dumps(value)}" for name, value in settings_of(config).items()]
    assert override(config, same) == config


def test_whole_numbers_become_floats_where_a_float_is_meant():
    config = RunConfig.from_dict(json.loads(small_run().to_json()) | {"train": {"lr": 1, "warmup_epochs": 0}})
    assert type(config.train.lr) is float
    assert config.train.lr == 1.0


def test_missing_sections_take_their_defaults():
    values = json.loads(small_run().to_json())
    del values["augment"], values["train"], values["seed"]
    assert RunConfig.from_dict(values) == small_run()


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ((), [1, 2], ["config", "[1, 2]"]),
        (("model",), 3, ["model", "3"]),
        (("model",), None, ["model", "None"]),
        (("model", "depht"), 3, ["model.depht", "depth", "patch_size"]),
        (("trian",), {}, ["trian", "model", "train", "seed"]),
        (("train", "lr"), "high", ["train.lr", "'high'"]),
        (("model", "image_size"), [32], ["model.image_size", "(32,)"]),
        (("model", "image_size"), [32, 32, 32], ["model.image_size", "(32, 32, 32)"]),
        (("model", "image_size"), [32, "32"], ["model.image_size", "(32, '32')"]),
        (("data", "mean"), 0.5, ["data.mean", "0.5"]),
        (("seed",), "one", ["seed", "'one'"]),
    ],
)
def test_json_that_does_not_fit_is_refused_by_name(path, value, named):
    values = json.loads(small_run().to_json())
    if not path:
        values = value
    else:
        place = values
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
    with pytest.raises(ValueError) as error:  # noqa: PT011 - what it must name is checked below
        RunConfig.from_dict(values)
    assert [text for text in named if text not in str(error.value)] == []


@pytest.mark.parametrize("key", ["recipe", "model", "data"])
def test_json_without_a_needed_key_is_refused_by_name(key):
    values = json.loads(small_run().to_json())
    del values[key]
    with pytest.raises(ValueError, match=rf"\b{key}\b"):
        RunConfig.from_dict(values)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "patch_size", 0),
        ("model", "in_channels", 0),
        ("model", "num_classes", -1),
        ("model", "dim", 0),
        ("model", "depth", 0),
        ("model", "num_heads", 0),
        ("model", "num_registers", -1),
        ("model", "mlp_ratio", 0.0),
        ("model", "dropout", 1.0),
        ("model", "attention_dropout", -0.1),
        ("model", "drop_path", 1.5),
        ("model", "pool", "max"),
        ("model", "qk_norm", 1),
        ("model", "depth", 2.5),
        ("model", "depth", True),
        ("model", "encoding", None),
        ("data", "validation_fraction", 0.0),
        ("data", "validation_fraction", 1.0),
        ("data", "std", (0.2, 0.0, 0.2)),
        ("data", "std", (0.2, 0.2)),
        ("data", "train_limit", 0),
        ("data", "split_seed", -1),
        ("data", "split_seed", 2**63),
        ("augment", "crop_padding", -1),
        ("augment", "policy", "trivial"),
        ("augment", "policy_magnitude", 31),
        ("augment", "policy_group", 0),
        ("augment", "repeats", 0),
        ("augment", "erase", 1.1),
        ("augment", "mix_probability", -0.1),
        ("augment", "mixup", -1.0),
        ("augment", "cutmix", -1.0),
        ("augment", "flip", "yes"),
        ("train", "epochs", 0),
        ("train", "batch_size", 0),
        ("train", "accumulation", 0),
        ("train", "min_lr", -1.0),
        ("train", "warmup_epochs", -1.0),
        ("train", "weight_decay", -0.1),
        ("train", "checkpoint_every", -1),
        ("train", "workers", -1),
        ("train", "lr", 0.0),
        ("train", "lr", float("nan")),
        ("train", "lr", float("inf")),
        ("train", "lr", 10**400),
        ("train", "weight_decay", 1e300),
        ("train", "lr", "fast"),
        ("train", "label_smoothing", 1.0),
        ("train", "clip_grad", 0.0),
        ("train", "ema_decay", 1.0),
        ("train", "precision", "fp8"),
        ("train", "warmup_epochs", 100.0),
        ("train", "accumulation", 3),
    ],
)
def test_a_bad_value_is_refused_with_field_and_value(section, field, value):
    kinds = {"model": ModelConfig, "data": DataConfig, "augment": AugmentConfig, "train": TrainConfig}
    with pytest.raises(ValueError) as error:  # noqa: PT011 - what it must name is checked below
        kinds[section](**{field: value})
    assert f"{section}.{field}" in str(error.value)
    assert str(value)[:60] in str(error.value)  # a longer one is cut


@pytest.mark.parametrize(("height", "width"), [(30, 32), (32, 30), (3, 4), (0, 4), (-4, 4)])
def test_an_image_that_patches_do_not_tile_is_refused(height, width):
    with pytest.raises(ValueError, match=f"{height}x{width}.* 4x4"):
        ModelConfig(image_size=(height, width), patch_size=4)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="dim=96, num_heads=5"):
        ModelConfig(dim=96, num_heads=5)


def test_channels_and_normalisation_must_agree():
    with pytest.raises(ValueError, match=r"1 .*data\.mean .*3"):
        small_run(model=ModelConfig(in_channels=1))


@pytest.mark.parametrize("seed", [-1, -(2**70)])
def test_a_negative_run_seed_is_refused(seed):
    with pytest.raises(ValueError, match=f"seed .*{seed}"):
        small_run(seed=seed)


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_mixing_pairs_of_images_needs_an_even_batch(mix):
    with pytest.raises(ValueError, match=r"train\.batch_size.* 63"):
        small_run(augment=AugmentConfig(**{mix: 0.5}), train=TrainConfig(batch_size=63))
    assert small_run(train=TrainConfig(batch_size=63)).train.batch_size == 63


def test_configs_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        small_run().seed = 1


def test_head_dim_and_grid_follow_from_the_sizes():
    config = ModelConfig(dim=96, num_heads=3, image_size=(8, 12), patch_size=2)
    assert config.head_dim == 32
    assert config.grid == (4, 6)


@pytest.mark.parametrize(
    ("section", "field", "wanted"),
    [
        (TrainConfig, "lr", "a number above 0"),
        (TrainConfig, "clip_grad", "a number above 0 or null"),
        (TrainConfig, "epochs", "a whole number of at least 1"),
        (TrainConfig, "ema_decay", "a number in (0, 1) or null"),
        (TrainConfig, "parallel", "one of ddp, fsdp"),
        (ModelConfig, "qk_norm", "true or false"),
        (ModelConfig, "image_size", "2 whole numbers, [a,b]"),
        (ModelConfig, "layer_scale", "a number or null"),
        (ModelConfig, "encoding", "text"),
        (DataConfig, "layout", "one of folder, parquet, webdataset or null"),
        (DataConfig, "in_memory", "true or false or null"),
        (DataConfig, "mean", "a list of numbers, [a,b,...]"),
        (DetectorConfig, "window", "a whole number of at least 1 or null"),
    ],
)
def test_a_value_of_another_kind_is_told_in_words_what_is_wanted(section, field, wanted):
    with pytest.raises(ValueError, match=re.escape(f".{field} ") + f".*{re.escape(wanted)}.*<object"):
        section(**{field: object()})


def test_every_setting_says_what_it_wants_in_words():
    """No type of Python is named: a kind without words would be told by its class."""
    sections = (ModelConfig, DataConfig, AugmentConfig, TrainConfig, DetectorConfig, ImagesConfig, TrainingConfig)
    told = " ".join(in_words(hint) for section in sections for hint in hints(section, ranges=True).values())
    assert not re.search(r"\b(int|float|bool|str|None|Union|Literal|tuple)\b", told)
    assert "bytes" in in_words(bytes)  # so it would be seen


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_named_model_has_the_sizes_of_the_table(name):
    config = model_config(name, image_size=16)
    assert (config.name, config.dim, config.depth, config.num_heads, config.mlp_ratio) == (name, *MODELS[name])
    assert config.image_size == (16, 16)


def test_a_named_model_takes_changes():
    config = model_config("vit_nano", image_size=(8, 12), depth=2, encoding="none")
    assert (config.image_size, config.depth, config.encoding, config.dim) == ((8, 12), 2, "none", 96)


def test_an_unknown_model_lists_the_known_ones():
    with pytest.raises(ValueError, match=f"'vit_tiny'.*{', '.join(MODELS)}"):
        model_config("vit_tiny")


def test_an_unknown_model_setting_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"model\.heads.*num_heads"):
        model_config("vit_nano", heads=3)


# --- changes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "section", "key", "value"),
    [
        ("train.lr=0.5", "train", "lr", 0.5),
        ("lr=5e-1", "train", "lr", 0.5),
        ("model.depth=2", "model", "depth", 2),
        ("flip=true", "augment", "flip", True),
        ("encoding=ape+sape2:count=cyclic", "model", "encoding", "ape+sape2:count=cyclic"),
        ("train.clip_grad=null", "train", "clip_grad", None),
        ("ema_decay=None", "train", "ema_decay", None),
        ("image_size=[16,24]", "model", "image_size", (16, 24)),
        ("image_size=16", "model", "image_size", (16, 16)),
        ("data.mean=[0,0.5,1]", "data", "mean", (0, 0.5, 1)),
        ("source=a=b", "data", "source", "a=b"),
        ("label_column=1", "data", "label_column", "1"),
        ("data.name=1e3", "data", "name", "1e3"),
        ("image_column=true", "data", "image_column", "true"),
        ("flip=True", "augment", "flip", True),
        ("image_column=True", "data", "image_column", "True"),
        ("lr=.5", "train", "lr", 0.5),
        ("lr=5.e-1", "train", "lr", 0.5),
        ("betas=0.5,0.75", "train", "betas", (0.5, 0.75)),
        ("image_size=(16,24)", "model", "image_size", (16, 24)),
        ("data.name=1,2", "data", "name", "1,2"),
    ],
)
def test_an_override_changes_one_setting_and_no_other(assignment, section, key, value):
    start = small_run(train=TrainConfig(clip_grad=1.0, ema_decay=0.9))
    expected = dataclasses.replace(start, **{section: dataclasses.replace(getattr(start, section), **{key: value})})
    assert override(start, [assignment]) == expected
    assert expected != start


def test_the_last_override_of_a_setting_wins():
    assert override(small_run(), ["lr=0.5", "train.lr=0.25"]).train.lr == 0.25


def test_overrides_that_only_fit_together_are_checked_together():
    config = override(small_run(), ["dim=60", "num_heads=5"])  # 384 / 5 would not do
    assert config.model.head_dim == 12


@pytest.mark.parametrize(
    ("assignment", "named"),
    [
        ("name=x", ["model.name or data.name", "in full"]),
        ("learning_rate=1", ["'learning_rate'", "sape2 train RECIPE --dry-run"]),
        ("train.epoch=1", ["'train.epoch'", "train.epochs"]),
        ("train.depth=1", ["'train.depth'", "model.depth"]),
        ("model.dimm=1", ["'model.dimm'", "model.dim?"]),
        ("num_head=1", ["'num_head'", "model.num_heads"]),
        ("=1", ["''", "sape2 train"]),
        ("train.lr", ["key=value", "'train.lr'"]),
        ("train.lr=", ["train.lr", "''"]),
        ("train.lr=fast", ["train.lr", "'fast'"]),
        ("train.lr=NaN", ["train.lr", "nan"]),
        ("train.lr=1e400", ["train.lr", "inf"]),
        ("train.epochs=2.5", ["train.epochs", "2.5"]),
        ("train.epochs=null", ["train.epochs", "None"]),
        ("flip=1", ["augment.flip", "1"]),
        ("policy=trivial", ["augment.policy", "randaugment", "autoaugment", "'trivial'"]),
        ("mlp_ratio=0.001", ["int(dim * mlp_ratio)", "mlp_ratio=0.001"]),
        ("image_size=[32]", ["model.image_size", "(32,)"]),
        ("image_size=30", ["30x30", "4x4", "multiples of 4"]),
        ("data.mean=[1]", ["data.mean", "data.std"]),
        ('model={"depth": 1}', ["'model'"]),
    ],
)
def test_a_bad_override_says_what_is_wrong_and_what_is_known(assignment, named):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - what it must name is checked below
        override(small_run(), [assignment])
    assert [text for text in named if text not in str(error.value)] == []


@pytest.mark.parametrize(("epochs", "warmup"), [(10, 0.5), (100, 5.0), (300, 15.0), (1, 0.05)])
def test_with_epochs_keeps_the_share_of_the_warm_up(epochs, warmup):
    config = with_epochs(small_run(train=TrainConfig(epochs=100, warmup_epochs=5)), epochs)
    assert config.train == TrainConfig(epochs=epochs, warmup_epochs=warmup)


@pytest.mark.parametrize("epochs", [0, -3])
def test_with_epochs_refuses_no_epochs(epochs):
    with pytest.raises(ValueError, match=rf"train\.epochs.* {epochs}"):
        with_epochs(small_run(), epochs)


# --- identity --------------------------------------------------------------------------------------------------------

CHANGES = {
    "model.encoding": "ape", "model.image_size": [16, 16], "model.patch_size": 8, "model.num_classes": 3,
    "model.dim": 96, "model.depth": 3, "model.num_heads": 3, "model.mlp_ratio": 2, "model.pool": "mean",
    "model.num_registers": 1, "model.qkv_bias": False, "model.qk_norm": True, "model.layer_scale": 0.1, "model.dropout": 0.1,
    "model.attention_dropout": 0.1, "model.drop_path": 0.1, "model.gradient_checkpointing": True, "data.name": "mine",
    "data.image_column": "img", "data.label_column": "label", "data.mean": [0, 0, 0], "data.std": [1, 1, 1],
    "data.validation_fraction": 0.2, "data.split_seed": 1, "data.test_fraction": 0.2,
    "data.train_limit": 10, "augment.crop_padding": 2,
    "augment.flip": True, "augment.policy": "randaugment", "augment.policy_magnitude": 5, "augment.policy_group": 1,
    "augment.erase": 0.1, "augment.mixup": 0.1, "augment.cutmix": 0.1, "augment.mix_probability": 0.5, "augment.repeats": 2,
    "train.epochs": 50, "train.batch_size": 64, "train.lr": 0.5, "train.min_lr": 0, "train.warmup_epochs": 1,
    "train.weight_decay": 0, "train.label_smoothing": 0, "train.clip_grad": 1, "train.ema_decay": 0.9,
    "train.accumulation": 2, "train.precision": "fp32", "train.shuffle_window": 64, "augment.crop_area": 0.1,
    "data.center_crop": 0.9, "train.optimizer": "muon", "train.encoding_lr": 0.1, "train.betas": [0.8, 0.9],
    "train.schedule": "linear",
}  # fmt: skip
NO_CHANGE_OF_THE_RESULT = {
    "data.source": "elsewhere", "data.layout": "folder", "data.in_memory": False, "data.max_bad_samples": 3,
    "train.workers": 3, "train.checkpoint_every": 7, "train.parallel": "fsdp", "train.compile": True,
}  # fmt: skip
MUON = "train.optimizer=muon"
WITH_OTHERS = {
    "model.in_channels": ["model.in_channels=1", "data.mean=[0]", "data.std=[1]"],
    "train.muon_lr": [MUON, "train.muon_lr=0.3"],
    "train.muon_momentum": [MUON, "train.muon_momentum=0.5"],
}


def test_every_setting_is_known_to_the_identity_tests():
    assert {"model.name", *CHANGES, *NO_CHANGE_OF_THE_RESULT, *WITH_OTHERS} == set(settings_of(small_run()))


def test_a_model_is_not_renamed_without_changing_its_size():
    with pytest.raises(ValueError, match="--model"):
        override(small_run(), ["model.name=vit_base"])


@pytest.mark.parametrize(("name", "value"), CHANGES.items())
def test_identity_changes_with_whatever_changes_the_result(name, value):
    assert override(small_run(), [f"{name}={json.dumps(value)}"]).identity() != small_run().identity()


def test_identity_changes_with_seed_recipe_and_channels():
    others = [small_run(seed=1), small_run(recipe="other"), override(small_run(), WITH_OTHERS["model.in_channels"])]
    assert [other.identity() == small_run().identity() for other in others] == [False] * 3


@pytest.mark.parametrize(("name", "value"), NO_CHANGE_OF_THE_RESULT.items())
def test_identity_forgets_what_does_not_change_the_result(name, value):
    changed = override(small_run(), [f"{name}={json.dumps(value)}"])
    assert changed != small_run()
    assert changed.identity() == small_run().identity()
