"""How modules look to tools that read a model: one node each in a symbolic trace, and nothing for `torch.jit.script`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import fx, nn


class OneNode:
    """Mixed into modules, before `nn.Module`: traces of `torch.fx` have them whole, as they have those of `torch.nn`."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "forward" in vars(cls):
            cls.forward = _one_node(cls.forward)  # pyrefly: ignore

    def __prepare_scriptable__(self) -> nn.Module:
        """Where torch.jit.script begins, at every module of a model."""
        raise ValueError(
            "torch.jit.script compiles source, and that of position encodings is not in its language; "
            "use torch.jit.trace or torch.export, or detach one that was attached"
        )


def _one_node(forward: Callable) -> Callable:
    """A symbolic trace (`torch.fx`, feature extractors) does not look into it."""

    @functools.wraps(forward)
    def called(self: Any, *args: Any, **keywords: Any) -> Any:
        proxy = next((each for each in (*args, *keywords.values()) if isinstance(each, fx.Proxy)), None)
        if proxy is None:
            return forward(self, *args, **keywords)
        tracer: Any = proxy.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), args, keywords)

    return called
