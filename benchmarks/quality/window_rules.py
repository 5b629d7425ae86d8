"""Rules that look at places: a window of cubes around the query, and bands in space or in time."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from veda_compile.kernels.plan import TileShape
from veda_compile.kernels.tiles import tile_table

from .rule import CUBE, TILE_SIZE, Choice, Rule, Site, budget, tiled, top
from .scored_rules import raster_shape

FAR = 1000.0
"""Weight of an axis along which a window reaches as far as the video."""

Window = tuple[float, float, float]
"""Ratios of a window's sides along t, h and w."""

WINDOWS: tuple[Window, ...] = tuple(
    (t, h, w) for t, h, w in itertools.product((1.0, 3.0, FAR), repeat=3) if min(t, h, w) == 1.0
)
"""What the sliding tile window is searched over."""


class SlidingWindow(Rule):
    """A box of cubes around the query's cube, shifted inwards at the borders.

    The window is given by ratios of its sides and grows until the budget is spent: cubes go by
    their largest distance along an axis over that axis' ratio, then by their mean one. `windows`
    holds the ratios of every head by layer, found as published, by search for the least error on
    calibration calls; without it windows are cubic.
    """

    name = "sliding window"
    source = "STA, arXiv 2502.04507"

    def __init__(self, windows: dict[int, list[Window]] | None = None) -> None:
        self._windows = windows or {}

    def choose(self, site: Site, density: float) -> Choice:
        """The same for every q and k."""
        windows = self._windows.get(site.layer, [(1.0, 1.0, 1.0)] * site.heads)
        places = _places(site.grid, CUBE)
        apart = (places[:, None] - places).abs()
        ratios = torch.tensor(windows)[:, None, None]
        distance = (apart / ratios).amax(-1) + 1e-3 * (apart / ratios).mean(-1)
        keep = top(-distance, budget(site, CUBE, density))[None]
        return tiled(site, {CUBE: keep}, (CUBE,) * site.heads)


class SpaceOrTime(Rule):
    """Per head a band in space or in time, whichever is nearer to dense on sampled rows.

    Spatial: tokens in raster order, tiles near the query's, so the same frame and its neighbours;
    once more with the first frame always kept, where the budget has room. Temporal: tokens ordered
    by place and then frame, so the same and neighbouring places in all frames.
    """

    name = "space or time per head"
    source = "Sparse-VideoGen, arXiv 2502.01776"
    SAMPLES = 64

    def choose(self, site: Site, density: float) -> Choice:
        """Try all bands on the samples, online."""
        rows = torch.randperm(
            site.layout.length, generator=torch.Generator().manual_seed(site.layer)
        )[: self.SAMPLES]
        logits = site.q[0, :, rows] @ site.k[0].transpose(-1, -2) * site.scale
        dense = logits.softmax(-1) @ site.v[0]
        bands = self._bands(site, density)
        errors = []
        for shape, keep in bands:
            tile = tile_table(site.layout, shape, rows.device).tile_of_token.long()
            part = logits.masked_fill(~keep[tile[rows]][:, tile], -torch.inf)
            errors.append((part.softmax(-1) @ site.v[0] - dense).square().sum((1, 2)))
        best = torch.stack(errors).argmin(0).tolist()
        shapes = tuple(bands[i][0] for i in best)
        keeps = {
            shape: torch.stack([bands[i][1] for i in best if bands[i][0] == shape])[None]
            for shape in dict.fromkeys(shapes)
        }
        return tiled(site, keeps, shapes)

    def _bands(self, site: Site, density: float) -> list[tuple[TileShape, Tensor]]:
        """(tile shape, (n, n) bool kept) of each candidate."""
        space, time = raster_shape(site.grid), temporal_shape(site.grid)
        made = [(shape, _band(budget(site, shape, density))) for shape in (space, time)]
        kept = budget(site, space, density)
        frame = -(-site.grid[1] * site.grid[2] // TILE_SIZE)
        if int(kept.min()) > frame:
            near = -_apart(len(kept))
            near[:, :frame] = torch.inf
            made.append((space, top(near, kept)))
        return made


def temporal_shape(grid: tuple[int, int, int], tile_size: int = TILE_SIZE) -> TileShape:
    """The tile shape that is a run of tokens ordered by place first and frame last.

    Raises ValueError where no box is: the frames do not divide the tile.
    """
    frames, _, width = grid
    places, rest = divmod(tile_size, frames)
    if rest or width % places:
        raise ValueError(f"no tile of grid {grid} is a run of {tile_size} tokens along time")
    return (frames, 1, places)


def _places(grid: tuple[int, int, int], shape: TileShape) -> Tensor:
    """(n, 3) float32: the box coordinates of each tile."""
    sides = [torch.arange(-(-side // step)) for side, step in zip(grid, shape, strict=True)]
    return torch.cartesian_prod(*sides).float()


def _apart(tiles: int) -> Tensor:
    """(n, n) float32: how far tiles are in their order."""
    number = torch.arange(tiles, dtype=torch.float32)
    return (number[:, None] - number).abs()


def _band(kept: Tensor) -> Tensor:
    """(n, n) bool: the nearest tiles in order."""
    return top(-_apart(len(kept)), kept)
