"""Tile shapes worth trying on a grid."""

from __future__ import annotations

from .kernels.layout import Layout
from .kernels.plan import TileShape, factorisations, padding

MOST_PADDING = 1.35
"""A shape that needs more tiles than this times the ideal number wastes its budget on padding."""


def candidate_shapes(layout: Layout, tile_size: int) -> tuple[TileShape, ...]:
    """Every shape of `tile_size` tokens with acceptable padding on the layout's grids.

    At least the one that pads least. Shapes longer than a side are left out where a shorter one
    gives the same boxes. Source: head-aware tiling, Veda section on tiling (36 powers of two at
    128); here every factorisation.
    """
    shapes = sorted(factorisations(tile_size), key=lambda shape: (padding(layout, shape), shape))
    good = [shape for shape in shapes if padding(layout, shape) <= MOST_PADDING]
    return tuple(good or shapes[:1])
