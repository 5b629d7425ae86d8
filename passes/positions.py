"""Positional evidence: grids told by positions that reach q and k but not v.

Positions are computed in the graph or held in buffers, or they are values of a graph input (rotary
tables, coordinates). Either way the partition test decides.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import fx

from .codes import NONE, Source, SourceKind
from .partition import PositionGrid, grid_from_groupings, groupings
from .token_map import TokenMap, coordinates, varying_axes


class Evidence(Enum):
    """How a grid was found."""

    LATENT = "axes of the latent"
    POSITIONS = "positions computed in the graph"
    VALUES = "values of a position input"
    EARLIER = "what earlier graphs tell"
    OPTION = "option grid"
    ATTACHED = "veda_compile.attach"


class Part(Enum):
    """Which rows of a position input are the video tokens.

    COUNT: all of an input whose rows are as many as the tokens, but say nothing of their places.
    """

    ALL = "all"
    FIRST = "first"
    LAST = "last"
    COUNT = "count"


@dataclass(frozen=True, eq=False)
class PositionInput:
    """A graph input whose rows along `axis`, or the first or last of them, are the video tokens.

    rows: (first, last + 1) of the video's rows where they are told by number; sizes are then fixed.
    others: further inputs, with `axis` and `batch`, whose rows belong to the same tokens: together
        they tell the grid where none does alone.
    batch: the axis along which every batch element has rows of its own; None where they share them.
    """

    node: fx.Node
    axis: int
    part: Part = Part.ALL
    rows: tuple[int, int] | None = None
    others: tuple[tuple[fx.Node, int, int | None], ...] = ()
    batch: int | None = None


@dataclass(frozen=True, eq=False)
class Say:
    """What one kind of positional evidence says about a run.

    order: the run's tokens in raster order where they stand otherwise and their places are known.
    reads: graph inputs whose values moved the positions to where they stand.
    """

    found: PositionGrid | None
    sides: tuple[tuple[Source, int], ...] = ()
    position_input: PositionInput | None = None
    order: torch.Tensor | None = None
    reads: frozenset[fx.Node] = frozenset()


Told = dict[Evidence, Say]


def position_grids(
    tokens: TokenMap,
    rows: slice,
    holders: Mapping[Source, fx.Node],
    values: Mapping[fx.Node, object],
) -> Told:
    """What positions say about some rows of the sequence, by kind of evidence.

    {} where there are no positions. holders: the node of every source. values: example inputs by
    placeholder, real tensors where they can be read.
    """
    told: Told = {}
    whole: list[_Whole] = []
    made: list[tuple[torch.Tensor, tuple[Source, int]]] = []
    for source, columns in tokens.positional.items():
        if source.kind is not SourceKind.INPUT:
            made += _axis_groupings(source, columns[rows]) + _table_axes(source, columns[rows])
            continue
        holder = holders.get(source.root)
        if holder is None:  # a table that entered an earlier graph: where its rows went is known
            made += _axis_groupings(source, columns[rows]) + _table_axes(source, columns[rows])
            continue
        holder = holders[source.root]
        batch = batch_axis(tokens, source)
        read = _value_groupings(source, columns[rows], values.get(holder), batch)
        held = told.get(Evidence.VALUES)
        if read is not None and (held is None or held.found is None):
            labels, axis, part = read
            position = PositionInput(holder, axis, rows=part, batch=batch)
            grid = grid_from_groupings(labels)
            told[Evidence.VALUES] = Say(grid, (), position, reads=source.reads)
            if part is None and not source.reads:
                whole.append((labels, holder, axis, batch))
    if len(whole) > 1 and told[Evidence.VALUES].found is None:
        told[Evidence.VALUES] = _together(whole)
    if made:
        distinct = _distinct(made)
        found = grid_from_groupings([labels for labels, _ in distinct])
        sides = () if found is None else tuple(distinct[i][1] for i in found.members)
        order = None if found is None or found.raster else found.joint.argsort()
        reads = frozenset(node for source, _ in sides for node in source.reads)
        told = {Evidence.POSITIONS: Say(found, sides, order=order, reads=reads), **told}
    return told


_Whole = tuple[list[torch.Tensor], fx.Node, int, int | None]
"""Groupings by an input all of whose rows are the tokens, the input, its axes of rows and batch."""


def _together(whole: list[_Whole]) -> Say:
    """What several position inputs say about the same tokens, such as one input per axis."""
    grid = grid_from_groupings([labels for found, *_ in whole for labels in found])
    (_, node, axis, batch), *others = whole
    further = tuple((n, a, b) for _, n, a, b in others)
    return Say(grid, (), PositionInput(node, axis, others=further, batch=batch))


def batch_axis(tokens: TokenMap, source: Source) -> int | None:
    """The first axis of a source along which batch elements have positions of their own."""
    return min(tokens.batch_axes.get(source, ()), default=None)


def _axis_groupings(
    source: Source, columns: torch.Tensor
) -> list[tuple[torch.Tensor, tuple[Source, int]]]:
    """The groupings of columns that follow one axis of a source, with that axis."""
    found = []
    for _, column in groupings(columns):
        codes = columns[:, column]
        axes = varying_axes(source, codes)
        if len(axes) == 1 and not bool((codes == NONE).any()):
            places = coordinates(source, codes)[axes[0]]
            labels = torch.unique(places, return_inverse=True)[1]  # in the order of the axis
            found.append((labels, (source, axes[0])))
    return found


def _table_axes(
    source: Source, columns: torch.Tensor
) -> list[tuple[torch.Tensor, tuple[Source, int]]]:
    """The groupings by the axes of a table with three of them, such as (T, H, W, features)."""
    rows = columns.amax(1)
    axes = [] if bool((rows == NONE).any()) else varying_axes(source, rows)
    if len(axes) != 3:
        return []
    places = coordinates(source, rows)
    return [(torch.unique(places[axis], return_inverse=True)[1], (source, axis)) for axis in axes]


def table_spans(tokens: TokenMap, holders: Mapping[Source, fx.Node]) -> list[tuple[int, int]]:
    """(start, stop) of the tokens to which tables went that entered earlier graphs."""
    return [
        held
        for source, columns in tokens.positional.items()
        if source.kind is SourceKind.INPUT and source.root not in holders
        for held in _held(columns)
    ]


def made_spans(tokens: TokenMap) -> list[tuple[int, int]]:
    """(start, stop) of the stretches to which the same of the graph's own positions went."""
    edges = {
        edge
        for source, columns in tokens.positional.items()
        if source.kind is not SourceKind.INPUT
        for held in _held(columns)
        for edge in held
    }
    return list(itertools.pairwise(sorted(edges)))


def _held(columns: torch.Tensor) -> list[tuple[int, int]]:
    """(start, stop) of the tokens that (N, F) positions went to; [] for none."""
    held = (columns != NONE).any(1).nonzero().flatten()
    return [(int(held[0]), int(held[-1]) + 1)] if held.numel() else []


def _value_groupings(
    source: Source, columns: torch.Tensor, value: object, batch: int | None
) -> tuple[list[torch.Tensor], int, tuple[int, int] | None] | None:
    """Groupings by the values of a positional input whose rows are the run's tokens in order.

    With the axis of those rows, and which they are unless all.
    """
    rows = columns.amax(1)
    axes = varying_axes(source, rows)
    if bool((rows == NONE).any()) or len(axes) != 1 or batch == axes[0]:
        return None
    places = coordinates(source, rows)[axes[0]]
    first, last = int(places[0]), int(places[-1]) + 1
    if last - first != places.numel() or not torch.equal(places, torch.arange(first, last)):
        return None
    if not isinstance(value, torch.Tensor) or torch._subclasses.fake_tensor.is_fake(value):
        return None
    read, *others = (
        [labels for labels, _ in groupings(element[first:last])]
        for element in position_elements(value, axes[0], batch)
    )
    if not all(_same_groupings(read, other) for other in others):
        return None
    part = None if last - first == source.shape[axes[0]] else (first, last)
    return read, axes[0], part


def _same_groupings(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def position_rows(value: torch.Tensor, axis: int) -> torch.Tensor:
    """(N, F) rows of a positional tensor along `axis`, complex as pairs."""
    if value.is_complex():
        value = torch.view_as_real(value)
    value = value.detach().movedim(axis, 0)
    return value.reshape(value.shape[0], -1)


def position_elements(value: torch.Tensor, axis: int, batch: int | None) -> list[torch.Tensor]:
    """(N, F) rows as `position_rows` gives them, of every element along `batch`. Equal elements
    are one."""
    if batch is None:
        return [position_rows(value, axis)]
    axis -= batch < axis
    first, *others = value.unbind(batch)
    distinct = [first, *(other for other in others if not torch.equal(first, other))]
    return [position_rows(element, axis) for element in distinct]


def _distinct(
    made: list[tuple[torch.Tensor, tuple[Source, int]]],
) -> list[tuple[torch.Tensor, tuple[Source, int]]]:
    kept: list[tuple[torch.Tensor, tuple[Source, int]]] = []
    for labels, side in made:
        if not any(torch.equal(labels, other) for other, _ in kept):
            kept.append((labels, side))
    return kept
