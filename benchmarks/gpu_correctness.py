"""On the device against float64 on the CPU: encodings, the fused kernel, augmentation; and whether a step waits for it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import plain_augmentation
import torch
import torch.nn.functional as F
from gpu_case import Case, autocast, distance_attention
from gpu_training import config_of, random_images
from timing import Row
from torch import Tensor, nn

from sape2.attention import describe_path
from sape2.config.recipes import get_recipe
from sape2.data.augment import augment, draw
from sape2.encodings import list_encodings
from sape2.encodings.distances import Distances
from sape2.models.trained import build_model
from sape2.models.vit import ViT, create_model
from sape2.training.steps import ImageSteps

ENCODINGS = [
    "ape+sape2", "ape+sape2:readout=direct", "ape+sape2:readout=squared_distance", "sape2:preset=equations",
    "sape2:axes=raster", "sape2:sign=learned,gate_scale=learned", "rope+sape2",
]  # fmt: skip
RECIPES = ["cifar10", "cifar10_paper", "cifar10_budget"]
# Of the largest value: what an output, and what a gradient, may be off to count as right. A fault is far above.
BOUNDS = {"float32": (1e-4, 1e-2), "bfloat16": (0.1, 0.3), "float16": (0.02, 0.1)}


def cases(options: argparse.Namespace) -> Iterator[Case]:
    device = options.device
    for name in [*list_encodings(), *ENCODINGS]:
        for precision in ("fp32", "bf16"):
            yield Case(f"{name}, {precision}", partial(encoding_rows, name, precision, device))
    for head_dim in options.size.head_dims:
        for dtype in ("float32", "bfloat16", "float16"):
            for grid, prefix in (((14, 14), 1), ((7, 9), 0), ((5, 13), 5)):
                case = f"kernel: head_dim {head_dim}, {dtype}, grid {grid[0]}x{grid[1]}, {prefix} prefix tokens"
                yield Case(case, partial(kernel_rows, head_dim, getattr(torch, dtype), grid, prefix, device))
    for recipe in RECIPES:
        yield Case(f"augmentation of {recipe}", partial(augmentation_rows, recipe, device))
        yield Case(f"a step of {recipe} waits for nothing", partial(step_rows, recipe, options))


# --- encodings -------------------------------------------------------------------------------------------------------


def encoding_rows(name: str, precision: str, device: torch.device) -> list[Row]:
    """Logits of a model of two layers, and its gradients, against the same in float64 on the CPU."""
    torch.manual_seed(0)
    model = create_model("vit_nano", encoding=name, image_size=(32, 48), patch_size=4, depth=2, num_classes=5)
    images, target = torch.randn(4, 3, 32, 48), torch.tensor([0, 1, 2, 3])
    expected = gradients(model.double(), images.double(), target)
    model, images = model.float().to(device), images.to(device)
    with autocast(device) if precision == "bf16" else nullcontext():
        found = gradients(model, images, target.to(device))
        path = path_of(model, images)
    errors = {key: error(found[key], value) for key, value in expected.items()}
    worst = max(errors.keys() - {"logits"}, key=lambda key: errors[key])
    output, gradient = BOUNDS["bfloat16" if precision == "bf16" else "float32"]
    ok = errors["logits"] <= output and errors[worst] <= gradient
    return [{"ok": ok, "logits_error": errors["logits"], "gradient_error": errors[worst], "of": worst, "path": path}]


def gradients(model: nn.Module, images: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The logits, and the gradient of every parameter that has one."""
    model.zero_grad()
    logits = model(images)
    F.cross_entropy(logits, target).backward()
    return {"logits": logits.detach()} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in parts of the largest value."""
    return ((found.double().cpu() - expected.cpu()).abs().max() / expected.abs().max().clamp(min=1e-12).cpu()).item()


def path_of(model: ViT, images: Tensor) -> str:
    """How the first layer computes its attention."""
    x, grid = model.embed(images)
    block = next(model.layers())
    return describe_path(*block.attn.project(block.norm1(x)), grid, block.attn.encoding)


# --- the kernel ------------------------------------------------------------------------------------------------------


def kernel_rows(head_dim: int, dtype: torch.dtype, grid: tuple[int, int], prefix: int, device: torch.device) -> list[Row]:
    """Output and gradients of q, k, v and the vectors."""
    attend = distance_attention()
    torch.manual_seed(0)
    tokens, gain = grid[0] * grid[1], 0.7
    q, k, v, grad = (torch.randn(2, 3, prefix + tokens, head_dim, device=device, dtype=dtype) for _ in range(4))
    vectors = [torch.randn(2, 3, tokens, side, device=device) for side in (grid[1], grid[0])]
    found = output_and_gradients(lambda q, k, v, *s: attend(q, k, v, s, gain, prefix), [q, k, v, *vectors], grad)
    exact = [t.double().cpu() for t in (q, k, v, *vectors)]
    expected = output_and_gradients(partial(plain, gain=gain, prefix=prefix), exact, grad.double().cpu())
    names = ("output", "q", "k", "v", "x", "y")
    errors = {name: error(a, b) for name, a, b in zip(names, found, expected, strict=True)}
    output, gradient = BOUNDS[str(dtype).removeprefix("torch.")]
    ok = all(value <= (output if name == "output" else gradient) for name, value in errors.items())
    return [{"ok": ok} | {f"{name}_error": value for name, value in errors.items()}]


def plain(q: Tensor, k: Tensor, v: Tensor, *vectors: Tensor, gain: float, prefix: int) -> Tensor:
    bias = F.pad(Distances(vectors, gain).dense(), (prefix, 0, prefix, 0))
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias).softmax(-1) @ v


def output_and_gradients(function: object, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


# --- images and steps ------------------------------------------------------------------------------------------------


def augmentation_rows(recipe: str, device: torch.device) -> list[Row]:
    """The share of pixels that differ from those of the CPU, and by how much at most."""
    config = get_recipe(recipe).augment
    images = random_images(256, 3, 32).images
    draws, there = draw(config, 0, torch.arange(256), 256, (3, 32, 32)), images.to(device)
    draws = draws.sent(device)
    differ = (augment(there, draws).cpu().int() - plain_augmentation.ours(images, config, 0).int()).abs()
    share = (differ > 0).double().mean().item()
    return [{"ok": share < 1e-3, "differing_share": share, "largest_difference": differ.max().item()}]


def step_rows(recipe: str, options: argparse.Namespace) -> list[Row]:
    """Raises where PyTorch sees that the device is waited for."""
    config = config_of(recipe, options)
    steps = ImageSteps(build_model(config), random_images(config.train.batch_size * 2, 3, 32), config)
    batches = steps.stream.batches(0)
    steps.take(next(batches))  # what is made at the first is kept
    steps.progress.step += 1
    on_cuda = options.device.type == "cuda"
    if on_cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        steps.take(next(batches))
    finally:
        if on_cuda:
            torch.cuda.set_sync_debug_mode("default")
    _, (_, numbers) = steps.look()
    return [{"augmentation": steps.stream.where_augmented(), "loss": numbers["loss"]}]
