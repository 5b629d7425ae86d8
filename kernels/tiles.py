"""Tile tables: which tokens of the sequence belong to which tile."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from .layout import Layout
from .plan import TileShape, count_tiles


@dataclass(frozen=True, eq=False)
class TileTable:
    """All tiles of one layout under one tile shape. Tiles are numbered over all video segments.

    rows: (n, S) int32, token positions of each tile, ascending; ragged tiles end in -1.
    sizes: (n,) int32, real rows S_j of each tile (at least 1).
    tile_of_token: (N,) int32, the tile of each token, -1 for extra tokens.
    starts: first tile of each video segment, and the tile count at the end.
    extra: (E,) int32, positions of the extra tokens, ascending.
    """

    rows: torch.Tensor
    sizes: torch.Tensor
    tile_of_token: torch.Tensor
    starts: tuple[int, ...]
    extra: torch.Tensor

    @property
    def tiles(self) -> int:
        """n, the tiles of all video segments."""
        return self.starts[-1]

    def to(self, device: torch.device) -> TileTable:
        """The same table on another device."""
        return TileTable(
            self.rows.to(device),
            self.sizes.to(device),
            self.tile_of_token.to(device),
            self.starts,
            self.extra.to(device),
        )


@lru_cache(maxsize=256)
def tile_table(layout: Layout, shape: TileShape, device: torch.device) -> TileTable:
    """The table of `layout` under `shape` on `device`; cached, treat it as read-only."""
    if device.type != "cpu":
        return tile_table(layout, shape, torch.device("cpu")).to(device)
    # the device is named throughout: torch.set_default_device must not reach a cached table
    tile_of_token = torch.full((layout.length,), -1, dtype=torch.int64, device=device)
    starts = [0]
    for offset, video in layout.videos:
        (nh, nw) = (-(-video.h // shape[1]), -(-video.w // shape[2]))
        box_t, box_h, box_w = (
            torch.arange(side, device=device) // step
            for side, step in zip(video.grid, shape, strict=True)
        )
        number = (box_t[:, None, None] * nh + box_h[None, :, None]) * nw + box_w[None, None, :]
        tile_of_token[offset : offset + video.length] = number.flatten() + starts[-1]
        starts.append(starts[-1] + count_tiles(video.grid, shape))

    tiles, size = starts[-1], shape[0] * shape[1] * shape[2]
    order = torch.argsort(tile_of_token, stable=True)
    extras = int((tile_of_token < 0).sum())
    sizes = torch.bincount(tile_of_token[order[extras:]], minlength=tiles)
    firsts = sizes.cumsum(0) - sizes
    slot = torch.arange(len(order) - extras, device=device) - firsts.repeat_interleave(sizes)
    rows = torch.full((tiles, size), -1, dtype=torch.int32, device=device)
    rows[tile_of_token[order[extras:]], slot] = order[extras:].int()
    return TileTable(
        rows, sizes.int(), tile_of_token.int(), tuple(starts), order[:extras].int().contiguous()
    )
