"""Local equivariance error: the derivative of the softmax outputs along the translation of the image (arXiv:2210.02984).

L f(x) = d/ds softmax(f(S_s x)) at s = 0, S_s the translation by s pixels; class outputs do not move, so an
invariant model has L f = 0. Computed by forward-mode differentiation.
"""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sape2.evaluation.base import LabelledImages, Row, drawn, evaluating, mean_row, placed
from sape2.evaluation.translation import Border, ShiftAxis, shift_derivative
from sape2.training.memory_errors import is_out_of_memory


def lie_derivative(
    model: nn.Module, images: Float[Tensor, "batch channels height width"], axis: ShiftAxis, border: Border
) -> Float[Tensor, "batch classes"]:
    """d/ds softmax(f(S_s x)) at s = 0, per pixel of translation.

    S_s x and x + s * `shift_derivative(x)` have the same derivative at 0, so the second is differentiated. The fused
    attention kernels have no forward derivative, hence the plain one. Raises RuntimeError or NotImplementedError where
    the model has an operation without one.
    """
    direction = shift_derivative(images, axis, border)
    start = images.new_zeros(())
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)  # torch's own use of it
        return torch.func.jvp(lambda s: model(images + s * direction).softmax(-1), (start,), (torch.ones_like(start),))[1]


def lie_derivative_error(
    model: nn.Module, data: LabelledImages, axis: ShiftAxis, border: Border, limit: int | None = None, batch_size: int = 50
) -> list[Row]:
    """Rows: lie_derivative_error, the mean over images of ||L f||^2 / classes (the paper's norm), and

    lie_derivative_magnitude, the mean over images and classes of |L f| (what the paper's code writes down).
    Raises ValueError for a model with an operation that has no forward-mode derivative.
    """
    with evaluating(model):
        try:
            batches = [
                lie_derivative(model, placed(images, model), axis, border).float().cpu()
                for images, _ in drawn(data, limit).batches(batch_size)
            ]
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"a {type(model).__name__} has no forward-mode derivative ({reason}), so its Lie derivative cannot be measured"
            ) from error
    derivative = torch.cat(batches)
    where = f"softmax(f(S_s x)) along {axis}, bilinear translation, {border} border, forward-mode derivative"
    conditions = {"transform": "translation", "border": border, "axis": axis}
    squared, magnitude = derivative.square().mean(-1), derivative.abs().mean(-1)
    return [
        mean_row("shift", "lie_derivative_error", squared, "1/px^2", f"||d/ds {where}||^2 / classes", **conditions),
        mean_row("shift", "lie_derivative_magnitude", magnitude, "1/px", f"mean over classes of |d/ds {where}|", **conditions),
    ]
