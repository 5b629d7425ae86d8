"""Tile statistics in plain torch: the moments of each tile's rows that scores are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class TileStatistics:
    """Statistics over the counted rows of each tile, all float32.

    count: (B or 1, 1, n), rows counted. mean, second (E[x^2]), variance: (B, h, n, D).
    highest, lowest: (B, h, n, D), or None unless asked for. Tiles without a counted row hold zeros.
    """

    count: torch.Tensor
    mean: torch.Tensor
    second: torch.Tensor
    variance: torch.Tensor
    highest: torch.Tensor | None
    lowest: torch.Tensor | None


def tile_statistics(
    x: torch.Tensor, tile_rows: torch.Tensor, valid: torch.Tensor | None, extremes: bool
) -> TileStatistics:
    """Statistics of x (B, h, N, D) over tiles, in float32.

    tile_rows: (n, S) int32, the rows of x in each tile, -1 for none. valid: (B, N) bool, rows to
    count, or None for all. The variance takes two passes: E[x^2] -
    E[x]^2 loses up to 31 % on RMS-normed keys (docs/method.md, section 2).
    """
    batch, heads, _, head_dim = x.shape
    tiles, size = tile_rows.shape
    safe = tile_rows.clamp(min=0).long().flatten()
    rows = x.index_select(2, safe).view(batch, heads, tiles, size, head_dim).float()
    counted = (tile_rows >= 0)[None]
    if valid is not None:
        counted = counted & valid.index_select(1, safe).view(batch, tiles, size)
    mask = counted[:, None, :, :, None]
    count = counted.sum(-1)[:, None].float()
    safe_count = count.clamp(min=1.0)[..., None]
    # where, not multiplication: padding may hold NaN
    rows = torch.where(mask, rows, 0.0)
    mean = rows.sum(3) / safe_count
    second = (rows * rows).sum(3) / safe_count
    centred = torch.where(mask, rows - mean[:, :, :, None], 0.0)
    variance = (centred * centred).sum(3) / safe_count
    highest = lowest = None
    if extremes:
        some = (count > 0)[..., None]
        highest = torch.where(mask, rows, -torch.inf).amax(3).where(some, 0.0)
        lowest = torch.where(mask, rows, torch.inf).amin(3).where(some, 0.0)
    return TileStatistics(count, mean, second, variance, highest, lowest)
