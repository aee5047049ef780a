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
    "SaPEAttention": "sape2.adapters.pytorch",
    "attach": "sape2.adapters",
    "attach_attention": "sape2.adapters",
    "create_encoding": "sape2.encodings",
    "create_model": "sape2.models.vit",
    "detach": "sape2.adapters",
    "encoding_parameters": "sape2.adapters",
    "export_model": "sape2.models.export",
    "freeze": "sape2.models.frozen",
    "list_encodings": "sape2.encodings",
    "load_adapter": "sape2.adapters.files",
    "save_adapter": "sape2.adapters.files",
    "set_grid": "sape2.adapters",
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
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sape2' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
