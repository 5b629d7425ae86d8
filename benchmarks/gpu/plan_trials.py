"""Trials of the check whose plans hold more than shapes and densities: factors, static modes, and
what a distilled sidecar brings on a grid that it was not made for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from veda_compile.kernels.layout import Context, Extra, Layout, Video
from veda_compile.kernels.plan import Plan, TileShape
from veda_compile.kernels.static_modes import Modes, StaticMode
from veda_compile.sidecar import Sidecar

if TYPE_CHECKING:
    from benchmarks.gpu.check import Trial

SIDECAR = (
    Path(__file__).resolve().parents[2]
    / "examples" / "reference_model" / "distilled.veda.safetensors"
)  # fmt: skip
"""Plans of a real model: scored heads of many shapes, windows and stripes."""

_RANKS = (1, 8)
_COLUMNS = tuple((i / 7, i / 5 % 1.0, i / 3 % 1.0) for i in range(7))
_KINDS: Modes = (
    StaticMode("full"),
    StaticMode("skip"),
    StaticMode("diagonal", (2, 0)),
    StaticMode("multi_diagonal", (1, 2)),
    StaticMode("stripe", columns=_COLUMNS),
    StaticMode("stripe", columns=_COLUMNS[:1]),
)
_SHAPES: dict[int, tuple[TileShape, ...]] = {
    64: (
        (2, 4, 8), (1, 8, 8), (4, 4, 4), (1, 2, 32), (8, 4, 2), (1, 1, 64), (2, 16, 2), (64, 1, 1),
    ),
    128: (
        (4, 4, 8), (1, 8, 16), (2, 8, 8), (1, 4, 32), (8, 4, 4), (1, 1, 128), (2, 32, 2),
        (16, 8, 1),
    ),
}  # fmt: skip
"""Eight shapes by tile size, most important first."""


def mixed_shapes(heads: int, tile_size: int) -> tuple[TileShape, ...]:
    """A tile shape per head, eight different ones in turn; tile_size is 64 or 128."""
    shapes = _SHAPES[tile_size]
    return tuple(shapes[head % len(shapes)] for head in range(heads))


def plan_trials(plain: Trial, grid: tuple[int, int, int]) -> Iterator[Trial]:
    """Trials like `plain` (its dtype, head_dim and tile size) around a video of `grid`."""
    size, dim = plain.tile_size, plain.head_dim
    video = Video(*grid)
    layout = Layout.of(Extra(3), video, Extra(70))
    several = Layout.of(Context(2), Extra(3), video, Video(1, *grid[1:]), Extra(70), Context(66))
    plain = replace(plain, layout=layout, batch=2)
    for rank in _RANKS:
        yield replace(plain, name=f"factors of rank {rank}", plan=_scored(size, dim, rank))
    yield replace(plain, name="factors beside projections", plan=_scored(size, dim, 8, True))
    everything = _static(_KINDS, size)
    yield replace(plain, name="static modes alone", plan=everything, kv_heads=2)
    yield replace(plain, name="static modes, two videos", plan=everything, layout=several)
    mixed = _static((None, *_KINDS, None), size)
    yield replace(plain, name="static and scored heads", plan=mixed)
    yield replace(plain, name="static and scored, padded", plan=mixed, layout=several, padded=True)
    yield replace(plain, name="static and scored, keep_all", plan=mixed, keep_all=True)
    yield replace(plain, name="eight shapes", plan=_static((None,) * 8, size), kv_heads=8)


def sidecar_trials(plain: Trial, grid: tuple[int, int, int]) -> Iterator[Trial]:
    """Every layer of the reference model's sidecar, planned on a grid it has no plan for."""
    sidecar = Sidecar.load(SIDECAR)
    layout = Layout.of(Video(*grid), Extra(7))
    for card in sidecar.model.layers:
        plan, _ = sidecar.plan_for(card.name, grid)
        yield replace(
            plain,
            name=f"sidecar's {card.name}",
            layout=layout,
            head_dim=card.head_dim,
            tile_size=sidecar.tile_size,
            plan=plan,
            kv_heads=plan.heads,
        )


def _scored(size: int, dim: int, rank: int, projected: bool = False) -> Plan:
    """Two heads of different shapes and densities, with factors and perhaps projections."""
    generator = torch.Generator().manual_seed(rank)
    factors = torch.randn(2, 2, dim, rank, generator=generator) / dim**0.5
    projection = None
    if projected:
        projection = 0.1 * torch.randn(2, 2, 3 * dim, dim, generator=generator)
    score = "projection" if projected else "closed_form"
    return Plan(mixed_shapes(2, size), (0.3, 0.6), score, projection, factors)


def _static(modes: Modes, size: int) -> Plan:
    heads = len(modes)
    density = tuple(0.15 + 0.1 * (head % 4) for head in range(heads))
    return Plan(mixed_shapes(heads, size), density, modes=modes)
