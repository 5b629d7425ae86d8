"""Choosing key tiles from scores on the device: exact top-k by query tile, in ascending lists."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..call import Selection
from .configs import choose_warps
from .tables import KeyRows, LayerTables


@triton.jit
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
    segments,
    most_tiles,
    width,
    SIZED: tl.constexpr,
    FLAGGED: tl.constexpr,
    PICKED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program chooses for one query tile of one head.

    scores: (B, h, n, n) float32; budgets: (h, n, V) int32; indices: (B, H, n, width) int32;
    counts: (B, H, n) int32; all contiguous. SIZED adds the log of each key tile's rows. FLAGGED:
    keep_all is one bool, True lifts every budget; without it keep_all is not read. PICKED: the h-th
    of the scored heads is heads[h]; without it h is H, and heads is not read.
    Scores become integers of the same order, so that 31 halvings find the k-th largest exactly and
    ties at it go to the lower tile number.
    """
    row = tl.program_id(0)
    slot = tl.program_id(1)
    head = slot
    if PICKED:
        head = tl.load(heads_ptr + slot)
    batch = tl.program_id(2).to(tl.int64)
    LOWEST: tl.constexpr = -2147483648
    HIGHEST: tl.constexpr = 2147483647
    LARGEST: tl.constexpr = 3.4028234663852886e38

    starts = starts_ptr + head * (segments + 1)
    columns = tl.arange(0, COLUMNS)
    known = columns < tl.load(starts + segments)
    scores = scores_ptr + ((batch * tl.num_programs(1) + slot) * most_tiles + row) * most_tiles
    scores = tl.load(scores + columns, mask=known, other=-float("inf"))
    log_sizes = log_sizes_ptr + batch * log_batch + tl.load(first_ptr + head)
    log_size = tl.load(log_sizes + columns, mask=known, other=-float("inf"))
    if SIZED:
        scores += log_size
    # as in `tile_scores`: what is NaN is kept, so that it shows in the output
    scores = tl.where(scores == scores, scores, LARGEST)
    scores = tl.minimum(tl.maximum(scores, -LARGEST), LARGEST)
    alive = log_size > -float("inf")

    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)  # -0.0 ties with 0.0
    rank = tl.where(bits < 0, bits ^ HIGHEST, bits)
    rank = tl.where(columns == row, HIGHEST, rank)
    rank = tl.where(alive, rank, LOWEST)

    kept = tl.zeros((COLUMNS,), tl.int32)
    for segment in range(segments):
        budget = tl.load(budgets_ptr + (slot * most_tiles + row) * segments + segment)
        if FLAGGED:  # rows past a head's last tile have the budget 0
            budget = tl.where(tl.load(keep_all_ptr) & (budget > 0), COLUMNS, budget)
        start = tl.load(starts + segment)
        stop = tl.load(starts + segment + 1)
        here = tl.where((columns >= start) & (columns < stop), rank, LOWEST)
        # the largest bound that at least `budget` ranks reach, built bit by bit from the sign
        bound = tl.where(tl.sum((here >= 0).to(tl.int32), 0) >= budget, 0, LOWEST)
        for step in range(31):
            higher = bound | (1 << (30 - step))
            bound = tl.where(tl.sum((here >= higher).to(tl.int32), 0) >= budget, higher, bound)
        above = (here > bound).to(tl.int32)
        level = ((here == bound) & (here > LOWEST)).to(tl.int32)
        room = budget - tl.sum(above, 0)
        kept += above + tl.where(tl.cumsum(level, 0) <= room, level, 0)

    line = (batch * all_heads + head) * most_tiles + row
    place = tl.cumsum(kept, 0) - 1
    tl.store(indices_ptr + line * width + place, columns, mask=kept > 0)
    tl.store(counts_ptr + line, tl.sum(kept, 0))


def choose(
    scores: torch.Tensor,
    sized: bool,
    keys: KeyRows,
    tables: LayerTables,
    budgets: torch.Tensor,
    selection: Selection,
    keep_all: torch.Tensor | None = None,
    heads: torch.Tensor | None = None,
) -> None:
    """Write ascending key tiles, and how many each query tile keeps, into `selection`.

    scores: (B, h, n, n) float32, contiguous, anything past a head's last tile. sized: add the log
    of the key tile's rows. budgets: (h, n, V), see `budget_table`; the selection, contiguous, must
    be as wide as their largest total, or n with keep_all. keep_all: () bool on the device or None.
    heads: (h,) int32, the heads that are scored, or None for all. The rules are `select_tiles`'.
    """
    batch, all_heads, tiles, width = selection.indices.shape
    columns = max(triton.next_power_of_2(tiles), 16)
    choose_kernel[(tiles, scores.shape[1], batch)](
        scores,
        keys.log_sizes,
        budgets,
        tables.first,
        tables.starts,
        selection.indices,
        selection.counts,
        selection.counts if keep_all is None else keep_all,
        selection.counts if heads is None else heads,
        keys.log_stride,
        all_heads,
        tables.segments,
        tiles,
        width,
        SIZED=sized,
        FLAGGED=keep_all is not None,
        PICKED=heads is not None,
        COLUMNS=columns,
        num_warps=choose_warps(columns),
        enable_fp_fusion=True,
    )
