"""Rules that score tile pairs and keep the same number in every row."""

from __future__ import annotations

import torch
from torch import Tensor

from veda_compile.kernels.plan import TileShape

from .rule import CUBE, TILE_SIZE, Choice, Rule, Site, gathered, means, ranked


def raster_shape(grid: tuple[int, int, int], tile_size: int = TILE_SIZE) -> TileShape:
    """The tile shape that is a run of `tile_size` tokens in raster order.

    Raises ValueError where no box is: rows or frames that do not divide the run.
    """
    _, height, width = grid
    if width % tile_size == 0:
        return (1, 1, tile_size)
    rows, rest = divmod(tile_size, width)
    if rest == 0 and height % rows == 0:
        return (1, rows, width)
    raise ValueError(f"no tile of grid {grid} is a raster run of {tile_size} tokens")


class Random(Rule):
    """The query's own tile and others at random: what any rule must beat."""

    name = "random"
    source = "-"

    def choose(self, site: Site, density: float) -> Choice:
        """Seeded by the layer and the first key, so that calls differ and runs do not."""
        seed = site.layer + 64 * int(site.k[0, 0, 0, 0].abs() * 1e4)
        n = site.layout.length // TILE_SIZE
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(1, site.heads, n, n, generator=generator) + torch.eye(n)
        return ranked(site, scores, CUBE, density)


class MeanPool(Rule):
    """mean(q_i) . mean(k_j) of two tiles, the top k of each row (VSA's coarse stage and others)."""

    source = "mean-pool top-k; cubes: VSA, arXiv 2505.13389"

    def __init__(self, cubes: bool) -> None:
        self.cubes = cubes
        self.name = "mean-pool cubes" if cubes else "mean-pool raster"

    def choose(self, site: Site, density: float) -> Choice:
        """One product of the pooled tiles."""
        shape = CUBE if self.cubes else raster_shape(site.grid)
        scores = means(site.q, site, shape) @ means(site.k, site, shape).transpose(-1, -2)
        return ranked(site, scores, shape, density)


class SubBlock(Rule):
    """log-sum-exp over the sub-block pairs of two tiles, of their mean products.

    Each tile is cut into `PARTS` runs of its rows: 16 tokens of 64, as published.
    """

    name = "sub-block LSE"
    source = "SubBlock, sgl-project/sglang #34148"
    PARTS = 4

    def choose(self, site: Site, density: float) -> Choice:
        """The same number in every row."""
        return ranked(site, self.scores(site), CUBE, density)

    def scores(self, site: Site) -> Tensor:
        """(1, H, n, n): log sum_ab exp(mean(q_ia) . mean(k_jb) / sqrt D)."""
        q, k = (self._pooled(x, site) for x in (site.q, site.k))
        products = torch.einsum("zhiad,zhjbd->zhijab", q, k) * site.scale
        return products.flatten(-2).logsumexp(-1)

    def _pooled(self, x: Tensor, site: Site) -> Tensor:
        """(1, H, n, PARTS, D)."""
        rows, real = gathered(x, site, CUBE)
        sums = rows.unflatten(3, (self.PARTS, -1)).sum(4)
        counts = real.unflatten(1, (self.PARTS, -1)).sum(2)
        pooled: Tensor = sums / counts.clamp(min=1)
        return pooled
