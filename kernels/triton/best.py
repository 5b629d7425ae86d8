"""The best key tiles of a row of scores: exact top-k on the device, in ascending lists."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ranks(scores, log_size, rows, SIZED: tl.constexpr, COLUMNS: tl.constexpr):
    """Scores (M, COLUMNS) of query tiles `rows` as int32 of the same order.

    The query's own tile comes first of all, as the largest integer, and key tiles without keys,
    whose log_size is -inf, last, as the smallest; nothing else has these two. SIZED adds log_size.
    """
    LOWEST: tl.constexpr = -2147483648
    HIGHEST: tl.constexpr = 2147483647
    LARGEST: tl.constexpr = 3.4028234663852886e38
    if SIZED:
        scores += log_size[None, :]
    # as in `tile_scores`: what is NaN is kept, so that it shows in the output
    scores = tl.where(scores == scores, scores, LARGEST)
    scores = tl.minimum(tl.maximum(scores, -LARGEST), LARGEST)
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)  # -0.0 ties with 0.0
    rank = tl.where(bits < 0, bits ^ HIGHEST, bits)
    rank = tl.where(tl.arange(0, COLUMNS)[None, :] == rows[:, None], HIGHEST, rank)
    return tl.where((log_size > -float("inf"))[None, :], rank, LOWEST)


@triton.jit
def keep_everything(counts, rows, tiles, most_tiles):
    """Let query tiles `rows` of a line keep all of the head's tiles. counts (n,): of the line."""
    tl.store(counts + rows, tl.where(rows < tiles, tiles, 0), mask=rows < most_tiles)


@triton.jit
def write_best(
    rank,
    rows,
    starts,
    budgets,
    indices,
    counts,
    segments,
    most_tiles,
    width,
    COLUMNS: tl.constexpr,
):
    """Write the lists of query tiles `rows`, each the best by rank (M, COLUMNS) of every segment.

    starts: of the head's segments; budgets (n, V), indices (n, width) and counts (n,): of the line,
    all int32. At most 31 halvings separate the k largest ranks exactly; ties go to the lower
    tile number. Rows past a head's last tile have the budget 0 and get empty lists. A row whose
    budgets are all tiles keeps them all, and gets no list. One head's lists have fewer than 2^31
    entries.
    """
    LOWEST: tl.constexpr = -2147483648
    columns = tl.arange(0, COLUMNS)[None, :]
    there = rows < most_tiles
    tiles = tl.load(starts + segments)
    allowed = tl.zeros(rows.shape, tl.int32)
    for segment in range(segments):
        allowed += tl.load(budgets + rows * segments + segment, mask=there, other=0)
    done = tl.zeros(rows.shape, tl.int32)
    for segment in range(segments):
        budget = tl.load(budgets + rows * segments + segment, mask=there, other=0)
        start = tl.load(starts + segment)
        stop = tl.load(starts + segment + 1)
        here = tl.where((columns >= start) & (columns < stop), rank, LOWEST)
        # The largest bound that at least `budget` ranks reach, built bit by bit from the sign. Once
        # just as many reach it, all that a larger one could leave out has been left out.
        reach = tl.sum((here >= 0).to(tl.int32), 1)
        bound = tl.where(reach >= budget, 0, LOWEST)
        reach = tl.where(reach >= budget, reach, COLUMNS)
        step = 1 << 30
        while (step > 0) & (tl.max(tl.abs(reach - budget), 0) > 0):
            higher = bound | step
            above = tl.sum((here >= higher[:, None]).to(tl.int32), 1)
            bound = tl.where(above >= budget, higher, bound)
            reach = tl.where(above >= budget, above, reach)
            step = step >> 1
        # two counts to an integer: those above the bound in its upper half, those at it below
        level = (here == bound[:, None]) & (here > LOWEST)
        count = tl.where(here > bound[:, None], 65536, level.to(tl.int32))
        total = tl.sum(count, 1)
        room = budget - (total >> 16)
        before = tl.cumsum(count, 1)
        tied = before & 65535
        place = done[:, None] + (before >> 16) + tl.minimum(tied, room[:, None]) - 1
        kept = (here > bound[:, None]) | (level & (tied <= room[:, None]))
        listed = tl.broadcast_to(columns, rank.shape)
        kept = kept & (allowed < tiles)[:, None]
        tl.store(indices + (rows * width)[:, None] + place, listed, mask=kept)
        done += (total >> 16) + tl.minimum(total & 65535, room)
    tl.store(counts + rows, tl.where(allowed < tiles, done, tiles), mask=there)
