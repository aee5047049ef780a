"""Checks the kernels on a device before their first use, by comparing them with the readable form on a small random case."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from sape2.attention.kernels.readable import readable_attention

# How far off, of the largest number of a tensor; TF32 may be allowed for float32.
TOLERANCES = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
DTYPES = tuple(TOLERANCES)
HEADS, TOKENS, PREFIX = 2, 35, 1
LENGTHS = (17, 20)  # of the vectors of both axes: what the kernels then hold of them at a time is the most that they ever do
NAMES = ("output", *(f"gradient of {name}" for name in ("q", "k", "v", "the gain", "s_y", "s_x")))


@torch.compiler.assume_constant_result
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def trusted(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """True if the kernels for `width` channels run and agree with the readable form; tested once, warns if they do not."""
    return has_triton() and _passes(device, dtype, width)


@functools.cache
def _passes(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    from sape2.attention.kernels.distance import distance_attention

    try:
        with unset_fake_temporarily(), torch.inference_mode(False):  # it is run in truth, whatever the caller is doing
            fault = disagreement(distance_attention, device, dtype, width)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler or driver raises that nobody has tried
        fault = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    if fault:
        what = f"attention of {width} channels in {dtype}".replace("torch.", "")
        warnings.warn(f"{what} makes whole maps on {device}, without the fused kernel: {fault}", stacklevel=2)
    return not fault


def disagreement(attention: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, width: int) -> str:
    """Names the results of `attention`, output or gradients, that are off by more than rounding; empty if none is."""
    given = random_case(dtype, width)
    found = _results(lambda q, k, v, gain, *s: attention(q, k, v, s, gain, PREFIX), [t.to(device) for t in given])
    scale = width**-0.5
    expected = _results(
        lambda q, k, v, gain, *s: readable_attention(q, k, v, s, gain, PREFIX, scale), [t.double() for t in given]
    )
    for name, ours, theirs in zip(NAMES, found, expected, strict=True):
        error = float((ours.cpu() - theirs).abs().max() / theirs.abs().max())
        if not error <= TOLERANCES[dtype]:
            return f"the {name} differs from the readable form by {error:.1e} of its largest number"
    return ""


def random_case(dtype: torch.dtype, width: int) -> list[Tensor]:
    """q, k, v, gain and the vectors of both axes, on the CPU, from a generator of their own."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, HEADS, PREFIX + TOKENS, width, generator=generator, device="cpu").to(dtype)
    shapes = [(HEADS,), *((1, HEADS, TOKENS, length) for length in LENGTHS)]
    return [q, k, v, *(torch.randn(shape, generator=generator, device="cpu") for shape in shapes)]


def _results(attention: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    """The output and the gradient of each input."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in given]
        output = attention(*leaves)
        return [output.detach(), *torch.autograd.grad(output.double().sin().sum(), leaves)]
