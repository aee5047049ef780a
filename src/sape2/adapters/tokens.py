"""The token layout of the running call, shared by the attention modules of a model: number of prefix tokens and grid."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from sape2.encodings.grid import Grid, as_grid, num_tokens


class _Place:
    """The grid of the running call and of the calls around it."""

    def __init__(self) -> None:
        self.grid: Grid | None = None
        self.task = -1  # the backward pass in which the grid was read, -1 outside of any
        self.masked = False  # whether the call was given a mask of padded patches
        self.outer: list[tuple[Grid | None, int]] = []  # of the calls around this one, where a hook calls the model again


class _Running(_Place, threading.local):
    """A place for each thread."""


class Tokens:
    """Where the patches are in the running call, for the attention modules of one model; separate by thread.

    `num_prefix` tokens before and `num_suffix` behind them stand on no grid.

    The grid is that of the output of the patch projection (B, D, H, W), never a square root. Gradient checkpointing runs
    blocks again in the backward pass, when other images may have passed since, and on an accelerator in a thread of its
    own: then the grid is the one with that many tokens among those seen. A copy of the model starts without any call.
    """

    def __init__(self, num_prefix: int = 0, num_suffix: int = 0, given: Grid | None = None, counts: bool = False) -> None:
        self.num_prefix, self.num_suffix, self.given = num_prefix, num_suffix, given
        self.counts = counts  # whether the encoding looks beyond pairs of patches
        self.running = _Running()
        self.compiled = _Place()  # of compiled code, for which torch.compile knows no threads
        self.seen: dict[int, set[Grid]] = {}  # by thread, since the last backward pass of that thread
        self.over: set[int] = set()  # threads whose backward pass has begun

    def __getstate__(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("num_prefix", "num_suffix", "given", "counts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    @property
    def grid(self) -> Grid | None:
        """The grid of this thread; if it has none, the one set for all threads (`set_grid`)."""
        return self._place().grid or self.given

    def _place(self) -> _Place:
        return self.compiled if torch.compiler.is_compiling() else self.running

    def _read(self, grid: Grid | None) -> None:
        """Also for compiled blocks in a model that is not compiled."""
        self._place().grid = self.compiled.grid = grid

    def give(self, grid: Grid) -> None:
        """For the calls of this thread, and for threads that were given none."""
        self.given = self.running.grid = grid

    # Hooks. Of the model: `enter`, `leave`; of the module that makes the patches: `forget`; of its projection: `__call__`.

    def enter(self, model: nn.Module, inputs: Any, keywords: Any) -> None:
        if not torch.compiler.is_compiling():  # a graph would be made again for every grid that was there before
            self.running.outer.append((self.running.grid, self.running.task))
        self._read(None)
        others = (*inputs[1:], keywords.get("attention_mask"))
        self._place().masked = any(isinstance(each, Tensor) for each in others)

    def leave(self, model: nn.Module, inputs: Any, output: Any) -> None:
        """After a call inside another one, its grid again."""
        if torch.compiler.is_compiling() or not self.running.outer:
            return
        grid, task = self.running.outer.pop()
        if self.running.outer:
            self._read(grid)
            self.running.task = task

    def forget(self, patches: nn.Module, inputs: Any) -> None:
        """So that a projection put in the place of the one with the hook cannot leave an old grid."""
        self._read(None)

    def __call__(self, projection: nn.Module, inputs: Any, output: Tensor) -> None:
        grid = as_grid(output.shape[-2], output.shape[-1])
        self._read(grid)
        if torch.compiler.is_compiling():
            return
        self.running.task = _backward_pass()
        if not torch.is_grad_enabled():
            return
        thread = threading.get_ident()
        if thread in self.over:  # the backward pass of what was seen before is over
            self.over.discard(thread)
            self.seen.pop(thread, None)
        self.seen[thread] = self.seen.get(thread, set()) | {grid}

    def grid_of(self, total: int) -> Grid:
        """The grid behind `total` tokens; raises ValueError if there is none, or more than one."""
        grid = self.grid
        if not torch.compiler.is_compiling() and _backward_pass() != -1 and (self.running.task != _backward_pass() or not grid):
            grid = self._seen_with(total) or grid
        if grid is None:
            raise ValueError(
                "no image has passed, in this thread, the patch projection that attach found, so the grid is not known; if the "
                "projection was replaced since, detach and attach again (save_adapter and load_adapter keep what was learned)"
            )
        if num_tokens(grid) + self.num_prefix + self.num_suffix != total:
            raise ValueError(
                f"an attached encoding needs all {grid[0]}x{grid[1]} patches after {self.num_prefix} prefix tokens; attention "
                f"got {total} tokens. Patch dropout and token merging take patches away: set patch_drop_rate to 0, or detach"
            )
        return grid

    def ends(self, total: int) -> tuple[int, int]:
        """The first patch among `total` tokens, and what comes behind the last one."""
        return self.num_prefix, total - self.num_suffix

    def _seen_with(self, total: int) -> Grid | None:
        """Of the grids seen by any thread the one with that many tokens; raises ValueError if there are several."""
        thread = threading.get_ident()
        self.over.update([thread] if thread in self.seen else self.seen if len(self.seen) == 1 else [])
        others = self.num_prefix + self.num_suffix
        fitting = {g for seen in list(self.seen.values()) for g in seen if num_tokens(g) + others == total}
        if len(fitting) > 1:
            raise ValueError(
                f"gradient checkpointing runs a block again on {total} tokens, one of the grids {sorted(fitting)} seen "
                "before this backward pass; call backward between images of different shapes and equally many patches"
            )
        return next(iter(fitting), None)

    def given_mask(self, mask: Tensor | None) -> Tensor | None:
        """The mask that attention got; None for one that the host makes itself, as transformers does when it is exported."""
        return None if torch.compiler.is_exporting() and not self._place().masked else mask

    def check_padding(self, mask: Tensor | None) -> None:
        """Raises ValueError for a mask of padded keys if the encoding would count the patches behind it all the same."""
        if mask is not None and self.counts:
            raise ValueError(
                "this encoding counts all patches of a line, also those that a padding mask hides, so padded images would not "
                "get the result of unpadded ones; crop or resize instead, or attach rpe, rpe_contextual or alibi"
            )


def _backward_pass() -> int:
    return torch._C._current_graph_task_id()  # as torch.utils.checkpoint asks; -1 outside of any
