"""Where the patches of the running call are among its tokens, shared by the attention modules of a model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sape2.adapters.layouts import Layout, Scattered, whole
from sape2.encodings.grid import Grid, as_grid, num_tokens, of_one_size


class _Place:
    """The layout of the running call and of the calls around it."""

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self.task = -1  # the backward pass in which the layout was read, -1 outside of any
        self.outer: list[tuple[Layout | None, int]] = []  # of the calls around this one, where a hook calls the model again


class _Running(_Place, threading.local):
    """A place for each thread."""


KEPT = 2  # layouts of equally many tokens between backward passes; two are enough to refuse

Read = Callable[[Any, Any, dict[str, Any], Any], Layout]


def inside(module: Any) -> Any:
    """What LoRA was put around, or the module itself."""
    return getattr(module, "base_layer", module)


def grid_of_output(projection: Any, inputs: Any, keywords: dict[str, Any], output: Tensor) -> Layout:
    """That of a patch projection, (B, D, H, W)."""
    return as_grid(output.shape[-2], output.shape[-1])


class Tokens:
    """Where the patches are in the running call, for the attention modules of one model; separate by thread.

    `num_prefix` tokens before and `num_suffix` behind them stand on no grid. `read` says the layout from a call of the
    module that the hook is on: by default the grid of the output of the patch projection, never a square root. Gradient
    checkpointing runs blocks again in the backward pass, when other images may have passed since, and on an accelerator in a
    thread of its own: then the layout is the one with that many tokens among those seen. A copy of the model starts without
    any call.
    """

    def __init__(
        self, num_prefix: int = 0, num_suffix: int = 0, given: Grid | None = None, read: Read = grid_of_output
    ) -> None:
        self.num_prefix, self.num_suffix, self.given, self.read = num_prefix, num_suffix, given, read
        self.running = _Running()
        self.compiled = _Place()  # of compiled code, for which torch.compile knows no threads
        self.seen: dict[int, set[Layout]] = {}  # by thread, since the last backward pass of that thread
        self.over: set[int] = set()  # threads whose backward pass has begun

    def __getstate__(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("num_prefix", "num_suffix", "given", "read")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    @property
    def layout(self) -> Layout | None:
        """The layout of this thread; if it has none, the grid set for all threads (`set_grid`)."""
        return self._place().layout or self.given

    def _place(self) -> _Place:
        return self.compiled if torch.compiler.is_compiling() else self.running

    def _set(self, layout: Layout | None) -> None:
        """Also for compiled blocks in a model that is not compiled."""
        self._place().layout = self.compiled.layout = layout

    def give(self, grid: Grid) -> None:
        """For the calls of this thread, and for threads that were given none."""
        self.given = self.running.layout = grid

    # Hooks. Of the model: `enter`, `leave`; of what holds the module that is read: `forget`; of this module: `__call__`.

    def enter(self, model: nn.Module, inputs: Any) -> None:
        if not torch.compiler.is_compiling():  # a graph would be made again for every grid that was there before
            self.running.outer.append((self.running.layout, self.running.task))
        self._set(None)

    def leave(self, model: nn.Module, inputs: Any, output: Any) -> None:
        """After a call inside another one, its layout again."""
        if torch.compiler.is_compiling() or not self.running.outer:
            return
        layout, task = self.running.outer.pop()
        if self.running.outer:
            self._set(layout)
            self.running.task = task

    def forget(self, patches: nn.Module, inputs: Any) -> None:
        """So that a projection put in the place of the one with the hook cannot leave an old grid."""
        self._set(None)

    def __call__(self, module: nn.Module, inputs: Any, keywords: dict[str, Any], output: Any) -> Any:
        self._see(self.read(module, inputs, keywords, output))
        return of_one_size(output) if self.read is grid_of_output else output

    def keep(self, indices: Tensor) -> None:
        """Patches of which `indices`, (B, K), stay, in this order."""
        layout = self.layout
        if layout is not None:
            full = layout if isinstance(layout, Scattered) else whole(layout, len(indices), indices.device)
            self._see(full.kept(indices))

    def _see(self, layout: Layout) -> None:
        self._set(layout)
        if torch.compiler.is_compiling():
            return
        self.running.task = _backward_pass()
        if not torch.is_grad_enabled():
            return
        thread = threading.get_ident()
        if thread in self.over:  # the backward pass of what was seen before is over
            self.over.discard(thread)
            self.seen.pop(thread, None)
        seen = self.seen.setdefault(thread, set())
        if sum(self._count(other) == self._count(layout) for other in seen) < KEPT:
            self.seen[thread] = seen | {layout}

    def layout_of(self, total: int) -> Layout:
        """The layout of `total` tokens; raises ValueError if there is none, or more than one."""
        layout, backward = self.layout, -1 if torch.compiler.is_compiling() else _backward_pass()
        if backward != -1 and (self.running.task != backward or not layout):
            layout = self._seen_with(total) or layout
        if layout is None:
            raise ValueError(
                "no image has passed, in this thread, the patch projection that attach found, so the grid is not known; if the "
                "projection was replaced since, detach and attach again (save_adapter and load_adapter keep what was learned)"
            )
        if self._count(layout) != total:
            raise ValueError(
                f"an attached encoding needs all {_say(layout)} patches after {self.num_prefix} prefix tokens; attention "
                f"got {total} tokens. Token merging and pruning take patches away: switch them off, or detach"
            )
        return layout

    def ends(self, total: int) -> tuple[int, int]:
        """The first patch among `total` tokens, and what comes behind the last one."""
        return self.num_prefix, total - self.num_suffix

    def _count(self, layout: Layout) -> int:
        patches = layout.place.shape[1] if isinstance(layout, Scattered) else num_tokens(layout)
        return patches + self.num_prefix + self.num_suffix

    def _seen_with(self, total: int) -> Layout | None:
        """Of the layouts seen by any thread the one with that many tokens; raises ValueError if there are several."""
        thread = threading.get_ident()
        self.over.update([thread] if thread in self.seen else self.seen if len(self.seen) == 1 else [])
        fitting = {layout for seen in list(self.seen.values()) for layout in seen if self._count(layout) == total}
        if len(fitting) > 1:
            raise ValueError(
                f"gradient checkpointing runs a block again on {total} tokens, one of the grids {sorted(map(_say, fitting))} "
                "seen before this backward pass; call backward between images of different shapes and equally many patches, "
                "and between calls in which patches are dropped"
            )
        return next(iter(fitting), None)


def _say(layout: Layout) -> str:
    if isinstance(layout, Scattered):
        return " and ".join(dict.fromkeys(_say(grid) for grid in layout.grids)) + f" ({layout.place.shape[1]} tokens)"
    return f"{layout[0]}x{layout[1]}"


def _backward_pass() -> int:
    return torch._C._current_graph_task_id()  # as torch.utils.checkpoint asks; -1 outside of any
