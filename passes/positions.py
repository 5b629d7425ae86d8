"""Positional evidence: grids told by positions that reach q and k but not v.

Positions are computed in the graph or held in buffers, or they are values of a graph input (rotary
tables, coordinates). Either way the partition test decides.
"""

from __future__ import annotations

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
    OPTION = "option grid"


@dataclass(frozen=True, eq=False)
class PositionInput:
    """A graph input whose rows along `axis` are the video tokens, in order."""

    node: fx.Node
    axis: int


@dataclass(frozen=True, eq=False)
class Say:
    """What one kind of positional evidence says about a run."""

    found: PositionGrid | None
    sides: tuple[tuple[Source, int], ...] = ()
    position_input: PositionInput | None = None


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
    made: list[tuple[torch.Tensor, tuple[Source, int]]] = []
    for source, columns in tokens.positional.items():
        if source.kind is not SourceKind.INPUT:
            made += _axis_groupings(source, columns[rows])
            continue
        read = _value_groupings(source, columns[rows], values.get(holders[source]))
        held = told.get(Evidence.VALUES)
        if read is not None and (held is None or held.found is None):
            position = PositionInput(holders[source], read[1])
            told[Evidence.VALUES] = Say(grid_from_groupings(read[0]), (), position)
    if made:
        distinct = _distinct(made)
        found = grid_from_groupings([labels for labels, _ in distinct])
        sides = () if found is None else tuple(distinct[i][1] for i in found.members)
        told = {Evidence.POSITIONS: Say(found, sides), **told}
    return told


def _axis_groupings(
    source: Source, columns: torch.Tensor
) -> list[tuple[torch.Tensor, tuple[Source, int]]]:
    """The groupings of columns that follow one axis of a source, with that axis."""
    found = []
    for labels, column in groupings(columns):
        codes = columns[:, column]
        axes = varying_axes(source, codes)
        if len(axes) == 1 and not bool((codes == NONE).any()):
            found.append((labels, (source, axes[0])))
    return found


def _value_groupings(
    source: Source, columns: torch.Tensor, value: object
) -> tuple[list[torch.Tensor], int] | None:
    """Groupings by the values of a positional input whose rows are the run's tokens in order."""
    rows = columns.amax(1)
    axes = varying_axes(source, rows)
    if bool((rows == NONE).any()) or len(axes) != 1:
        return None
    places = coordinates(source, rows)[axes[0]]
    if not torch.equal(places, torch.arange(source.shape[axes[0]])):
        return None
    if not isinstance(value, torch.Tensor) or torch._subclasses.fake_tensor.is_fake(value):
        return None
    return [labels for labels, _ in groupings(position_rows(value, axes[0]))], axes[0]


def position_rows(value: torch.Tensor, axis: int) -> torch.Tensor:
    """(N, F) rows of a positional tensor along `axis`, first batch element, complex as pairs."""
    if value.is_complex():
        value = torch.view_as_real(value)
    value = value.detach().movedim(axis, 0)
    return value.reshape(value.shape[0], -1)


def _distinct(
    made: list[tuple[torch.Tensor, tuple[Source, int]]],
) -> list[tuple[torch.Tensor, tuple[Source, int]]]:
    kept: list[tuple[torch.Tensor, tuple[Source, int]]] = []
    for labels, side in made:
        if not any(torch.equal(labels, other) for other, _ in kept):
            kept.append((labels, side))
    return kept
