"""Scoring and choosing in one launch, where a row of scores fits into registers."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..call import Selection
from .best import keep_everything, ranks, write_best
from .configs import fused_config
from .lines import SIZES, Lines, line_head
from .score import tile_products
from .steps import padded_columns
from .tables import KeyRows, LayerTables


@triton.jit(do_not_specialize=SIZES)
def score_choose_kernel(
    features_ptr,
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
    lines,
    SIZED: tl.constexpr,
    FLAGGED: tl.constexpr,
    PICKED: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_F: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program scores ROWS query tiles of a line against all its key tiles, and chooses.

    features: (2, lines, n, FEATURES) float32, of query tiles and of key tiles; the rest as in
    `choose_kernel`. The scores stay in registers.
    """
    place = tl.program_id(1)
    batch, slot, head = line_head(first_line + place, scored_heads, heads_ptr, PICKED)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    starts = starts_ptr + head * (segments + 1)
    tiles = tl.load(starts + segments)
    line = (batch * all_heads + head) * most_tiles
    if FLAGGED:
        if tl.load(keep_all_ptr):
            keep_everything(counts_ptr + line, rows, tiles, most_tiles)
            return
    log_sizes = log_sizes_ptr + batch * log_batch + tl.load(first_ptr + head)
    log_size = tl.load(log_sizes + columns, mask=columns < tiles, other=-float("inf"))
    q_features = features_ptr + place.to(tl.int64) * most_tiles * FEATURES
    k_features = q_features + lines.to(tl.int64) * most_tiles * FEATURES
    scores = tile_products(
        q_features, k_features, rows, columns, tiles, FEATURES, BLOCK_F, ROWS, COLUMNS
    )
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


def score_and_choose(
    features: torch.Tensor,
    sized: bool,
    keys: KeyRows,
    tables: LayerTables,
    budgets: torch.Tensor,
    selection: Selection,
    keep_all: torch.Tensor | None,
    lines: Lines,
) -> None:
    """As `choose`, of features as `score` takes them."""
    columns = padded_columns(tables.most_tiles)
    config = fused_config(columns)
    flag = selection.counts if keep_all is None else keep_all
    score_choose_kernel[(triton.cdiv(tables.most_tiles, config.rows), lines.count)](
        features,
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
        lines.count,
        SIZED=sized,
        FLAGGED=keep_all is not None,
        PICKED=lines.picked,
        FEATURES=features.shape[3],
        BLOCK_F=config.block_f,
        ROWS=config.rows,
        COLUMNS=columns,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
