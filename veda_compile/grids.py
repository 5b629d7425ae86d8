"""Grid tellers: the T x H x W grids of a compiled graph's attention sites, call by call."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import sympy
import torch
from torch import fx

from .errors import LayoutError
from .kernels.layout import Video
from .passes.layout import Grid
from .passes.partition import confirms_grid, grid_from_groupings, groupings
from .passes.positions import PositionInput, position_rows
from .passes.rewrite import input_positions
from .passes.sizes import example, example_tensor, hint

Grids = tuple[Grid, ...]

_INTEGER_FUNCTIONS: dict[str, Callable[..., int]] = {
    "FloorDiv": lambda a, b: a // b,
    "CleanDiv": lambda a, b: a // b,
    "Mod": lambda a, b: a % b,
    "PythonMod": lambda a, b: a % b,
    "floor": math.floor,
    "Max": max,
    "Min": min,
}
"""What the functions in torch's size expressions compute."""


class GridTeller(Protocol):
    """Tells the grids of a site's video segments from the arguments of one call."""

    def __call__(self, args: Sequence[Any]) -> Grids:
        """args: the compiled graph's arguments, without the inputs that were added."""
        ...


class FixedGrids:
    """Grids that cannot change without a recompile: the graph's sizes are fixed."""

    def __init__(self, grids: Grids) -> None:
        self._grids = grids

    def __call__(self, args: Sequence[Any]) -> Grids:
        """See `GridTeller`."""
        return self._grids


class SymbolicGrids:
    """Grids that are expressions of the graph's size symbols."""

    def __init__(self, gm: fx.GraphModule, expressions: tuple[tuple[sympy.Expr, ...], ...]) -> None:
        """expressions: (T, H, W) per video segment. Raises LayoutError for an unknown symbol."""
        symbols = sorted({s for grid in expressions for e in grid for s in e.free_symbols}, key=str)
        self._read = [_symbol_reader(gm, symbol) for symbol in symbols]
        flat = [e for grid in expressions for e in grid]
        self._evaluate: Callable[..., list[Any]] = sympy.lambdify(
            symbols, flat, modules=[_INTEGER_FUNCTIONS]
        )

    def __call__(self, args: Sequence[Any]) -> Grids:
        """See `GridTeller`."""
        sides = [int(side) for side in self._evaluate(*(read(args) for read in self._read))]
        return tuple((sides[i], sides[i + 1], sides[i + 2]) for i in range(0, len(sides), 3))


def _symbol_reader(gm: fx.GraphModule, symbol: sympy.Symbol) -> Callable[[Sequence[Any]], int]:
    """How to read a size symbol from a call's arguments; at compile time they are symbols too."""
    for place, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        value = example(node)
        if isinstance(value, torch.SymInt) and value.node.expr == symbol:
            return lambda args, place=place: hint(args[place])  # type: ignore[misc]
        tensor = example_tensor(node)
        for dim, side in enumerate(tensor.shape if tensor is not None else ()):
            if isinstance(side, torch.SymInt) and side.node.expr == symbol:
                return lambda args, place=place, dim=dim: hint(args[place].shape[dim])  # type: ignore[misc]
    raise LayoutError(f"the grid depends on {symbol}, which no input of the graph shows")


class PositionGrids:
    """The grid read from the values of a rotary or position input, once per new tensor.

    A portrait and a landscape video of equal length share one compiled graph: only the values tell
    them apart. The last tensor is remembered by identity and version; a new one is checked against
    grids already seen on a sample of its rows, and read in full only if none fits.
    """

    def __init__(self, gm: fx.GraphModule, position: PositionInput) -> None:
        self._place = input_positions(gm, [position.node])[0]
        self._axis = position.axis
        self._last: tuple[weakref.ref[torch.Tensor], int, Grids] | None = None
        self._known: list[Grid] = []

    def __call__(self, args: Sequence[Any]) -> Grids:
        """See `GridTeller`. Raises LayoutError where the positions form no raster grid."""
        value = args[self._place]
        version = 0 if value.is_inference() else value._version
        if self._last is not None and self._last[0]() is value and self._last[1] == version:
            return self._last[2]
        grids = (self._read(value),)
        self._last = (weakref.ref(value), version, grids)
        return grids

    def _read(self, value: torch.Tensor) -> Grid:
        rows = position_rows(value, self._axis)
        for grid in self._known:
            if confirms_grid(rows, grid):
                return grid
        found = grid_from_groupings([labels for labels, _ in groupings(rows)])
        if found is None or not found.raster:
            raise LayoutError(
                f"the positions of {rows.shape[0]} video tokens no longer form a T x H x W grid in "
                "raster order; give option grid=(T, H, W) or compile without the veda backend"
            )
        self._known.append(found.grid)
        return found.grid


def total_tokens(grids: Grids) -> int:
    """Video tokens of all segments."""
    return sum(Video(*grid).length for grid in grids)
