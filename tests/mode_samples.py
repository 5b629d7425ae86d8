"""Static modes of every kind, and the tiles they keep."""

from __future__ import annotations

from veda_compile import Layout
from veda_compile.kernels.plan import TileShape
from veda_compile.kernels.static_modes import StaticMode, static_lists

FULL, SKIP = StaticMode("full"), StaticMode("skip")
DIAGONAL = StaticMode("diagonal", (2, 0))
FRAMES = StaticMode("multi_diagonal", (1, 1))
STRIPE = StaticMode("stripe", columns=((0.0, 0.5, 0.3), (0.9, 0.9, 0.9)))
MODES = (FULL, SKIP, DIAGONAL, StaticMode("diagonal"), FRAMES, StaticMode("multi_diagonal", (3, 0)),
         STRIPE)  # fmt: skip


def kept_by(layout: Layout, shape: TileShape, mode: StaticMode) -> list[list[int]]:
    found = static_lists(layout, shape, mode)
    return [row[:n].tolist() for row, n in zip(found.indices, found.counts, strict=True)]
