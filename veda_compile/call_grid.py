"""The grid and the timestep of a model call, from its arguments and the model's configuration."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .passes.given import Grid

_LATENT_SIDES = ("BCTHW", "BTCHW", "BTHWC")


def patch_of(model: nn.Module) -> Grid | None:
    """(T, H, W) of the latent that make one token, from the model's `config`; None without one."""
    size = _configured(model, "patch_size")
    time = _configured(model, "patch_size_t")
    if isinstance(size, int):
        size = (size, size)
    if not isinstance(size, Sequence) or not all(isinstance(side, int) for side in size):
        return None
    if len(size) == 2:
        size = (time if isinstance(time, int) else 1, *size)
    return (size[0], size[1], size[2]) if len(size) == 3 and min(size) > 0 else None


def grid_of_call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Grid | None:
    """The token grid of `model(*args, **kwargs)`; None where the arguments do not tell it.

    They do if `hidden_states` is a 5-D latent, or packed tokens with num_frames, height and width.
    """
    patch = patch_of(model)
    given = _arguments(model, args, kwargs)
    latent = given.get("hidden_states")
    if patch is None or not isinstance(latent, torch.Tensor):
        return None
    if latent.dim() == 5:
        return _of_latent(model, tuple(latent.shape), patch)
    sides = [given.get(name) for name in ("num_frames", "height", "width")]
    if not all(isinstance(side, int) for side in sides):
        return None
    grid = _patched([int(side) for side in sides if side is not None], patch)
    return grid if latent.dim() == 3 and math.prod(grid) == latent.shape[1] else None


def timestep_of_call(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> torch.Tensor | None:
    """The argument `timestep` of `model(*args, **kwargs)`; None where there is no such tensor."""
    timestep = _arguments(model, args, kwargs).get("timestep")
    return timestep if isinstance(timestep, torch.Tensor) else None


def _arguments(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The arguments of a call by name; those that do not fit are for the call itself to refuse."""
    try:
        return inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    except TypeError:
        return kwargs


def _of_latent(model: nn.Module, shape: Sequence[int], patch: Grid) -> Grid | None:
    """The grid of a 5-D latent whose channels are told by their number."""
    for channels in (_configured(model, "in_channels"), _configured(model, "out_channels")):
        found = {
            _patched([shape[sides.index(letter)] for letter in "THW"], patch)
            for sides in _LATENT_SIDES
            if shape[sides.index("C")] == channels
        }
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def _patched(sides: Sequence[int], patch: Grid) -> Grid:
    t, h, w = (side // step for side, step in zip(sides, patch, strict=True))
    return t, h, w


def _configured(model: nn.Module, name: str) -> Any:
    return getattr(getattr(model, "config", None), name, None)
