"""A run is decided by its config: nothing that accelerate, timm or torch finds in the environment changes a weight."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from safetensors.torch import load_file
from torch import nn

from sape2.config import override
from sape2.config.recipes import get_recipe
from sape2.data import ImageData
from sape2.evaluation.accuracy import quick_accuracy
from sape2.models.trained import build_model
from sape2.runs.run import Run
from sape2.training.accelerator import config_alone, make_accelerator, passed_over, prepare
from sape2.training.loop import train
from sape2.training.steps import Steps

SETTINGS = [
    "model.dim=16", "model.depth=1", "model.num_heads=2", "train.epochs=1", "train.warmup_epochs=0", "train.batch_size=16",
    "train.precision=fp32", "train.workers=0", "train.clip_grad=0.1", "train.accumulation=2", "model.encoding=ape+sape2",
]  # fmt: skip
# Each of them changes what accelerate does with arguments that it is not given, or ends the program.
ACCELERATE = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_TORCH_DEVICE": "meta",
    "ACCELERATE_DYNAMO_BACKEND": "EAGER",
    "ACCELERATE_DYNAMO_MODE": "max-autotune",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "true",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "true",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "true",
    "ACCELERATE_FP8_BACKEND": "MSAMP",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "ACCELERATE_DOWNCAST_BF16": "true",
    "ACCELERATE_CPU_AFFINITY": "maybe",
    "ACCELERATE_DEBUG_MODE": "maybe",
    "FSDP_VERSION": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
    "LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_SIZE": "2",
    "PMI_SIZE": "2",
    "MV2_COMM_WORLD_SIZE": "2",
}
# Read when the library is imported, so in a process of its own: all at once.
AT_IMPORT = {
    "TIMM_FUSED_ATTN": "0",
    "TIMM_REENTRANT_CKPT": "1",
    "TIMM_FOREACH_CHUNK_SIZE": "10",
    "TIMM_USE_SCIPY_INTERP": "1",
    "TIMM_USE_NAFLEX": "1",
    "TIMM_USE_NAFLEXVIT": "true",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
    "NVIDIA_TF32_OVERRIDE": "1",
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
    "DNNL_DEFAULT_FPMATH_MODE": "BF16",
    "PYTORCH_JIT": "0",
    "TORCH_COMPILE_DISABLE": "1",
    "PYTHONHASHSEED": "7",
}


def weights(folder):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (64, 1, 8, 8), generator=generator, dtype=torch.uint8)
    data = ImageData(pixels, torch.arange(64) % 10, tuple("0123456789"), (0.3,), (0.4,))
    config = override(get_recipe("digits"), SETTINGS)
    train(build_model(config), data, lambda model: quick_accuracy(model, data), Run(folder, config), quiet=True)
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return weights(tmp_path_factory.mktemp("expected"))


def test_no_variable_of_accelerate_changes_a_weight(expected, tmp_path, monkeypatch):
    for name, value in ACCELERATE.items():
        monkeypatch.setenv(name, value)
    found = weights(tmp_path)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert {name: os.environ[name] for name in ACCELERATE} == ACCELERATE


def test_detection_makes_the_same_accelerator():
    """One function for both, and one class that prepares: what they must not read is above."""
    from sape2.detection import train as detection

    assert detection.make_accelerator is make_accelerator
    assert issubclass(detection.DetectionSteps, Steps)


def test_a_program_that_accumulates_before_leaves_nothing_behind(expected, tmp_path):
    Accelerator(gradient_accumulation_steps=4, cpu=True)
    GradientState()._set_sync_gradients(False)  # as in the middle of an accumulation: an optimiser would not step
    found = weights(tmp_path)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_what_is_passed_over_is_told(monkeypatch):
    assert passed_over() == []
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"):
        monkeypatch.setenv(name, {"ACCELERATE_USE_CPU": "False", "ACCELERATE_DYNAMO_BACKEND": "NO"}.get(name, "1"))
    assert passed_over() == []  # what `accelerate launch` sets when nothing was asked for
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert [line.split()[0] for line in passed_over()] == [
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4",
        "ACCELERATE_MIXED_PRECISION=bf16",
    ]


def test_the_environment_comes_back_after_an_error(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    seen = []
    with pytest.raises(ZeroDivisionError), config_alone():
        seen.append("ACCELERATE_USE_CPU" in os.environ or 1 / 0)
    assert seen == []
    assert os.environ["ACCELERATE_USE_CPU"] == "true"


def test_an_accelerator_made_without_this_reads_the_environment(monkeypatch):
    """So that the tests above would notice if these variables went out of use."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert Accelerator(cpu=True).gradient_accumulation_steps == 4
    assert make_accelerator("fp32").gradient_accumulation_steps == 1
    assert isinstance(prepare(make_accelerator("fp32"), nn.Linear(2, 2)), nn.Linear)


def run_command(folder, **environment):
    argv = ["train", "digits", "--out", str(folder), "--epochs", "1", "--set", "data.train_limit=64"]
    argv += [word for setting in SETTINGS[:3] for word in ("--set", setting)]
    command = [sys.executable, "-m", "sape2", *argv, "--set", "train.precision=fp32", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=300)
    assert done.returncode == 0, done.stderr
    measured = [json.loads(line) for line in done.stdout.splitlines()]
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(), measured, done.stderr


@pytest.mark.slow
def test_the_command_gives_the_same_bytes_whatever_libraries_find_when_imported(tmp_path):
    plain, told = run_command(tmp_path / "plain"), run_command(tmp_path / "told", **AT_IMPORT, **ACCELERATE)
    assert plain[0] == told[0]
    assert [row["value"] for row in plain[1] if row["name"] == "accuracy"] == [
        row["value"] for row in told[1] if row["name"] == "accuracy"
    ]
    assert "ACCELERATE_MIXED_PRECISION=bf16 has no effect" in told[2]
