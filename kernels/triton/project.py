"""Features of tiles from their statistics, for scores with weights: one launch for both sides."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..plan import Plan
from .configs import FEATURE_STEP, PROJECT_CONFIG
from .lines import SIZES, Lines, line_head
from .tables import LayerTables


@triton.jit
def _times_weights(
    x,
    weights,
    mask,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    BLOCK_F: tl.constexpr,
    ROWS: tl.constexpr,
):
    """(ROWS, PADDED_WIDTH) float32 products of rows (pointers x) with (DEPTH, WIDTH) weights."""
    feature = tl.arange(0, BLOCK_F)
    column = tl.arange(0, PADDED_WIDTH)
    at = weights + feature[:, None] * WIDTH + column[None, :]
    real = (column < WIDTH)[None, :]
    products = tl.zeros((ROWS, PADDED_WIDTH), tl.float32)
    for begin in range(0, DEPTH, BLOCK_F):
        left = tl.load(x[:, None] + begin + feature[None, :], mask=mask[:, None], other=0.0)
        right = tl.load(at + begin * WIDTH, mask=real, other=0.0)
        products = tl.dot(left, right, products, input_precision="tf32x3")
    return products


@triton.jit(do_not_specialize=SIZES)
def project_kernel(
    pooled_ptr,
    projection_ptr,
    factors_ptr,
    starts_ptr,
    heads_ptr,
    features_ptr,
    all_heads,
    scored_heads,
    segments,
    most_tiles,
    first_line,
    lines,
    mean_factor,
    moment_factor,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    POOLED: tl.constexpr,
    FEATURES: tl.constexpr,
    PROJECTED: tl.constexpr,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    PICKED: tl.constexpr,
    BLOCK_F: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program makes the features of ROWS tiles, of queries (axis 2 is 0) or of keys (1).

    pooled: (2, lines, n, POOLED) float32 as `pool_kernel` writes it; features: (2, lines, n,
    FEATURES) float32: the mean, with PROJECTED (2, H, 3 D, D) moved by its product with [mean |
    max | min], then the second moment, with RANK > 0 through the (2, H, D, RANK) factors and padded
    with zeros. The factors `mean_factor` and `moment_factor` are on those of queries. All
    contiguous; products are of float32 quality. Lines: see `lines`.
    """
    place = tl.program_id(1)
    side = tl.program_id(2)
    _, _, head = line_head(first_line + place, scored_heads, heads_ptr, PICKED)
    tiles = tl.load(starts_ptr + head * (segments + 1) + segments)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS >= tiles:
        return
    mask = rows < tiles
    line = (side * lines + place).to(tl.int64) * most_tiles + rows
    pooled = pooled_ptr + line * POOLED
    features = features_ptr + line * FEATURES
    weights = (side * all_heads + head).to(tl.int64)

    channel = tl.arange(0, PADDED_DIM)
    there = mask[:, None] & (channel < HEAD_DIM)[None, :]
    centre = tl.load(pooled[:, None] + channel[None, :], mask=there, other=0.0)
    if PROJECTED:
        projection = projection_ptr + weights * 3 * HEAD_DIM * HEAD_DIM
        centre += _times_weights(
            pooled, projection, mask, 3 * HEAD_DIM, HEAD_DIM, PADDED_DIM, BLOCK_F, ROWS
        )
    centre *= tl.where(side == 0, mean_factor, 1.0)
    tl.store(features[:, None] + channel[None, :], centre, mask=there)

    moments = pooled + POOLED - HEAD_DIM
    moment_factor = tl.where(side == 0, moment_factor, 1.0)
    if RANK > 0:
        factors = factors_ptr + weights * HEAD_DIM * RANK
        column = tl.arange(0, PADDED_RANK)
        spread = _times_weights(moments, factors, mask, HEAD_DIM, RANK, PADDED_RANK, BLOCK_F, ROWS)
        kept = mask[:, None] & (column < FEATURES - HEAD_DIM)[None, :]
        out = features[:, None] + HEAD_DIM + column[None, :]
        tl.store(out, spread * moment_factor, mask=kept)
    else:
        spread = tl.load(moments[:, None] + channel[None, :], mask=there, other=0.0)
        out = features[:, None] + HEAD_DIM + channel[None, :]
        tl.store(out, spread * moment_factor, mask=there)


def project(
    plan: Plan,
    pooled: torch.Tensor,
    tables: LayerTables,
    lines: Lines,
    features: torch.Tensor,
    scale: float,
) -> None:
    """Fill features (2, lines, n, F) from pooled (2, lines, n, P), both float32 and contiguous.

    The plan has a projection or factors; pooled holds maxima and minima if it has a projection. The
    features are those of `query_features` and `key_features`, but for zeros after factored ones.
    """
    head_dim = pooled.shape[3] // (4 if plan.projection is not None else 2)
    config = PROJECT_CONFIG
    rank = 0 if plan.factors is None else plan.factors.shape[3]
    project_kernel[(triton.cdiv(tables.most_tiles, config.rows), lines.count, 2)](
        pooled,
        _weights(plan.projection, pooled),
        _weights(plan.factors, pooled),
        tables.starts,
        lines.heads,
        features,
        plan.heads,
        lines.scored_heads,
        tables.segments,
        tables.most_tiles,
        lines.begin,
        lines.count,
        scale,
        0.5 * scale * scale,
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        POOLED=pooled.shape[3],
        FEATURES=features.shape[3],
        PROJECTED=plan.projection is not None,
        RANK=rank,
        PADDED_RANK=max(triton.next_power_of_2(rank), FEATURE_STEP),
        PICKED=lines.picked,
        BLOCK_F=config.block_f,
        ROWS=config.rows,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )


def _weights(weights: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """As the kernel reads them; without weights any tensor will do, as it reads none."""
    if weights is None:
        return like
    return weights.to(device=like.device, dtype=torch.float32).contiguous()
