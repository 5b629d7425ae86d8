"""Tile tables: which tokens of the sequence belong to which tile."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from .layout import Layout
from .plan import TileShape, count_tiles


@dataclass(frozen=True, eq=False)
class TileTable:
    """All tiles of one layout under one tile shape. Tiles are numbered over all video segments.

    Tokens are numbered twice: among the Nk keys and, context tokens left out, among the Nq queries.

    rows: (n, S) int32, keys of each tile, ascending; ragged tiles end in -1.
    query_rows: (n, S) int32, the same tokens among the queries.
    sizes: (n,) int32, real rows S_j of each tile (at least 1).
    tile_of_token: (Nk,) int32, the tile of each key, -1 for extra and context tokens.
    tile_of_query: (Nq,) int32, the tile of each query, -1 for extra tokens.
    starts: first tile of each video segment, and the tile count at the end.
    extra: (E,) int32, keys in no tile: extra and context tokens, ascending.
    extra_queries: (X,) int32, queries in no tile: extra tokens, ascending.
    """

    rows: torch.Tensor
    query_rows: torch.Tensor
    sizes: torch.Tensor
    tile_of_token: torch.Tensor
    tile_of_query: torch.Tensor
    starts: tuple[int, ...]
    extra: torch.Tensor
    extra_queries: torch.Tensor

    @property
    def tiles(self) -> int:
        """n, the tiles of all video segments."""
        return self.starts[-1]

    def to(self, device: torch.device) -> TileTable:
        """The same table on another device."""
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in vars(self).items()
        }
        return TileTable(**moved)


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
    tile_of_token = tile_of_token.int()
    extra = order[:extras].int().contiguous()
    query = _query_of_key(layout, device)
    is_query = query >= 0
    return TileTable(
        rows,
        torch.where(rows < 0, -1, query[rows.clamp(min=0)]),
        sizes.int(),
        tile_of_token,
        tile_of_token[is_query],
        tuple(starts),
        extra,
        query[extra[is_query[extra]]],
    )


def tiles_with_keys(table: TileTable, valid: torch.Tensor | None) -> torch.Tensor:
    """(B, n) bool, or (1, n) where `valid` is None: tiles with a key that counts.

    valid: (B, Nk) bool on the table's device, or None for all keys.
    """
    there = table.rows >= 0
    if valid is None:
        return there.any(-1)[None]
    counted = valid[:, table.rows.clamp(min=0).long().flatten()].view(-1, *there.shape)
    return (counted & there).any(-1)


def _query_of_key(layout: Layout, device: torch.device) -> torch.Tensor:
    """(Nk,) int32, the number among the queries of each key, -1 for context tokens."""
    is_query = torch.ones(layout.length, dtype=torch.bool, device=device)
    for first, context in layout.contexts:
        is_query[first : first + context.length] = False
    return torch.where(is_query, is_query.cumsum(0) - 1, -1).int()
