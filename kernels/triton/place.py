"""Placing the lists of static heads into a selection on the device, one launch for all of them."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from ..call import Selection
from ..layout import Layout
from ..plan import TileShape
from ..static_modes import Modes, StaticMode, static_lists
from .configs import choose_warps
from .tables import KeyRows, LayerTables

_WHOLE = -1  # in place of a width
_INTS: dict[str, Any] = {"dtype": torch.int32, "device": "cpu"}


@triton.jit
def place_kernel(
    heads_ptr,
    lists_ptr,
    list_counts_ptr,
    log_sizes_ptr,
    first_ptr,
    starts_ptr,
    indices_ptr,
    counts_ptr,
    keep_all_ptr,
    log_batch,
    all_heads,
    segments,
    most_tiles,
    width,
    FLAGGED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program copies the list of one query tile of one static head, less tiles without keys.

    heads: (h, 4) int32, the rows of `StaticTable.heads`; indices: (B, H, n, width) int32; counts:
    (B, H, n) int32; all contiguous. FLAGGED: keep_all is one bool, True keeps every tile; without
    it keep_all is not read. A row that keeps every tile gets no list.
    """
    row = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    head_ptr = heads_ptr + tl.program_id(1) * 4
    head = tl.load(head_ptr)
    list_width = tl.load(head_ptr + 2)
    tiles = tl.load(starts_ptr + head * (segments + 1) + segments)
    whole = list_width < 0
    if FLAGGED:
        whole = whole | tl.load(keep_all_ptr)

    columns = tl.arange(0, COLUMNS)
    list_rows = tl.where(whole, 0, tiles)
    list_counts = list_counts_ptr + tl.load(head_ptr + 3)
    count = tl.load(list_counts + row, mask=row < list_rows, other=0)
    lists = lists_ptr + tl.load(head_ptr + 1) + row * list_width
    listed = columns < count
    entry = tl.load(lists + columns, mask=listed, other=0)
    log_sizes = log_sizes_ptr + batch * log_batch + tl.load(first_ptr + head)
    log_size = tl.load(log_sizes + entry, mask=listed, other=-float("inf"))
    kept = (log_size > -float("inf")).to(tl.int32)

    line = (batch * all_heads + head) * most_tiles + row
    place = tl.cumsum(kept, 0) - 1
    tl.store(indices_ptr + line * width + place, entry, mask=kept > 0)
    everything = tl.where(row < tiles, tiles, 0)
    tl.store(counts_ptr + line, tl.where(whole, everything, tl.sum(kept, 0)))


@dataclass(frozen=True, eq=False)
class StaticTable:
    """The lists of a layer's static heads, one after the other.

    heads: (h, 4) int32: the head's number, where its lists begin in `lists`, how wide they are, and
        where its rows begin in `counts`. A width of -1 is every tile, without a list.
    lists: (L,) int32. counts: (R,) int32. width: entries of the longest list, 0 without any.
    """

    heads: torch.Tensor
    lists: torch.Tensor
    counts: torch.Tensor
    width: int


@lru_cache(maxsize=256)
def static_table(
    layout: Layout, tile_shapes: tuple[TileShape, ...], modes: Modes, device: torch.device
) -> StaticTable | None:
    """The static heads of a layer, None where it has none; cached, read-only."""
    rows: list[tuple[int, int, int, int]] = []
    parts: list[torch.Tensor] = []
    counts: list[torch.Tensor] = []
    known: dict[tuple[TileShape, StaticMode], tuple[int, int, int]] = {}
    begin = begin_counts = width = 0
    for head, (shape, mode) in enumerate(zip(tile_shapes, modes, strict=True)):
        if mode is None:
            continue
        lists = static_lists(layout, shape, mode)
        tiles, wide = lists.indices.shape
        if int(lists.counts.min()) == tiles:
            rows.append((head, 0, _WHOLE, 0))
            continue
        width = max(width, wide)
        if (shape, mode) not in known:
            known[shape, mode] = (begin, wide, begin_counts)
            parts.append(lists.indices.flatten())
            counts.append(lists.counts)
            begin, begin_counts = begin + tiles * wide, begin_counts + tiles
        rows.append((head, *known[shape, mode]))
    if not rows:
        return None
    nothing = torch.zeros(1, **_INTS)  # no empty tensors: a pointer must point somewhere
    return StaticTable(
        torch.tensor(rows, **_INTS).to(device),
        torch.cat([*parts, nothing]).to(device),
        torch.cat([*counts, nothing]).to(device),
        width,
    )


def place(
    static: StaticTable,
    keys: KeyRows,
    tables: LayerTables,
    selection: Selection,
    keep_all: torch.Tensor | None = None,
) -> None:
    """Write the lists of the static heads into `selection`, at least as wide as `static`'s.

    Tiles without a key that counts are left out, but where every tile is kept. keep_all: () bool on
    the device or None; where it is True every tile is.
    """
    batch, all_heads, tiles, width = selection.indices.shape
    columns = max(triton.next_power_of_2(static.width), 16)
    place_kernel[(tiles, static.heads.shape[0], batch)](
        static.heads,
        static.lists,
        static.counts,
        keys.log_sizes,
        tables.first,
        tables.starts,
        selection.indices,
        selection.counts,
        selection.counts if keep_all is None else keep_all,
        keys.log_stride,
        all_heads,
        tables.segments,
        tiles,
        width,
        FLAGGED=keep_all is not None,
        COLUMNS=columns,
        num_warps=choose_warps(columns),
        enable_fp_fusion=True,
    )
