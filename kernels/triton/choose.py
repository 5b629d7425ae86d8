"""Choosing key tiles from a workspace of scores."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..call import Selection
from .best import keep_everything, ranks, write_best
from .configs import choose_warps
from .lines import SIZES, Lines, line_head
from .steps import padded_columns
from .tables import KeyRows, LayerTables


@triton.jit(do_not_specialize=SIZES)
def choose_kernel(
    scores_ptr,
    log_sizes_ptr,
    budgets_ptr,
    first_ptr,
    starts_ptr,
    indices_ptr,
    counts_ptr,
    keep_all_ptr,
    heads_ptr,
    log_batch,
    all_heads,
    scored_heads,
    segments,
    most_tiles,
    width,
    first_line,
    first_row,
    score_stride,
    SIZED: tl.constexpr,
    FLAGGED: tl.constexpr,
    PICKED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program chooses for one query tile of a line.

    scores: (lines, rows from first_row on, score_stride) float32; budgets: (h, n, V) int32;
    indices: (B, H, n, width) int32; counts: (B, H, n) int32; all contiguous. SIZED adds the log of
    each key tile's rows. FLAGGED: keep_all is one bool, True keeps every tile; without it keep_all
    is not read. Lines: see `lines`.
    """
    place = tl.program_id(1)
    batch, slot, head = line_head(first_line + place, scored_heads, heads_ptr, PICKED)
    row = first_row + tl.program_id(0)
    rows = row + tl.arange(0, 1)
    columns = tl.arange(0, COLUMNS)
    starts = starts_ptr + head * (segments + 1)
    tiles = tl.load(starts + segments)
    line = (batch * all_heads + head) * most_tiles
    if FLAGGED:
        if tl.load(keep_all_ptr):
            keep_everything(counts_ptr + line, rows, tiles, most_tiles)
            return
    known = columns < tiles
    log_sizes = log_sizes_ptr + batch * log_batch + tl.load(first_ptr + head)
    log_size = tl.load(log_sizes + columns, mask=known, other=-float("inf"))
    scores = (
        scores_ptr + (place.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * score_stride
    )
    scores = tl.load(scores + columns, mask=known, other=0.0)[None, :]
    rank = ranks(scores, log_size, rows, SIZED, COLUMNS)
    write_best(
        rank,
        rows,
        starts,
        budgets_ptr + slot.to(tl.int64) * most_tiles * segments,
        indices_ptr + line * width,
        counts_ptr + line,
        segments,
        most_tiles,
        width,
        COLUMNS,
    )


def choose(
    scores: torch.Tensor,
    first_row: int,
    rows: int,
    sized: bool,
    keys: KeyRows,
    tables: LayerTables,
    budgets: torch.Tensor,
    selection: Selection,
    keep_all: torch.Tensor | None,
    lines: Lines,
) -> None:
    """Write ascending key tiles, and how many each query tile keeps, into `selection`.

    scores: (lines, rows, stride) float32, contiguous, of query tiles from first_row on; anything
    past a head's last tile. sized: add the log of the key tile's rows. budgets: (h, n, V), see
    `budget_table`; the selection, contiguous, must be as wide as the longest list they make.
    keep_all: () bool on the device or None. The rules are `select_tiles`'.
    """
    columns = padded_columns(tables.most_tiles)
    flag = selection.counts if keep_all is None else keep_all
    choose_kernel[(rows, lines.count)](
        scores,
        keys.log_sizes,
        budgets,
        tables.first,
        tables.starts,
        selection.indices,
        selection.counts,
        flag,
        lines.heads,
        keys.log_stride,
        selection.counts.shape[1],
        lines.scored_heads,
        tables.segments,
        tables.most_tiles,
        selection.indices.shape[3],
        lines.begin,
        first_row,
        scores.shape[2],
        SIZED=sized,
        FLAGGED=keep_all is not None,
        PICKED=lines.picked,
        COLUMNS=columns,
        num_warps=choose_warps(columns),
        enable_fp_fusion=True,
    )
