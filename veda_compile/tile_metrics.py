"""How much of dense attention a choice of tiles keeps: attention mass, retained mass, Tile Recall.

The mass of a tile pair is the sum of the softmax probabilities from the rows of one tile to those
of the other: what a query tile loses when it drops a key tile (docs/method.md, section 2).
"""

from __future__ import annotations

import math

import torch

from .errors import VedaError
from .kernels.layout import Layout
from .kernels.plan import TileShape
from .kernels.tiles import tile_table

_ROWS_AT_ONCE = 1024  # of one head's probabilities: 16 MB at 4,096 keys


class TileMetricError(VedaError, ValueError):
    """Masses and maps of kept tiles that do not go together."""


@torch.no_grad()
def tile_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    layout: Layout,
    tile_shape: TileShape,
    scale: float | None = None,
    key_valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """The attention mass of every tile pair, from dense attention.

    Costs as much as dense attention and O(N) memory per head.

    Args:
        q: (B, H, Nq, D), floating point.
        k: (B, Hkv, Nk, D); query head h reads head h // (H / Hkv).
        layout: the segments of the Nk keys.
        tile_shape: (pt, ph, pw) of the tiles, for all heads.
        scale: factor on the logits; None is 1 / sqrt(D).
        key_valid: (B, Nk) bool, False for keys that nobody attends to; None for all.

    Returns:
        (B, H, n, n) float32: sum of the probabilities from the queries of tile i to the keys of
        tile j. Rows add up to the queries of the tile, less what goes to keys on no grid.

    Raises:
        LayoutError: the layout does not cover the keys and queries.
    """
    layout.check_length(k.shape[2], q.shape[2])
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    table = tile_table(layout, tile_shape, q.device)
    # tokens in no tile go to a last column, which is cut off
    key_tile = torch.where(table.tile_of_token < 0, table.tiles, table.tile_of_token).long()
    query_tile = torch.where(table.tile_of_query < 0, table.tiles, table.tile_of_query).long()
    batch, heads, queries = q.shape[:3]
    mass = torch.zeros(batch, heads, table.tiles + 1, table.tiles + 1, device=q.device)
    member = torch.nn.functional.one_hot(key_tile, table.tiles + 1).float()
    for b in range(batch):
        for h in range(heads):
            keys = k[b, h * k.shape[1] // heads].float().T * factor
            for first in range(0, queries, _ROWS_AT_ONCE):
                rows = slice(first, first + _ROWS_AT_ONCE)
                logits = q[b, h, rows].float() @ keys
                if key_valid is not None:
                    logits.masked_fill_(~key_valid[b], -torch.inf)
                mass[b, h].index_add_(0, query_tile[rows], logits.softmax(-1) @ member)
    return mass[..., : table.tiles, : table.tiles]


def retained_mass(mass: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The share of the attention mass that lies in kept tiles.

    Args:
        mass: (..., n, m), as `tile_mass` returns it.
        keep: (..., n, m) bool, the kept key tiles of each query tile.

    Returns:
        (...), 1 where everything with mass is kept.

    Raises:
        TileMetricError: the shapes differ, or keep is not bool.
    """
    _check(mass, keep)
    return (mass * keep).sum((-2, -1)) / mass.sum((-2, -1))


def tile_recall(mass: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Tile Recall@k: the share of the oracle's tiles that were kept.

    The oracle keeps in every row as many tiles as `keep` does, those with the most mass (the metric
    of arXiv 2605.30325, which ranks by the largest probability instead).

    Args:
        mass: (..., n, m), as `tile_mass` returns it.
        keep: (..., n, m) bool.

    Returns:
        (...), mean over the rows that keep something.

    Raises:
        TileMetricError: the shapes differ, keep is not bool, or no row keeps anything.
    """
    _check(mass, keep)
    counts = keep.sum(-1, keepdim=True)
    rows = (counts > 0).squeeze(-1)
    if not bool(rows.any(-1).all()):
        raise TileMetricError("no row keeps a tile: there is nothing to recall")
    best_first = torch.argsort(mass, dim=-1, descending=True, stable=True)
    rank = torch.argsort(best_first, dim=-1)
    found = (keep & (rank < counts)).sum(-1) / counts.squeeze(-1).clamp(min=1)
    return (found * rows).sum(-1) / rows.sum(-1)


def _check(mass: torch.Tensor, keep: torch.Tensor) -> None:
    if mass.shape != keep.shape or mass.dim() < 2:
        raise TileMetricError(
            f"mass {tuple(mass.shape)} and keep {tuple(keep.shape)}: must be one shape (..., n, m)"
        )
    if keep.dtype != torch.bool:
        raise TileMetricError(f"keep is {keep.dtype}: must be bool, such as map > 0")
