"""Attaching: one line that tells compiled blocks about the model call they are part of.

A block that is compiled alone sees a sequence of tokens. Mostly its rotary positions tell the grid.
Where a model has none, or where they hold more than one video, only the model's own call knows; and
only it knows the timestep.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .call_grid import grid_of_call, patch_of, timestep_of_call
from .errors import OptionsError, shown
from .late_attach import warn_if_late
from .passes.given import Grid
from .told import Grids, Told, enter, leave

logger = logging.getLogger(__name__)

TellGrid = Callable[..., "Grid | Sequence[Grid] | None"]


class Attachment:
    """What `attach` returns. While it lasts, the model's calls tell their grid and timestep."""

    def __init__(self, model: nn.Module, tell: TellGrid, measured: bool = False) -> None:
        """measured: `tell` reads the grid from the latent itself."""
        self._tell = tell
        self._measured = measured
        self._hooks = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off the model again."""
        for hook in self._hooks:
            hook.remove()

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():  # a whole-model graph shows the grid itself
            grids = _checked(self._tell(*args, **kwargs))
            enter(self, Told(grids, self._measured, timestep_of_call(_inner(model), args, kwargs)))

    def _leave(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            leave(self)


def attach(model: nn.Module, grid: Grid | TellGrid | str = "auto") -> Attachment:
    """Let the compiled parts of `model` know the token grid and the timestep of each of its calls.

    Call it once, before the first call of the model; before or after `compile_repeated_blocks()`,
    and on what `torch.compile` returns. Graphs that were compiled dense before stay so: it logs a
    warning if there are any. It adds two hooks, and causes neither recompilation nor
    graph breaks. What it tells is used only where a graph does not show the grid itself, and only
    where it fits the number of tokens, and the rotary positions if there are any. The timestep, for
    option `dense_timesteps`, is the call's argument `timestep` where that is a tensor.

    Args:
        model: the model whose call knows the grid: the whole transformer, not a block.
        grid: "auto" reads it from the latent and the model's config, as models of diffusers allow.
            (T, H, W) in tokens is the grid of every call. A function is called with the arguments
            of each model call and returns the grid, or a list of grids where several videos follow
            each other in the sequence, or None for a call whose grid it does not know.

    Raises:
        OptionsError: `grid` is none of these, or "auto" cannot work for this model.
    """
    warn_if_late(_inner(model))
    if grid == "auto":
        return Attachment(model, _automatic(model), measured=True)
    if callable(grid):
        return Attachment(model, grid)
    if isinstance(grid, str):
        raise OptionsError(f"grid is {shown(grid)}: must be 'auto', (T, H, W) or a function")
    fixed = _checked(grid)
    return Attachment(model, lambda *args, **kwargs: fixed)


def _automatic(model: nn.Module) -> TellGrid:
    inner = _inner(model)
    if patch_of(inner) is None:
        raise OptionsError(
            f"{type(inner).__name__} has no config with a patch_size, from which the grid could be "
            "told: give attach(model, grid=function), which gets the arguments of each call and "
            "returns (T, H, W) in tokens"
        )
    warned = False

    def tell(*args: Any, **kwargs: Any) -> Grid | None:
        nonlocal warned
        grid = grid_of_call(inner, args, kwargs)
        if grid is None and not warned:
            warned = True
            logger.warning(
                "veda_compile.attach: the arguments of a call do not tell the grid of %s: where "
                "graphs do not show it either, give attach(model, grid=function), which gets these "
                "arguments and returns (T, H, W) in tokens",
                type(inner).__name__,
            )
        return grid

    return tell


def _inner(model: nn.Module) -> nn.Module:
    """The model itself: what torch.compile returns holds it."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


def _checked(grid: Any) -> Grids | None:
    """One or several grids as a tuple of grids. Raises OptionsError."""
    if grid is None:
        return None
    several = [grid] if isinstance(grid, list | tuple) and _is_grid(grid) else grid
    if isinstance(several, list | tuple) and several and all(_is_grid(one) for one in several):
        return tuple((int(one[0]), int(one[1]), int(one[2])) for one in several)
    raise OptionsError(
        f"attach was told grid {shown(grid)}: must be three whole numbers (T, H, W), each at "
        "least 1, or a list of such grids"
    )


def _is_grid(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(isinstance(side, int) and side >= 1 for side in value)
    )
