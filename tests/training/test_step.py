"""A step of training: it waits for no device, and compiled it gives what it gives without."""

import accelerate
import pytest
import torch
from device_cases import DEVICES, Waits, no_waits
from test_train import images, run, tiny
from torch import nn

from sape2.encodings import ATTENTION_ENCODINGS, TOKEN_ENCODINGS
from sape2.models.trained import build_model
from sape2.training import steps
from sape2.training.loop import CHECK_EVERY
from sape2.training.optimisation import compiled, make_ema, make_optimizer
from sape2.training.steps import ImageSteps

BUSY = ("augment.mixup=0.8", "augment.cutmix=1", "train.clip_grad=1", "train.accumulation=2")
META = torch.device("meta")


@pytest.fixture
def on_meta(monkeypatch):
    """A device without memory: it refuses to be read, and every number sent to it shows."""
    monkeypatch.setattr(accelerate.Accelerator, "device", property(lambda self: META))


def steps_of(*settings):
    config = tiny(*settings)
    return ImageSteps(build_model(config), images(), config)


def step_on_meta(training):
    batch = training.stream[0]
    with no_waits(META):
        training.take(batch)


@pytest.mark.parametrize("encoding", ["ape", "ape+sape2", "rope", "ape+sape2:readout=direct"])
def test_a_step_waits_for_no_device(on_meta, encoding):
    training = steps_of(*BUSY, f"model.encoding={encoding}")
    training.take(training.stream[0])  # the first makes what is kept on the device
    training.progress.step += 1
    step_on_meta(training)
    assert [step for step, _ in training.pending] == [0, 1]
    assert training.pending[0][1]["loss"].device == META


def test_a_step_that_looks_at_its_loss_would_be_seen(on_meta, monkeypatch):
    training = steps_of()
    monkeypatch.setattr(steps.F, "cross_entropy", lambda logits, target: logits.sum() * logits.new_tensor(1.0))
    with pytest.raises(Waits):
        step_on_meta(training)


def test_losses_are_looked_at_every_tenth_step_and_where_something_is_saved(tmp_path, monkeypatch):
    looks = []
    look = ImageSteps.look
    monkeypatch.setattr(ImageSteps, "look", lambda self: looks.append(self.progress.step) or look(self))
    run(tmp_path, tiny("train.batch_size=4", "train.epochs=2"))  # 20 steps an epoch
    assert [looks, CHECK_EVERY] == [[10, 20, 30, 40], 10]


def test_the_average_moves_all_weights_in_one_call():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    ema = make_ema(model, tiny("train.ema_decay=0.9").train)
    calls, lerp = [], torch._foreach_lerp_
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_foreach_lerp_", lambda *args, **kwargs: (calls.append(len(args[0])), lerp(*args, **kwargs)))
        ema.update(model, step=3)
    assert calls == [4]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_optimiser_is_one_kernel_on_a_gpu():
    assert make_optimizer(nn.Linear(2, 2).cuda(), tiny().train).defaults["fused"] is True


def test_the_optimiser_is_pytorchs_choice_on_a_cpu():
    assert make_optimizer(nn.Linear(2, 2), tiny().train).defaults["fused"] is None


# --- compiled --------------------------------------------------------------------------------------------------------


def gradients(call, model, pixels):
    torch.manual_seed(0)
    call(pixels).float().square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


ENCODINGS = [*ATTENTION_ENCODINGS, *(name for name in TOKEN_ENCODINGS if name != "ape")]
ENCODINGS += ["ape+sape2", "ape+sape2:readout=direct", "ape+sape2:readout=squared_distance"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("encoding", ["ape", *[pytest.param(name, marks=pytest.mark.slow) for name in ENCODINGS]])
def test_every_encoding_trains_compiled_with_the_same_gradients(encoding, device):
    config = tiny(f"model.encoding={encoding}")
    model = build_model(config).train().to(device)
    pixels = torch.randn(4, 1, 8, 8, device=device)
    torch._dynamo.reset()
    graph = torch.compile(model, dynamic=False, backend="aot_eager")
    expected, found = gradients(model, model, pixels), gradients(graph, model, pixels)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4 * value.abs().max().item(), msg=name)


@pytest.mark.slow
def test_a_compiled_run_sees_and_draws_what_a_run_without_does(tmp_path):
    settings = ("train.epochs=2", "train.lr=1e-4")
    plain, fast = run(tmp_path / "a", tiny(*settings)), run(tmp_path / "b", tiny(*settings, "train.compile=true"))
    assert plain.keys() == fast.keys()
    for name, value in plain.items():
        torch.testing.assert_close(fast[name], value, rtol=1e-3, atol=5e-5)
    assert any(not torch.equal(fast[name], value) for name, value in plain.items())  # other kernels did it


def test_a_run_may_go_on_compiled():
    assert tiny("train.compile=true").identity() == tiny().identity()


def test_a_compiler_that_is_not_there_is_told_in_one_line(monkeypatch):
    def broken(*_):
        raise RuntimeError("No working C++ compiler found\nin the path")

    compiling = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiling(model, backend=broken))
    training = steps_of("train.compile=true")
    with pytest.raises(ValueError, match=r"compile=true does not work.*No working C.. compiler found; leave it out"):
        training.take(training.stream[0])


def test_a_model_is_compiled_for_its_one_shape_and_keeps_its_draws(monkeypatch):
    given = {}
    monkeypatch.setattr(torch, "compile", lambda model, **options: given.update(options) or model)
    model = nn.Linear(2, 2)
    assert compiled(model) is model
    assert given == {"dynamic": False, "options": {"fallback_random": True}}
