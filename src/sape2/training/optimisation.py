"""Optimiser, schedule, moving average and seeds of a training run, by timm."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch
from torch import nn

from sape2.config import TrainConfig
from sape2.encodings.base import encoding_names


def set_seeds(seed: int, device: torch.device) -> None:
    """All generators that a step on this device draws from. The draws are those after accelerate's `set_seed`.

    `torch.manual_seed` is not called for a CPU: it writes down a traceback for each accelerator that is not there, which took
    0.6 ms a step.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global one, which libraries draw from
    (torch.default_generator if device.type == "cpu" else torch).manual_seed(seed)


def compiled(model: nn.Module) -> Any:
    """The model compiled for the one shape that it trains with. It draws as it would without; results agree to rounding."""
    return torch.compile(model, dynamic=False, options={"fallback_random": True})


def make_ema(model: nn.Module, config: TrainConfig) -> Any:
    from timm.utils import ModelEmaV3

    return None if config.ema_decay is None else ModelEmaV3(model, decay=config.ema_decay, use_warmup=True)


MUON_MOMENTUM = 0.95


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """timm's optimiser of that name, over `parameter_groups`.

    An update of Muon is an orthogonal matrix times sqrt(max(1, rows / columns)), as its author scales it (timm's default
    is another), one of AdaMuon is as large as AdamW's (arXiv:2507.11005).
    """
    from timm.optim import create_optimizer_v2

    on_gpu = next(model.parameters()).is_cuda
    options: dict[str, Any] = {"fused": True} if on_gpu and config.optimizer == "adamw" else {}  # others choose foreach there
    if config.uses_muon:
        momentum = MUON_MOMENTUM if config.muon_momentum is None else config.muon_momentum
        options |= {"momentum": momentum, "adjust_lr_fn": "match_rms_adamw" if config.uses_adamuon else "original"}
    return create_optimizer_v2(
        parameter_groups(model, config),
        opt=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        betas=config.betas,
        **options,
    )


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Parameter groups, each with its rate: decayed, not decayed, encodings and, under Muon, weight matrices of blocks.

    Norms, biases, tokens and all parameters of an encoding do not decay (`ViT.no_weight_decay`).
    """
    no_decay: Any = getattr(model, "no_weight_decay", set)
    still = no_decay()
    encodings = encoding_names(model)
    rates, groups = config.rates, {name: [] for name in ("decayed", "still", "encodings", "matrices")}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in encodings:
            groups["encodings"].append(parameter)
        elif config.uses_muon and name.startswith("blocks.") and parameter.ndim == 2:
            groups["matrices"].append(parameter)
        elif parameter.ndim <= 1 or name.endswith(".bias") or name in still:
            groups["still"].append(parameter)
        else:
            groups["decayed"].append(parameter)
    fallback = {"use_fallback": True} if config.uses_muon else {}
    settings: dict[str, dict[str, Any]] = {
        "decayed": {"lr": rates["lr"]} | fallback,
        "still": {"lr": rates["lr"], "weight_decay": 0.0} | fallback,
        "encodings": {"lr": rates["encoding_lr"], "weight_decay": 0.0} | fallback,
        "matrices": {"lr": rates.get("muon_lr")},
    }
    return [{"params": parameters} | settings[name] for name, parameters in groups.items() if parameters]


def make_schedule(optimizer: torch.optim.Optimizer, decay: str, steps: int, warmup: int, min_lr: float) -> Any:
    """Linear warm-up from `min_lr`, then decay of every group's rate; a function of the step alone.

    The decay is cosine or linear, to `min_lr`, or in "steps": to a tenth at 8/9 and again at 26/27 of all steps.
    """
    from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler

    warmup = min(warmup, steps - 1)
    shared: dict[str, Any] = {"warmup_t": warmup, "warmup_lr_init": min_lr, "t_in_epochs": False}
    if decay == "steps":
        at = [math.ceil(steps * 8 / 9), math.ceil(steps * 26 / 27)]
        return MultiStepLRScheduler(optimizer, decay_t=at, decay_rate=0.1, warmup_prefix=False, **shared)
    shared |= {"t_initial": steps - warmup, "lr_min": min_lr, "warmup_prefix": True}
    return PolyLRScheduler(optimizer, power=1.0, **shared) if decay == "linear" else CosineLRScheduler(optimizer, **shared)
