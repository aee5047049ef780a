"""The public names of SaPE2 and of the position encodings it is compared with, imported from the modules that define them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sape2._version import __version__ as __version__

if TYPE_CHECKING:
    from sape2.adapters import attach, attach_attention, detach, encoding_parameters, set_grid
    from sape2.adapters.files import load_adapter, save_adapter
    from sape2.adapters.pytorch import SaPEAttention
    from sape2.encodings import create_encoding, list_encodings
    from sape2.models.export import export_model
    from sape2.models.frozen import freeze
    from sape2.models.vit import create_model

# Looked up when first used, so that `import sape2` and `sape2 --help` do not wait for torch.
_HOMES = {
    "sape2.adapters": ("attach", "attach_attention", "detach", "encoding_parameters", "set_grid"),
    "sape2.adapters.files": ("load_adapter", "save_adapter"),
    "sape2.adapters.pytorch": ("SaPEAttention",),
    "sape2.encodings": ("create_encoding", "list_encodings"),
    "sape2.models.export": ("export_model",),
    "sape2.models.frozen": ("freeze",),
    "sape2.models.vit": ("create_model",),
}
__all__ = [
    "SaPEAttention",
    "attach",
    "attach_attention",
    "create_encoding",
    "create_model",
    "detach",
    "encoding_parameters",
    "export_model",
    "freeze",
    "list_encodings",
    "load_adapter",
    "save_adapter",
    "set_grid",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'sape2' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
