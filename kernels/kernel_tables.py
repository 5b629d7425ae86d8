"""Where the kernel for Hopper was measured faster than the portable one; see `executors.choose`.

Written by `python -m benchmarks.cost_table --gpu FOLDER --write`; do not edit.
"""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """Calls that are timed together. generation: the major compute capability."""

    generation: int
    dtype: str
    head_dim: int
    tile_size: int


FASTER: dict[Kind, float] = {}
"""So many times as fast, in the case where it gained least."""
