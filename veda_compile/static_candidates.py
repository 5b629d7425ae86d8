"""Static modes worth trying for a head, and the columns of its stripe (arXiv 2506.03065)."""

from __future__ import annotations

import math
from functools import lru_cache

from torch import Tensor

from .kernels.layout import Layout
from .kernels.plan import TileShape
from .kernels.static_modes import StaticMode, mode_density, static_lists

MOST_DENSITY = 0.6
"""A mode that keeps more than this saves too little to be worth its error."""

STRIPE_COLUMNS = (2, 4, 8, 16)
"""How many columns a stripe may have."""


@lru_cache(maxsize=256)
def window_candidates(layout: Layout, shape: TileShape) -> tuple[StaticMode, ...]:
    """Skip, diagonals and multi-diagonals of doubling reach, none twice and none too dense."""
    found = [StaticMode("skip")]
    seen: set[bytes] = set()
    frames, rows, columns = (
        max(-(-video.grid[side] // shape[side]) for _, video in layout.videos) for side in range(3)
    )

    def offer(mode: StaticMode) -> None:
        if mode_density(layout, shape, mode) > MOST_DENSITY:
            return
        content = static_lists(layout, shape, mode).indices.numpy().tobytes()
        if content not in seen:
            seen.add(content)
            found.append(mode)

    for reach in doubling(frames * rows * columns):
        offer(StaticMode("diagonal", (reach, 0)))
    for reach in doubling(frames):
        for around in doubling(rows * columns):
            offer(StaticMode("multi_diagonal", (reach, around)))
    return tuple(found)


def stripe_of(mass: Tensor, layout: Layout, shape: TileShape, columns: int) -> StaticMode | None:
    """The stripe through the heaviest tiles of the first video segment; None if it has too few.

    mass: (n,) what all query tiles put on each key tile.
    """
    _, video = layout.videos[0]
    sides = [-(-side // step) for side, step in zip(video.grid, shape, strict=True)]
    tiles = math.prod(sides)
    if columns > tiles // 2:
        return None
    heaviest = sorted(int(tile) for tile in mass[:tiles].topk(columns).indices)
    # the middle of a tile, so that a share maps back to it
    places = [
        (tile // (sides[1] * sides[2]), tile // sides[2] % sides[1], tile % sides[2])
        for tile in heaviest
    ]
    return StaticMode(
        "stripe",
        columns=tuple(
            tuple((at + 0.5) / side for at, side in zip(place, sides, strict=True))  # type: ignore[misc]
            for place in places
        ),
    )


def doubling(end: int) -> list[int]:
    """0, 1, 2, 4, ... below `end`."""
    return [0, *(1 << power for power in range(max(end - 1, 0).bit_length()) if 1 << power < end)]
