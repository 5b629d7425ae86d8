"""Looking up a plan: the nearest grid a sidecar knows, and densities for another budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from .sidecar_schema import Grid


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
