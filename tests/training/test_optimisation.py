"""Optimisers by name: what each parameter is updated by, at which rate, and what is refused."""

import pytest
import torch
from timm.optim import create_optimizer_v2

from sape2.config import TrainConfig, override
from sape2.config.recipes import get_recipe
from sape2.models.vit import create_model
from sape2.training.optimisation import make_optimizer, make_schedule, parameter_groups

OPTIMIZERS = ("adamw", "nadamw", "muon", "nmuon", "adamuon", "nadamuon")


def small():
    torch.manual_seed(0)
    size = {"image_size": 8, "patch_size": 4, "dim": 16, "depth": 2, "num_heads": 2}
    return create_model("vit_nano", encoding="ape+cpe+sape2:sign=learned", num_registers=1, pool="class", **size)


def groups_by_name(model, config):
    """name of a parameter -> the settings of its group"""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group for group in make_optimizer(model, config).param_groups for p in group["params"]}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_parameter_is_in_one_group(optimizer):
    model = small()
    groups = parameter_groups(model, TrainConfig(optimizer=optimizer))
    together = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(together) == sorted(id(parameter) for parameter in model.parameters())


def test_muon_updates_the_matrices_of_the_blocks_and_nothing_else():
    groups = groups_by_name(small(), TrainConfig(optimizer="muon", lr=1e-3, muon_lr=0.03, encoding_lr=5e-3))
    under_muon = {name for name, group in groups.items() if not group.get("use_fallback")}
    matrices = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    assert under_muon == {f"blocks.{layer}.{name}" for layer in (0, 1) for name in matrices}
    assert {groups[name]["lr"] for name in under_muon} == {0.03}
    of_encodings = {name for name in groups if "encoding" in name}
    assert {"token_encodings.0.table", "blocks.1.attn.encoding.table_x"} <= of_encodings
    assert {(groups[name]["lr"], groups[name]["weight_decay"]) for name in of_encodings} == {(5e-3, 0.0)}
    assert {groups[name]["lr"] for name in groups.keys() - under_muon - of_encodings} == {1e-3}


def test_an_update_of_muon_is_orthogonal_and_as_large_as_its_rate():
    model = small()
    config = TrainConfig(optimizer="muon", muon_lr=0.1, weight_decay=0.0)
    optimizer = make_optimizer(model, config)
    weight = model.blocks[0].mlp.fc1.weight  # (64, 16)
    before = weight.detach().clone()
    weight.grad = torch.randn(weight.shape)
    optimizer.step()
    singular = torch.linalg.svdvals((weight - before).detach())
    expected = 0.1 * (64 / 16) ** 0.5
    assert (singular > 0.5 * expected).all()  # five Newton-Schulz steps leave them between about 0.7 and 1.2
    assert (singular < 1.5 * expected).all()


def test_adamw_is_timms_own_over_a_whole_model():
    """The groups are ours, the update is not: the same weights as timm's factory gives, bit for bit."""
    one, other = small(), small()
    config = TrainConfig(lr=0.01)
    theirs = create_optimizer_v2(other, opt="adamw", lr=0.01, weight_decay=config.weight_decay)
    for model, optimizer in ((one, make_optimizer(one, config)), (other, theirs)):
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            model(torch.randn(4, 3, 8, 8, generator=generator)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_frozen_parameters_are_in_no_group():
    model = small()
    model.patch_embed.requires_grad_(False)
    assert not any("patch_embed" in name for name in groups_by_name(model, TrainConfig(optimizer="muon")))


def test_a_linear_schedule_falls_in_equal_steps_from_every_rate():
    config = TrainConfig(optimizer="muon", lr=0.002, muon_lr=0.02, min_lr=0.0)
    schedule = make_schedule(make_optimizer(small(), config), "linear", steps=100, warmup=10, min_lr=0.0)
    rates = torch.tensor([schedule._get_lr(step) for step in range(101)], dtype=torch.float64)
    torch.testing.assert_close(rates[10], rates.max(0).values)
    assert sorted(set(rates[10].tolist())) == pytest.approx([0.002, 0.02])
    falls = rates[10:100].diff(dim=0)
    torch.testing.assert_close(falls, (-rates[10] / 90).expand_as(falls))
    assert rates[0].tolist() == rates[100].tolist() == [0.0] * len(rates[0])


def test_a_schedule_in_steps_falls_to_a_tenth_twice():
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=1.0)
    made = make_schedule(optimizer, "steps", steps=270, warmup=10, min_lr=0.0)
    rates = []
    for step in (0, 5, 10, 130, 245, 265, 269):
        made.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0, 0.5, 1, 1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["train.optimizer=sgd"], OPTIMIZERS),
        (["train.muon_lr=0.1"], ("train.muon_lr", "adamw")),
        (["train.muon_momentum=0.9"], ("train.muon_momentum", "adamw")),
        (["train.optimizer=muon", "train.parallel=fsdp"], ("fsdp", "muon")),
        (["train.encoding_lr=1e-6"], ("train.min_lr", "train.encoding_lr")),
        (["train.optimizer=muon", "train.muon_lr=0"], ("train.muon_lr", "above 0")),
        (["train.betas=[0.9,1]"], ("train.betas",)),
        (["train.schedule=step"], ("cosine", "linear")),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, said):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - what it says follows
        override(get_recipe("digits"), settings)
    assert "\n" not in str(refusal.value)
    assert all(word in str(refusal.value) for word in said)


def test_settings_at_their_defaults_leave_the_digest_of_older_runs():
    train = get_recipe("digits").identity()["train"]
    assert not {"optimizer", "encoding_lr", "muon_lr", "muon_momentum", "betas", "schedule"} & train.keys()
    assert override(get_recipe("digits"), ["train.optimizer=muon"]).identity()["train"]["optimizer"] == "muon"
