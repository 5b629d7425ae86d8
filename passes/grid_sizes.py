"""Grid sizes as expressions of the graph, so that one compiled graph serves every resolution."""

from __future__ import annotations

import math
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from .codes import NONE, Source
from .layout import SiteLayout
from .positions import Evidence
from .provenance import Provenance
from .runs import Run
from .sizes import Length, Size, SizeOf, equal, example_tensor, expression, hint
from .token_map import coordinates

_PER_CALL = (Evidence.VALUES, Evidence.EARLIER, Evidence.OPTION, Evidence.ATTACHED)
"""Evidence that is not a function of the graph's sizes: equally long calls may differ in it."""


@dataclass(frozen=True, eq=False)
class LayoutSizes:
    """The sizes of a layout in the graph's own terms.

    grids: (T, H, W) per video run; None where they are told per call.
    extras: length per extra run, None for "the rest".
    expressions: the grids as sympy expressions of the graph's size symbols.
    """

    grids: tuple[tuple[Length, Length, Length], ...] | None
    extras: tuple[Length | None, ...]
    expressions: tuple[tuple[sympy.Expr, sympy.Expr, sympy.Expr], ...]


def find_sizes(
    layout: SiteLayout, tokens: Size, provenance: Provenance, graph: fx.Graph
) -> LayoutSizes | None:
    """Sizes of `layout` for a sequence of `tokens`; None if they cannot be proven.

    A proof is that the expressions of all runs add up to the expression of the sequence length.
    Sizes that tracing fixed are constants: a guard protects them.
    """
    extra_runs = [run for run in layout.runs if run.grid is None]
    if layout.evidence in _PER_CALL:
        return _per_call_sizes(layout, tokens, provenance, graph)
    if not isinstance(tokens, torch.SymInt):
        grids = tuple(_fixed(run) for run in layout.videos)
        extras = tuple(run.length for run in extra_runs)
        exprs = tuple(tuple(sympy.Integer(side) for side in grid) for grid in grids)
        return LayoutSizes(grids, extras, exprs)  # type: ignore[arg-type]
    located = [_locate_grid(run, provenance, graph) for run in layout.videos]
    if any(grid is None for grid in located):
        return None
    grids_found = [grid for grid in located if grid is not None]
    lengths = [_locate_extra(run, provenance, graph) for run in extra_runs]
    if sum(length is None for length in lengths) > 1:
        return None
    exprs_found = [tuple(_expression(side) for side in grid) for grid in grids_found]
    total = sum((math.prod(sides) for sides in exprs_found), sympy.Integer(0))
    total += sum(_expression(length) for length in lengths if length is not None)
    whole = expression(tokens)
    if None not in lengths:
        proven = equal(total, whole)
    else:  # one run takes the rest; the video's part must at least be visible in the length
        rest = sympy.expand(whole - total)
        proven = not _has_product(rest, exprs_found)
    if not proven:
        return None
    return LayoutSizes(tuple(grids_found), tuple(lengths), tuple(exprs_found))  # type: ignore[arg-type]


def _per_call_sizes(
    layout: SiteLayout, tokens: Size, provenance: Provenance, graph: fx.Graph
) -> LayoutSizes | None:
    """The lengths of the extra runs, where every call tells the grids of the video runs.

    An input that proves the video's part of a call lets one run take the rest. Without one the
    lengths must leave exactly the grids' tokens, and the op checks that they do.
    """
    runs = [run for run in layout.runs if run.grid is None]
    position = layout.position_input
    if position is not None and position.rows is not None and isinstance(tokens, torch.SymInt):
        return None
    proven = position is not None or layout.evidence is Evidence.EARLIER
    lengths: tuple[Length | None, ...] = (None,)
    if len(runs) != 1 or not proven:
        lengths = tuple(_locate_extra(run, provenance, graph) for run in runs)
    if not isinstance(tokens, torch.SymInt) and lengths.count(None) > proven:
        lengths = tuple(run.length for run in runs)
    return None if lengths.count(None) > proven else LayoutSizes(None, lengths, ())


def _has_product(rest: sympy.Expr, grids: list[tuple[sympy.Expr, ...]]) -> bool:
    """Whether a remainder still holds a term with all of a grid's symbols: then it is no rest."""
    terms = sympy.Add.make_args(rest)
    wanted = [set().union(*(side.free_symbols for side in grid)) for grid in grids]
    return any(
        symbols and symbols <= term.free_symbols
        for term in terms
        for symbols in wanted
        if len(symbols) > 1
    )


def _fixed(run: Run) -> tuple[int, int, int]:
    assert run.grid is not None
    return run.grid


def _expression(length: Length) -> sympy.Expr:
    return expression(length.size) if isinstance(length, SizeOf) else sympy.Integer(length)


def _locate_grid(
    run: Run, provenance: Provenance, graph: fx.Graph
) -> tuple[Length, Length, Length] | None:
    if run.grid is None or len(run.sides) != 3:
        return None
    sides = [
        _locate(source, axis, count, provenance, graph)
        for (source, axis), count in zip(run.sides, run.grid, strict=True)
    ]
    if any(side is None for side in sides):
        return None
    t, h, w = (side for side in sides if side is not None)
    return t, h, w


def _locate_extra(run: Run, provenance: Provenance, graph: fx.Graph) -> Length | None:
    if len(run.sides) != 1:
        return None
    source, axis = run.sides[0]
    return _locate(source, axis, run.length, provenance, graph)


def _locate(
    source: Source, axis: int, count: int, provenance: Provenance, graph: fx.Graph
) -> Length | None:
    """A side of some tensor along which only `axis` of `source` varies, `count` times."""
    if count == 1:
        return 1
    for node, tracked in provenance.values.items():
        held = getattr(tracked, "codes", {})
        codes = held.get(source, held.get(source.root))
        tensor = example_tensor(node)
        if codes is None or tensor is None or node.graph is not graph:
            continue
        for dim, side in enumerate(codes.shape):
            if side == count and hint(tensor.shape[dim]) == count:
                line = codes
                for other in reversed(range(codes.dim())):
                    if other != dim:
                        line = line.select(other, 0)
                if _along(source, axis, line):
                    size = tensor.shape[dim]
                    return SizeOf(node, dim, size) if isinstance(size, torch.SymInt) else int(size)
    return None


def _along(source: Source, axis: int, line: torch.Tensor) -> bool:
    if bool((line == NONE).any()):
        return False
    for place, index in enumerate(coordinates(source, line)):
        changes = torch.unique(index).numel()
        if changes != (line.numel() if place == axis else 1):
            return False
    return True
