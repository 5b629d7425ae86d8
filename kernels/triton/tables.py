"""What the kernels need to know about a layer: all heads' tile tables stacked into one tensor.

Heads may differ in tile shape, hence in tables and in number of tiles. One launch serves them all:
every head has the number of its first table row, and programs past its last tile return at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import triton

from ..budget import tiles_to_keep
from ..layout import Layout
from ..plan import TileShape
from ..tiles import tile_table
from . import keys

# the device is named: torch.set_default_device must not reach a cached table
_INTS: dict[str, Any] = {"dtype": torch.int32, "device": "cpu"}


@dataclass(frozen=True, eq=False)
class LayerTables:
    """Stacked tile tables; R table rows over all groups of heads, V video segments.

    rows: (R, S) int32, keys of each tile, -1 where a tile has no more. A group's video tiles come
        first, then `extra_tiles` tiles that hold the extra and context tokens.
    query_rows: (R, S) int32, queries of each tile. A group's video tiles come first, then
        `extra_query_tiles` tiles that hold the extra tokens, then empty ones.
    log_sizes: (R,) float32, log of the real rows of each tile of keys.
    first: (H,) int32, the row of `rows` where the head's tiles begin.
    starts: (H, V + 1) int32, first tile of each video segment of the head, and its tile count.
    most_tiles: the largest tile count of any head. extra_tiles, extra_query_tiles: the same for
        all heads.
    """

    rows: torch.Tensor
    query_rows: torch.Tensor
    log_sizes: torch.Tensor
    first: torch.Tensor
    starts: torch.Tensor
    most_tiles: int
    extra_tiles: int
    extra_query_tiles: int

    @property
    def segments(self) -> int:
        """Video segments of the layout."""
        return self.starts.shape[1] - 1

    @property
    def tile_size(self) -> int:
        """Tokens per tile, S."""
        return self.rows.shape[1]

    @cached_property
    def all_keys(self) -> KeyRows:
        """The keys where none is ruled out."""
        return KeyRows(self.rows[None], self.log_sizes[None])


@dataclass(frozen=True, eq=False)
class KeyRows:
    """The stacked table as keys see it: rows (B or 1, R, S) and log_sizes (B or 1, R)."""

    rows: torch.Tensor
    log_sizes: torch.Tensor

    @property
    def rows_stride(self) -> int:
        """Elements of `rows` from one batch element to the next; 0 when they share."""
        return self.rows.stride(0) if self.rows.shape[0] > 1 else 0

    @property
    def log_stride(self) -> int:
        """Elements of `log_sizes` from one batch element to the next; 0 when they share."""
        return self.log_sizes.stride(0) if self.log_sizes.shape[0] > 1 else 0


@lru_cache(maxsize=256)
def layer_tables(
    layout: Layout, tile_shapes: tuple[TileShape, ...], device: torch.device
) -> LayerTables:
    """The stacked tables of `layout` for heads with `tile_shapes`; cached, read-only."""
    cpu = torch.device("cpu")
    shapes = list(dict.fromkeys(tile_shapes))
    tables = [tile_table(layout, shape, cpu) for shape in shapes]
    size = tables[0].rows.shape[1]
    extra_query_tiles = -(-len(tables[0].extra_queries) // size)
    extra = _extra_tiles(tables[0].extra, size, -(-len(tables[0].extra) // size))
    # every query without a grid is such a key too: as many tiles hold them
    extra_queries = _extra_tiles(tables[0].extra_queries, size, len(extra))
    begin, begins = 0, {}
    for shape, table in zip(shapes, tables, strict=True):
        begins[shape] = begin
        begin += table.tiles + extra.shape[0]
    starts = {shape: table.starts for shape, table in zip(shapes, tables, strict=True)}
    rows = torch.cat([block for table in tables for block in (table.rows, extra)])
    query_rows = torch.cat([b for table in tables for b in (table.query_rows, extra_queries)])
    return LayerTables(
        rows.to(device),
        query_rows.to(device),
        _log_sizes(rows).to(device),
        torch.tensor([begins[shape] for shape in tile_shapes], **_INTS).to(device),
        torch.tensor([starts[shape] for shape in tile_shapes], **_INTS).to(device),
        max(table.tiles for table in tables),
        extra.shape[0],
        extra_query_tiles,
    )


def key_rows(tables: LayerTables, key_valid: torch.Tensor | None) -> KeyRows:
    """The table without the keys that `key_valid` (B, Nk) bool rules out.

    Taking them out here spares every kernel a second mask.
    """
    return tables.all_keys if key_valid is None else valid_rows(tables.rows, key_valid)


def valid_rows(table: torch.Tensor, key_valid: torch.Tensor) -> KeyRows:
    """`table` (R, S) int32, numbers of keys or -1, without those that `key_valid` rules out.

    key_valid: (B, Nk) bool. One launch; nothing is read back to the host.
    """
    device, batch = key_valid.device, key_valid.shape[0]
    rows = torch.empty((batch, *table.shape), dtype=torch.int32, device=device)
    log_sizes = torch.empty(rows.shape[:2], dtype=torch.float32, device=device)
    gpu = device.type == "cuda"  # Triton launches on the current GPU, which need not be this one
    with torch.cuda.device(device) if gpu else contextlib.nullcontext():
        keys.valid_keys_kernel[(triton.cdiv(rows.shape[1], keys.ROWS), batch)](
            table,
            key_valid,
            rows,
            log_sizes,
            *key_valid.stride(),
            rows.shape[1],
            TILE=table.shape[1],
            ROWS=keys.ROWS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return KeyRows(rows, log_sizes)


def budget_table(
    layout: Layout,
    tile_shapes: tuple[TileShape, ...],
    density: Sequence[float],
    most_tiles: int,
    device: torch.device,
) -> tuple[torch.Tensor, int]:
    """(h, n, V) int32 tiles kept by query tile, 0 past a head's last; entries of the longest list.

    For heads of these shapes and densities; n is `most_tiles`. A row that keeps every tile has no
    list. The entries come from budgets alone: sizing a selection waits for no device data.
    """
    keeps = [
        tiles_to_keep(layout, shape, share)
        for shape, share in zip(tile_shapes, density, strict=True)
    ]
    budgets = torch.zeros(len(keeps), most_tiles, keeps[0].shape[1], **_INTS)
    longest = 0
    for head, keep in enumerate(keeps):
        tiles = keep.shape[0]
        budgets[head, :tiles] = keep
        kept = keep.sum(-1)
        longest = max(longest, int(kept.where(kept < tiles, 0).max()))
    return budgets.to(device), longest


def _log_sizes(rows: torch.Tensor) -> torch.Tensor:
    """Log of the rows counted in each tile, -inf for none."""
    return torch.log((rows >= 0).sum(-1).float())


def _extra_tiles(positions: torch.Tensor, tile_size: int, count: int) -> torch.Tensor:
    """(count, S) int32: `positions` cut into tiles, -1 after the last."""
    padded = positions.new_full((count * tile_size,), -1)
    padded[: len(positions)] = positions
    return padded.view(count, tile_size)
