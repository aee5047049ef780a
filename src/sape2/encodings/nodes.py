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
            return _ready(self, functools.partial(forward, self, *args, **keywords))
        tracer: Any = proxy.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), args, keywords)

    return called


def _ready(module: Any, call: Callable[[], Any]) -> Any:
    """A call with the weights of encodings as other tools prepare them for a call of `forward`; attention asks in other ways.

    accelerate brings what it keeps elsewhere (`cpu_offload`, `dispatch_model`). Hooks of `torch.nn.utils` compute a tensor
    from those that are learned and loaded (`prune`, `weight_norm`, `spectral_norm`).
    """
    encodings: list[Any] = [part for part in module.children() if isinstance(part, OneNode)]
    parts: list[nn.Module] = [part for encoding in encodings for part in encoding.modules()]
    kept_elsewhere: list[Any] = [part for part in parts if hasattr(part, "_hf_hook")]
    try:
        for part in kept_elsewhere:
            part._hf_hook.pre_forward(part)
        for part in parts:
            for hook in part._forward_pre_hooks.values():
                if type(hook).__module__.startswith("torch.nn.utils.") and isinstance(part, OneNode):  # others are called
                    hook(part, ())
        return call()
    finally:
        for part in kept_elsewhere:
            part._hf_hook.post_forward(part, None)
