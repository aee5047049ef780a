"""Adds encodings to models of other libraries (`attach`) and removes them (`detach`).

To add a library: a file with `find`, and an entry in `HOSTS`.
"""

from __future__ import annotations

import importlib

from torch import nn

from sape2.adapters.attached import Host, Model, Trainable, check_free, detach, encoding_parameters, put_in
from sape2.adapters.pytorch import SaPEAttention, attach_attention, set_grid
from sape2.adapters.start import Start
from sape2.encodings.grid import Grid

__all__ = ["SaPEAttention", "attach", "attach_attention", "detach", "encoding_parameters", "set_grid"]

# The package that a model's class comes from, and the file that knows it. Imported when such a model comes.
HOSTS = {
    "timm": "sape2.adapters.timm",
    "torchvision": "sape2.adapters.torchvision",
    "transformers": "sape2.adapters.transformers",
    "sape2": "sape2.adapters.own",
}


def attach(
    model: Model,
    encoding: str = "sape2",
    *,
    trainable: Trainable = "all",
    start: Start = "no_effect",
    grid: Grid | None = None,
) -> Model:
    """Puts an encoding, or several joined ("sape2+rpe:every=2"), into a model, in place; returns the model.

    Encodings of attention enter every attention module; `cpe` stands behind the first block. The model's outputs stay the
    same up to rounding until it is trained: what is not 0 to begin with enters under learned gains that start at 0, one for
    each head or, for `cpe`, each channel. `start="as_is"` leaves the gains out, which is the only way for rotations.
    `trainable="encoding"` freezes everything else. `grid`, (H, W), sizes the tables; by default that of the images for
    which the model was made. The grid of a call is that of its images, whatever their size; where attention is within
    windows, each window is a grid.

    Raises ValueError for models and encodings that this cannot be done for, with the reason.
    """
    check_free(model)
    host = find_host(model)
    own = list(dict.fromkeys(size.grid for size in host.sizes))
    if grid is not None and len(own) > 1:
        raise ValueError(
            f"the layers of this model attend over several grids, {own}, and its tables are for these; leave out grid"
        )
    put_in(model, host, encoding, trainable, start, [size.grid if grid is None else grid for size in host.sizes])
    return model


def find_host(model: nn.Module) -> Host:
    """Finds where an encoding can be attached in a model. Raises ValueError if no file of this folder knows the model."""
    for each in type(model).__mro__:
        library = each.__module__.partition(".")[0]
        if library in HOSTS:
            return importlib.import_module(HOSTS[library]).find(model)
    raise ValueError(
        f"attach knows models of {', '.join(HOSTS)}; got {type(model).__module__}.{type(model).__name__}. Attach before "
        "wrapping or compiling a model; for blocks of your own there are attach_attention and SaPEAttention"
    )
