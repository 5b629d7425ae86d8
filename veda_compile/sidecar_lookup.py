"""Looking up a plan: the nearest grid a sidecar knows, and densities for another budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from .candidate_shapes import MOST_PADDING, candidate_shapes
from .errors import SidecarError
from .kernels.layout import Layout, Video
from .kernels.plan import TileShape, padding
from .kernels.static_modes import Modes, StaticMode, mode_density
from .sidecar_schema import Grid, GridPlan

_STATIC_SLACK = 0.05
"""Share of a mean density by which static heads alone may fall short of it."""

_LEAST_LEFT = 0.5
"""Of the mean density, what static heads must leave to scored ones on a grid that is not theirs."""

_SAME_SIZE = 2.0
"""Static modes count tiles: on a grid of so many times more or fewer tokens they mean another."""


@dataclass(frozen=True)
class GridMatch:
    """Which grid's plan was used. exact: whether it is the one that was asked for."""

    exact: bool
    used: Grid


def nearest_grid(grid: Grid, known: Iterable[Grid]) -> GridMatch:
    """The grid itself if known; else the one of nearest aspect ratio, then of nearest length.

    Aspect ratio is columns / rows and length is the number of tokens, both compared by the
    difference of logarithms. Remaining ties go to the nearest number of frames, then to the
    smaller grid. `known` must not be empty.
    """
    grids = list(known)
    if grid in grids:
        return GridMatch(True, grid)

    def distance(other: Grid) -> tuple[float, float, float, Grid]:
        # Rounded: equal aspect ratios of different grids differ in the last bits.
        return (
            round(abs(math.log(grid[2] * other[1]) - math.log(grid[1] * other[2])), 9),
            round(abs(math.log(math.prod(grid)) - math.log(math.prod(other))), 9),
            round(abs(math.log(grid[0]) - math.log(other[0])), 9),
            other,
        )

    return GridMatch(False, min(grids, key=distance))


def density_factor(densities: Sequence[float], mean: float) -> float:
    """The factor c for which min(1, c * d), averaged over `densities`, is `mean`.

    densities: each in (0, 1]; mean: in (0, 1]. Heads that reach 1 keep everything and what they
    cannot take goes to the others in proportion, so the allocation's ratios survive.
    """
    if mean >= 1.0:
        return math.inf  # exactly 1 for every head, whatever rounding does
    ascending = sorted(densities)
    below = [0.0, *accumulate(ascending)]  # below[n]: sum of the n smallest
    factor = 1.0
    for rest in range(len(ascending), 0, -1):
        # The heads above the `rest` smallest are full; these share what is left.
        full = len(ascending) - rest
        factor = (mean * len(ascending) - full) / below[rest]
        if factor * ascending[rest - 1] <= 1.0:
            break
    return factor


def fitted_plan(plan: GridPlan, grid: Grid, mean: float | None = None) -> GridPlan:
    """A plan made for another grid, with what does not fit `grid` replaced.

    Where a head's tiles would pad more than any candidate may (`MOST_PADDING`), the candidate of
    the most similar sides takes their place, scored: a static mode is a rule over the tiles it was
    measured with. Where the grids' tokens differ by more than `_SAME_SIZE`, all static heads become
    scored, but those of plans without scored heads.
    mean: the mean density wanted, or None. Static heads, which may keep more here than where they
    were measured, become scored, the one that keeps most first, until the scored ones have
    `_LEAST_LEFT` of the mean each.
    """
    layout = Layout.of(Video(*grid))
    ratio = math.prod(grid) / math.prod(plan.grid)
    layers = range(len(plan.tile_shapes))
    mixed = not all(all(plan.modes_of(index) or (None,)) for index in layers)
    keep = not mixed or 1.0 / _SAME_SIZE <= ratio <= _SAME_SIZE
    shapes: list[tuple[TileShape, ...]] = []
    modes: list[list[StaticMode | None]] = []
    for index, of_layer in enumerate(plan.tile_shapes):
        fit = [padding(layout, shape) <= MOST_PADDING for shape in of_layer]
        static = plan.modes_of(index) or (None,) * len(of_layer)
        shapes.append(
            tuple(
                shape if fits else _similar_shape(layout, shape)
                for shape, fits in zip(of_layer, fit, strict=True)
            )
        )
        modes.append([m if fits and keep else None for m, fits in zip(static, fit, strict=True)])
    if mean is not None and mean < 1.0:
        _leave_room(layout, shapes, modes, mean)
    kept: tuple[Modes, ...] = tuple(tuple(of_layer) for of_layer in modes)
    return replace(plan, tile_shapes=tuple(shapes), modes=kept)


def _similar_shape(layout: Layout, shape: TileShape) -> TileShape:
    """The candidate the fewest halvings and doublings away; of equals the one that pads least."""

    def distance(other: TileShape) -> tuple[float, float, TileShape]:
        steps = sum(abs(math.log2(a / b)) for a, b in zip(shape, other, strict=True))
        return round(steps, 9), padding(layout, other), other

    return min(candidate_shapes(layout, math.prod(shape)), key=distance)


def _leave_room(
    layout: Layout,
    shapes: Sequence[Sequence[TileShape]],
    modes: Sequence[list[StaticMode | None]],
    mean: float,
) -> None:
    """Take static modes out of `modes` until scored heads have room; see `fitted_plan`."""
    kept = sorted(
        (_static_cost(layout, shape, mode), index, head)
        for index, (of_layer, static) in enumerate(zip(shapes, modes, strict=True))
        for head, (shape, mode) in enumerate(zip(of_layer, static, strict=True))
        if mode is not None
    )
    heads = sum(len(of_layer) for of_layer in modes)
    taken = sum(cost for cost, _, _ in kept)
    if len(kept) == heads and taken <= mean * heads:
        return
    while kept and mean * heads - taken < _LEAST_LEFT * mean * (heads - len(kept)):
        cost, index, head = kept.pop()
        modes[index][head] = None
        taken -= cost


def _static_cost(layout: Layout, shape: TileShape, mode: StaticMode) -> float:
    """What a static head keeps, as a share of the tile pairs of a grid without padding."""
    # a shape that pads has more tiles, so that a share of its pairs is more work
    return mode_density(layout, shape, mode) * padding(layout, shape) ** 2


def scored_factor(plan: GridPlan, grid: Grid, mean: float) -> float:
    """What to multiply the densities of scored heads by, so that all heads keep `mean` on average.

    Heads of all layers count: scored ones with their density, which stops at 1, static ones with
    what their mode keeps on `grid`, which stays; both as shares of the tile pairs of a grid without
    padding. Static heads alone are as near to the mean as
    whole tiles allow: they are taken as they are up to `_STATIC_SLACK` below it. Raises
    SidecarError where they keep too much or too little for the mean to be met.
    """
    layout = Layout.of(Video(*grid))
    scored: list[float] = []
    kept: list[float] = []
    for index, (shapes, density) in enumerate(zip(plan.tile_shapes, plan.density, strict=True)):
        modes = plan.modes_of(index) or (None,) * len(shapes)
        for shape, value, mode in zip(shapes, density, modes, strict=True):
            if mode is None:
                scored.append(value)
            else:
                kept.append(_static_cost(layout, shape, mode))
    heads = len(scored) + len(kept)
    least, most = sum(kept) / heads, (sum(kept) + len(scored)) / heads
    if not kept:
        return density_factor(scored, mean)
    if not scored and (1.0 - _STATIC_SLACK) * mean <= least <= mean + 1e-9:
        return 1.0
    if not scored or not least < mean <= most + 1e-9:
        remedy = f"give one above {least:.4f} and at most {most:.4f}, or 1.0 to keep everything"
        if not scored:
            remedy = "give none, or 1.0 to keep everything"
        raise SidecarError(
            f"density {mean} cannot be met on grid {grid}: {len(kept)} of {heads} heads are static "
            f"and keep a share of {least:.4f} of all heads' tiles: {remedy}"
        )
    return density_factor(scored, min((mean * heads - sum(kept)) / len(scored), 1.0))
