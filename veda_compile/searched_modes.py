"""Static modes that a search of tile shapes tries beside scores: which, what they cost and keep.

On one video segment the share of tile pairs that a mode keeps follows from the sides of the grid
in tiles, so that no list of tiles is made for the many modes that are never taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .kernels.layout import Layout, Video
from .kernels.plan import TileShape, padding
from .kernels.static_modes import StaticMode
from .sidecar_schema import Grid
from .static_candidates import MOST_DENSITY, STRIPE_COLUMNS, doubling

MOST_COLUMNS = max(STRIPE_COLUMNS)
"""The most columns of a stripe that a search comes to."""

_MOST_STEP = 3.0
"""Modes that cost more than this times the density wanted are not tried."""


@dataclass(frozen=True)
class SearchedModes:
    """The static modes tried under one tile shape on one video segment.

    tiles, frame: tiles of the grid, and of one of its frames. windows: modes without columns.
    stripes: numbers of columns. costs: of the windows, then of the stripes: shares of tile pairs
    kept, times the square of the shape's padding, since a shape that pads has more tiles and a
    share of its pairs is more work.
    """

    tiles: int
    frame: int
    windows: tuple[StaticMode, ...]
    stripes: tuple[int, ...]
    costs: tuple[float, ...]

    def kept_by_windows(self, rows: Tensor) -> Tensor:
        """(M, m, n) bool: the key tiles that the query tiles `rows` (m,) int64 keep."""
        at, keys = rows[:, None], torch.arange(self.tiles, device=rows.device)
        limits = torch.tensor([self._limits(mode) for mode in self.windows], device=rows.device)
        raster, frames, around = limits.T[..., None, None]
        keep: Tensor = (at - keys).abs() <= raster
        keep &= (at // self.frame - keys // self.frame).abs() <= frames
        keep &= (at % self.frame - keys % self.frame).abs() <= around
        return keep

    def _limits(self, mode: StaticMode) -> tuple[int, int, int]:
        """How far apart two tiles may be: by raster number, in frames, by number in the frame."""
        if mode.kind == "multi_diagonal":
            return (self.tiles, *mode.reach)
        return (mode.reach[0] if mode.kind == "diagonal" else -1, self.tiles, self.tiles)

    def kept_by_stripes(self, mass: Tensor, which: Tensor, rows: Tensor) -> Tensor:
        """(S, m, n) bool: the heaviest key tiles, and the query tile's own.

        mass: (p, n) on key tiles. which: (m,) int64, the row of `mass` that is each query tile's.
        rows: (m,) int64, the query tiles.
        """
        heaviest = mass.topk(max(self.stripes)).indices
        found = torch.zeros((len(self.stripes), *mass.shape), dtype=torch.bool, device=mass.device)
        for place, columns in enumerate(self.stripes):
            found[place].scatter_(1, heaviest[:, :columns], True)
        keep = found[:, which]
        keep[:, torch.arange(len(rows), device=mass.device), rows] = True
        return keep


@lru_cache(maxsize=256)
def searched_modes(grid: Grid, shape: TileShape, density: float) -> SearchedModes:
    """What is worth trying on a grid where `density` is wanted in the mean over all heads."""
    frames, rows, columns = (-(-side // step) for side, step in zip(grid, shape, strict=True))
    frame, tiles = rows * columns, frames * rows * columns
    padded = padding(Layout.of(Video(*grid)), shape) ** 2

    def affordable(pairs: int) -> bool:
        share = pairs / tiles**2
        return share <= MOST_DENSITY and share * padded <= _MOST_STEP * density

    windows = {StaticMode("skip"): 0}
    for reach in doubling(tiles):
        windows[StaticMode("diagonal", (reach, 0))] = _pairs(tiles, reach)
    # of one frame, or one tile a frame, they are diagonals; so are those of no reach at all
    for reach in doubling(frames) if min(frames, frame) > 1 else []:
        for around in doubling(frame):
            if reach or around:
                pairs = _pairs(frames, reach) * _pairs(frame, around)
                windows[StaticMode("multi_diagonal", (reach, around))] = pairs
    stripes = {
        count: tiles * (count + 1) - count for count in STRIPE_COLUMNS if count <= tiles // 2
    }
    windows = {mode: pairs for mode, pairs in windows.items() if affordable(pairs)}
    stripes = {count: pairs for count, pairs in stripes.items() if affordable(pairs)}
    costs = [pairs / tiles**2 * padded for pairs in (*windows.values(), *stripes.values())]
    return SearchedModes(tiles, frame, tuple(windows), tuple(stripes), tuple(costs))


def _pairs(size: int, reach: int) -> int:
    """Pairs of numbers below `size` that are at most `reach` apart."""
    return size * (2 * reach + 1) - reach * (reach + 1)
