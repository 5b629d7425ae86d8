"""Grid tellers: the T x H x W grids of a compiled graph's attention sites, call by call."""

from __future__ import annotations

import itertools
import math
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import sympy
import torch
from torch import fx

from .errors import LayoutError
from .kernels.layout import Video
from .passes.given import Grid, confirms, one_frame, part_of
from .passes.partition import confirms_grid, grid_from_groupings, groupings, sampled
from .passes.positions import Part, PositionInput, position_elements
from .passes.rewrite import input_positions
from .passes.sizes import example, example_tensor, hint
from .told import Grids, told_grids

T = TypeVar("T")

_KEPT_ROWS = 32
"""Position tables remembered: a model is rarely called at more sizes in turn."""

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


class _Positions:
    """The position inputs of a call."""

    def __init__(self, gm: fx.GraphModule, position: PositionInput) -> None:
        inputs = ((position.node, position.axis, position.batch), *position.others)
        self._places = input_positions(gm, [node for node, *_ in inputs])
        self._axes = [(axis, batch) for _, axis, batch in inputs]
        self._rows = slice(None) if position.rows is None else slice(*position.rows)

    def of(self, args: Sequence[Any]) -> list[torch.Tensor]:
        """The position inputs among a call's arguments."""
        return [args[place] for place in self._places]

    def rows(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """(N, F) rows of the video tokens, once for every batch element that has its own."""
        read = [
            position_elements(value, axis, batch)
            for value, (axis, batch) in zip(values, self._axes, strict=True)
        ]
        if len(read) == 1:
            return [rows[self._rows] for rows in read[0]]
        return [
            torch.cat([rows.to(torch.float64) for rows in parts], 1)[self._rows]
            for parts in itertools.product(*read)
        ]


class _Seen:
    """Tensors that were read, to be recognised while they are the same and unchanged."""

    def __init__(self, values: Sequence[torch.Tensor]) -> None:
        self._values = [weakref.ref(value) for value in values]
        self._versions = _versions(values)

    def still(self, values: Sequence[torch.Tensor]) -> bool:
        """Whether these are the very tensors, with the contents they had."""
        if any(value.is_inference() for value in values):  # they count no versions
            return False
        same = all(ref() is value for ref, value in zip(self._values, values, strict=True))
        return same and self._versions == _versions(values)


def _versions(values: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Change where a tensor is written to or given other memory."""
    if any(value.is_inference() for value in values):
        return []
    return [(value._version, value.data_ptr()) for value in values]


class _Remembered(Generic[T]):
    """Answers about rows of positions. Models make the same rows anew on every call: rows whose
    sample was met before get the answer they got then."""

    def __init__(self, ask: Callable[[torch.Tensor, Grids], T]) -> None:
        self._ask = ask
        self._met: deque[tuple[int, torch.Tensor, Grids, T]] = deque(maxlen=_KEPT_ROWS)

    def __call__(self, rows: torch.Tensor, grids: Grids = ()) -> T:
        """The answer for (N, F) rows, and the grids they are asked about."""
        sample = sampled(rows)
        for count, met, about, answer in self._met:
            alike = (count, about) == (rows.shape[0], grids) and met.dtype == sample.dtype
            if alike and torch.equal(met, sample):
                return answer
        answer = self._ask(rows, grids)
        self._met.appendleft((rows.shape[0], sample, grids, answer))
        return answer


class PositionGrids:
    """The grid read from the values of a rotary or position input, once per new tensor.

    A portrait and a landscape video of equal length share one compiled graph: only the values tell
    them apart. The last tensor is remembered by identity and version; a new one is checked against
    grids already seen on a sample of its rows, and read in full only if none fits.
    """

    def __init__(self, gm: fx.GraphModule, position: PositionInput) -> None:
        self._positions = _Positions(gm, position)
        self._last: tuple[_Seen, Grids] | None = None
        self._known: list[Grid] = []
        self._grid_of = _Remembered(self._read)

    def __call__(self, args: Sequence[Any]) -> Grids:
        """See `GridTeller`. Raises LayoutError where the positions form no raster grid."""
        values = self._positions.of(args)
        if self._last is None or not self._last[0].still(values):
            grids = {self._grid_of(rows) for rows in self._positions.rows(values)}
            if len(grids) > 1:
                raise LayoutError(
                    f"the positions of this call tell the grids {sorted(grids)}, each of a part of "
                    "the batch: call the model with videos of one grid at a time"
                )
            self._last = (_Seen(values), tuple(grids))
        return self._last[1]

    def _read(self, rows: torch.Tensor, _: Grids) -> Grid:
        for grid in self._known:
            if confirms_grid(rows, grid):
                return grid
        found = grid_from_groupings([labels for labels, _ in groupings(rows)])
        if found is None:
            frame = one_frame(rows)
            if frame is not None:
                return frame
        if found is None or not found.raster:
            raise LayoutError(
                f"the positions of {rows.shape[0]} video tokens no longer form a T x H x W grid in "
                "raster order; give option grid=(T, H, W) or compile without the veda backend"
            )
        self._known.append(found.grid)
        return found.grid


class GivenGrids:
    """Grids that the user names, checked on every call against positions or a number of tokens.

    Where no input tells these, the op checks that the sequence has room for exactly these grids.
    """

    def __init__(
        self, gm: fx.GraphModule, option: Grids | None, count: int, position: PositionInput | None
    ) -> None:
        """option: the grids of option `grid`; None to take those that `attach` tells per call.
        count: how many grids the graph has room for."""
        self._option = option
        self._count = count
        self._positions = None if position is None else _Positions(gm, position)
        self._part = Part.ALL if position is None else position.part
        self._checked = _Remembered(self._check)
        self._count_place: tuple[int, int] | None = None
        if position is not None and position.part is Part.COUNT:
            self._count_place = (input_positions(gm, [position.node])[0], position.axis)
        self._last: tuple[_Seen, Grids] | None = None

    def __call__(self, args: Sequence[Any]) -> Grids:
        """See `GridTeller`. Raises LayoutError where no grid is told or positions contradict it."""
        grids = self._option or told_grids()
        if grids is None:
            raise LayoutError(
                "this graph was compiled with the grid that veda_compile.attach told, but no "
                "attached model tells one for this call: call veda_compile.attach(model) on the "
                "model that makes it, with grid=(T, H, W) if it cannot be told automatically"
            )
        if len(grids) != self._count:
            raise LayoutError(
                f"veda_compile.attach tells {len(grids)} grids for this call, but told "
                f"{self._count} when the graph was compiled: tell the same number on every call"
            )
        if self._count_place is not None:
            place, axis = self._count_place
            if args[place].shape[axis] != total_tokens(grids):
                raise LayoutError(
                    f"the video has {args[place].shape[axis]} tokens, but option grid or "
                    f"veda_compile.attach names grids of {total_tokens(grids)}, {grids}: name "
                    "those of this call"
                )
        elif self._positions is not None:
            values = self._positions.of(args)
            if self._last is None or self._last[1] != grids or not self._last[0].still(values):
                for rows in self._positions.rows(values):
                    self._checked(rows, grids)
                self._last = (_Seen(values), grids)
        return grids

    def _check(self, rows: torch.Tensor, grids: Grids) -> None:
        if not confirms(grids, part_of(rows, self._part, total_tokens(grids))):
            raise LayoutError(
                f"the positions of {rows.shape[0]} tokens do not hold the grids {grids} that "
                "option grid or veda_compile.attach names: name those of this call"
            )


def total_tokens(grids: Grids) -> int:
    """Video tokens of all segments."""
    return sum(Video(*grid).length for grid in grids)
