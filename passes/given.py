"""Given grids: finding the tokens of a grid that the user names, where the graph shows none.

A named grid is believed only where it fits: a run of exactly its number of tokens whose positions,
if there are any, agree; or the first or last tokens of a longer run whose positions form it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from .codes import NONE, Source, SourceKind
from .partition import confirms_grid, grid_from_groupings, groupings
from .positions import Evidence, Part, PositionInput, batch_axis, position_elements
from .token_map import TokenMap, coordinates, varying_axes

Grid = tuple[int, int, int]


def spelled(grid: Grid) -> str:
    """ "5x6x10", as reasons and reports write it."""
    return "x".join(map(str, grid))


@dataclass(frozen=True)
class Given:
    """Grids of consecutive video segments, in the order of the sequence, and who named them.

    measured: they were read from the latent, so that they are beyond doubt.
    """

    grids: tuple[Grid, ...]
    evidence: Evidence
    measured: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of all segments."""
        return sum(math.prod(grid) for grid in self.grids)

    def __str__(self) -> str:
        return f"{self.evidence.value} {' + '.join(map(spelled, self.grids))}"


@dataclass(frozen=True, eq=False)
class Span:
    """A run of the sequence. counter: an input that has as many rows in every call, if known."""

    start: int
    length: int
    counter: PositionInput | None

    @property
    def stop(self) -> int:
        """The first token after the run."""
        return self.start + self.length


@dataclass(frozen=True, eq=False)
class Place:
    """Where the given grids start in the sequence, and the input that confirms it, if any."""

    start: int
    position: PositionInput | None


@dataclass(frozen=True, eq=False)
class Positions:
    """Real values of a position input that stand for the tokens `start` to `start + len(rows)`."""

    start: int
    rows: torch.Tensor
    node: fx.Node
    axis: int
    batch: int | None = None

    @property
    def stop(self) -> int:
        """The first token after them."""
        return self.start + self.rows.shape[0]

    @property
    def of_text(self) -> bool:
        """Whether the positions count the tokens one by one, as those of text and audio do."""
        return len(groupings(self.rows)) < 2 and _counts(self.rows)

    @property
    def silent(self) -> bool:
        """Whether the positions cannot tell a grid, because every feature mixes its axes.

        Features that mix axes take nearly as many values as there are tokens; a few may coincide,
        by symmetry or by rounding. A feature of one axis takes at most half as many.
        """
        found = groupings(self.rows)
        mixed = all(2 * int(labels.max() + 1) > self.rows.shape[0] for labels, _ in found)
        return (len(found) < 2 or mixed) and not _counts(self.rows)

    @property
    def of_one_frame(self) -> bool:
        """Whether the positions form a grid of one frame."""
        return one_frame(self.rows) is not None


def one_frame(rows: torch.Tensor) -> Grid | None:
    """(1, H, W) where positions (N, F) are those of one frame in raster order, else None."""
    found = [labels for labels, _ in groupings(rows)]
    still = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
    flat = grid_from_groupings([still, *found]) if len(found) > 1 else None
    return flat.grid if flat is not None and flat.raster and flat.grid[0] == 1 else None


def _counts(rows: torch.Tensor) -> bool:
    """Whether every column (N,) is a number that grows evenly, or its sine or cosine.

    Such a column c fulfils c[i + 1] + c[i - 1] = k c[i] for some k; where a row of a video ends and
    the next begins, positions jump.
    """
    if rows.shape[0] < 3:
        return True
    exact = torch.finfo(rows.dtype).eps if rows.dtype.is_floating_point else 0.0
    columns = rows.to(torch.float64)
    middle, around = columns[1:-1], columns[2:] + columns[:-2]
    factor = (middle * around).sum(0) / (middle * middle).sum(0).clamp_min(1e-30)
    error = (around - factor * middle).abs().amax(0)
    return bool((error <= min(2000 * exact + 1e-9, 0.05) * columns.abs().amax(0)).all())


def find_place(given: Given, spans: Sequence[Span], positions: Sequence[Positions]) -> Place | None:
    """The one place where `given` fits among the runs of a sequence."""
    wanted = given.tokens
    found = [
        place
        for known in positions
        for place in _places_by_position(given, known)
        if any(span.start <= place.start and place.start + wanted <= span.stop for span in spans)
    ]
    for span in spans:
        told = [
            known
            for known in positions
            if known.start < span.stop and span.start < known.start + known.rows.shape[0]
        ]
        if span.length == wanted and all(known.silent for known in told):
            found.append(Place(span.start, span.counter))
    found.sort(key=lambda place: place.position is not None)
    starts = {place.start: place for place in found}  # of places that start alike, the best proven
    return next(iter(starts.values())) if len(starts) == 1 else None


def _places_by_position(given: Given, known: Positions) -> list[Place]:
    count, wanted = known.rows.shape[0], given.tokens
    parts = {Part.ALL: 0} if count == wanted else {Part.FIRST: 0, Part.LAST: count - wanted}
    return [
        Place(known.start + offset, PositionInput(known.node, known.axis, part, batch=known.batch))
        for part, offset in parts.items()
        if count >= wanted and confirms(given.grids, known.rows[offset : offset + wanted])
    ]


def confirms(grids: Sequence[Grid], rows: torch.Tensor) -> bool:
    """Whether positions (N, F) form the given grids, one after the other, each in raster order."""
    lengths = [math.prod(grid) for grid in grids]
    return rows.shape[0] == sum(lengths) and all(
        confirms_grid(part, grid) for part, grid in zip(rows.split(lengths), grids, strict=True)
    )


def part_of(rows: torch.Tensor, part: Part, count: int) -> torch.Tensor:
    """The first, the last or all of the rows; fewer than `count` where there are no more."""
    if part is Part.ALL:
        return rows
    return rows[:count] if part is Part.FIRST else rows[max(rows.shape[0] - count, 0) :]


def position_values(
    tokens: TokenMap, holders: Mapping[Source, fx.Node], values: Mapping[fx.Node, object]
) -> list[Positions]:
    """The position inputs whose rows, all of them, are consecutive tokens of the sequence."""
    found = []
    for source, columns in tokens.positional.items():
        node = holders.get(source)  # none for positions that an index of the graph has moved
        value = None if node is None else values.get(node)
        if source.kind is not SourceKind.INPUT or not _readable(value):
            continue
        assert node is not None and isinstance(value, torch.Tensor)
        held = (columns != NONE).any(1).nonzero().flatten()
        if not held.numel():
            continue
        start, stop = int(held[0]), int(held[-1]) + 1
        rows = columns[start:stop].amax(1)
        axes = varying_axes(source, rows)
        if stop - start != held.numel() or len(axes) != 1 or batch_axis(tokens, source) == axes[0]:
            continue
        side = source.shape[axes[0]]
        if torch.equal(coordinates(source, rows)[axes[0]], torch.arange(side)):
            batch = batch_axis(tokens, source)
            read = position_elements(value, axes[0], batch)[0]
            found.append(Positions(start, read, node, axes[0], batch))
    return found


def _readable(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not torch._subclasses.fake_tensor.is_fake(value)
