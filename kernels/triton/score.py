"""Tile scores on the device: products of features, in float32 quality whatever torch is set to."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import configs
from .lines import SIZES, Lines, line_head
from .tables import LayerTables


@triton.jit
def tile_products(
    q_features,
    k_features,
    rows,
    columns,
    tiles,
    FEATURES: tl.constexpr,
    BLOCK_F: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """(ROWS, COLUMNS) float32 products of the features of query tiles and of key tiles.

    q_features, k_features: (n, FEATURES) float32; what is past `tiles` is not read. Three TF32
    products make one: float32 up to the last bits, which no setting of torch can lower.
    """
    feature = tl.arange(0, BLOCK_F)
    q_at = q_features + rows[:, None] * FEATURES + feature[None, :]
    k_at = k_features + columns[None, :] * FEATURES + feature[:, None]
    q_mask = (rows < tiles)[:, None]
    k_mask = (columns < tiles)[None, :]
    scores = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, FEATURES, BLOCK_F):
        q = tl.load(q_at + begin, mask=q_mask, other=0.0)
        k = tl.load(k_at + begin, mask=k_mask, other=0.0)
        scores = tl.dot(q, k, scores, input_precision="tf32x3")
    return scores


@triton.jit(do_not_specialize=SIZES)
def score_kernel(
    features_ptr,
    starts_ptr,
    heads_ptr,
    scores_ptr,
    scored_heads,
    segments,
    most_tiles,
    first_line,
    first_row,
    lines,
    rows,
    score_stride,
    PICKED: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_F: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program scores ROWS query tiles of a line against COLUMNS of its key tiles.

    features: (2, lines, n, FEATURES) float32, of query tiles and of key tiles; scores: (lines,
    rows, score_stride) float32, query tiles from first_row on; both contiguous. What is past the
    head's last tile is not written. Lines: see `lines`.
    """
    place = tl.program_id(2)
    _, _, head = line_head(first_line + place, scored_heads, heads_ptr, PICKED)
    tiles = tl.load(starts_ptr + head * (segments + 1) + segments)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    if (first_row + tl.program_id(1) * ROWS >= tiles) | (tl.program_id(0) * COLUMNS >= tiles):
        return
    q_features = features_ptr + place.to(tl.int64) * most_tiles * FEATURES
    k_features = q_features + lines.to(tl.int64) * most_tiles * FEATURES
    products = tile_products(
        q_features, k_features, first_row + row, column, tiles, FEATURES, BLOCK_F, ROWS, COLUMNS
    )
    at = (place.to(tl.int64) * rows + row)[:, None] * score_stride + column[None, :]
    there = (row < rows) & (first_row + row < tiles)
    tl.store(scores_ptr + at, products, mask=there[:, None] & (column < tiles)[None, :])


def score(
    features: torch.Tensor,
    tables: LayerTables,
    lines: Lines,
    first_row: int,
    rows: int,
    scores: torch.Tensor,
) -> None:
    """Write the scores of some query tiles of some lines into scores (lines, rows, stride).

    features: (2, lines, n, F) float32, contiguous, F a multiple of `FEATURE_STEP`. What
    belongs to tiles past a head's last is not written and holds anything. Without the log of the
    tiles' sizes.
    """
    config = configs.SCORE_CONFIG
    blocks = triton.cdiv(tables.most_tiles, config.columns), triton.cdiv(rows, config.rows)
    score_kernel[(*blocks, lines.count)](
        features,
        tables.starts,
        lines.heads,
        scores,
        lines.scored_heads,
        tables.segments,
        tables.most_tiles,
        lines.begin,
        first_row,
        lines.count,
        rows,
        scores.shape[2],
        PICKED=lines.picked,
        FEATURES=features.shape[3],
        BLOCK_F=config.block_f,
        ROWS=config.rows,
        COLUMNS=config.columns,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
