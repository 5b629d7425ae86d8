"""How many key tiles each query tile keeps: the equal-cost budget.

A shape that pads more needs more tiles for the same grid; it must not buy more work with them. So
the number of tiles kept per query tile is density * n_ideal^2 / n, n_ideal being the tiles of a
grid that needs no padding (docs/method.md, section 3).
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from functools import lru_cache

import torch

from .layout import Layout
from .plan import TileShape, count_tiles, ideal_tiles

_LARGEST_DENOMINATOR = 10**9  # a density is the simple fraction it stands for: 0.1 is 1/10


@lru_cache(maxsize=4096)  # layers x heads may each have a density of their own
def tiles_to_keep(layout: Layout, shape: TileShape, density: float) -> torch.Tensor:
    """(n, V) int32 on CPU: tiles query tile r keeps in each of the V video segments.

    Every key segment has a budget of its own. The fractional part f of a query tile's share is
    spread evenly over the query tiles of a segment by their number r: one more where
    floor((r+1) f) > floor(r f). At least one tile, at most all of them; density 1.0 keeps all.
    Cached, treat it as read-only.
    """
    videos = [video for _, video in layout.videos]
    size = math.prod(shape)
    exact = Fraction(density).limit_denominator(_LARGEST_DENOMINATOR)
    counts = [count_tiles(video.grid, shape) for video in videos]
    blocks = []
    for q_video, q_tiles in zip(videos, counts, strict=True):
        columns = []
        for k_video, k_tiles in zip(videos, counts, strict=True):
            if density >= 1.0:
                columns.append([k_tiles] * q_tiles)
                continue
            total = exact * ideal_tiles(q_video, size) * ideal_tiles(k_video, size)
            # exact arithmetic: in floats 3 * (1/3) can fall short of 1, which loses a tile
            share, unit = total.numerator, total.denominator * q_tiles
            before = [r * share // unit for r in range(q_tiles + 1)]
            kept = [after - here for here, after in itertools.pairwise(before)]
            columns.append([min(max(k, 1), k_tiles) for k in kept])
        blocks.append(torch.tensor(columns, dtype=torch.int32, device="cpu").T)
    return torch.cat(blocks).contiguous()


def kept_density(layout: Layout, shape: TileShape, density: float) -> float:
    """The share of tile pairs that `tiles_to_keep` really keeps, over all video segments."""
    keep = tiles_to_keep(layout, shape, density)
    return float(keep.sum()) / keep.shape[0] ** 2
