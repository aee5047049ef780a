"""Unique names for the tensors of a state dict, also where several layers share a module (`share=true`).

File formats reject a tensor with two names, and a moving average over a state dict would update it twice.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def name_once(model: nn.Module) -> list[Any]:
    """Leaves all names but the first out of the state dicts of the model and its parts, and takes any when one is loaded.

    A part may be saved alone, as the tower of a classifier is. Returns the handles of the hooks, which hold for copies of
    the model too.
    """
    parts = [part for part in model.modules() if part is model or names_of_one(part)]
    return [
        handle
        for part in parts
        for handle in (part.register_state_dict_post_hook(_leave_out), part.register_load_state_dict_pre_hook(_fill_in))
    ]


def names_of_one(module: nn.Module) -> list[list[str]]:
    """The names of every parameter that has several, in the order of the modules."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [each for each in names.values() if len(each) > 1]


def _leave_out(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    for _, *others in names_of_one(module):
        for name in others:
            state.pop(prefix + name, None)


def _fill_in(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for names in names_of_one(module):
        given = next((state[prefix + name] for name in names if prefix + name in state), None)
        if given is not None:
            state.update({prefix + name: given for name in names if prefix + name not in state})
