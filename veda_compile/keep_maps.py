"""Which key tiles sampled query tiles keep under a score, at many densities at once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .kernels.budget import tiles_to_keep
from .kernels.layout import Layout
from .kernels.plan import TileShape
from .kernels.tiles import tile_table

LADDER = (
    0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0,
)  # fmt: skip
"""Densities at which error is measured; between them it is interpolated."""


def keep_maps(
    scores: Tensor,
    tiles: Tensor,
    layout: Layout,
    shape: TileShape,
    densities: Sequence[float] = LADDER,
) -> Tensor:
    """(K, m, n) bool: what query tiles keep at each density, by the rule of the executors.

    scores: (m, n) of sampled query tiles for all key tiles; -inf for tiles without a valid key.
    tiles: (m,) their numbers. The query's own tile is kept and counted, every video segment has its
    own budget, ties go to the lower number: see docs/method.md, section 3.
    """
    table = tile_table(layout, shape, scores.device)
    scores = scores.clone()
    place = torch.arange(len(tiles), device=scores.device)
    own = scores[place, tiles]
    scores[place, tiles] = torch.where(own > -torch.inf, torch.inf, own)
    budgets = torch.stack([tiles_to_keep(layout, shape, value) for value in densities])
    budgets = budgets.to(scores.device)[:, tiles]  # (K, m, V)
    keep = torch.empty((len(densities), *scores.shape), dtype=torch.bool, device=scores.device)
    for segment, (start, stop) in enumerate(itertools.pairwise(table.starts)):
        part = scores[:, start:stop]
        rank = part.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        keep[..., start:stop] = (rank < budgets[..., segment, None]) & (part > -torch.inf)
    return keep
