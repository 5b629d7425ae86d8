"""Tile pooling: the statistics of each tile's rows that scores are made of, one launch for all."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import pool_warps
from .tables import LayerTables


@triton.jit
def pool_kernel(
    x_ptr,
    rows_ptr,
    first_ptr,
    starts_ptr,
    out_ptr,
    x_batch,
    x_head,
    x_token,
    x_channel,
    rows_batch,
    head_repeat,
    segments,
    most_tiles,
    mean_factor,
    moment_factor,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,
    FEATURES: tl.constexpr,
    MOMENT: tl.constexpr,
):
    """One program pools one tile of one head; the tile stays in registers for both passes.

    x: (B, Hx, N, D), head h reading x's head h // head_repeat. out: (B, H, n, FEATURES) float32,
    contiguous: the mean, then by MOMENT nothing ("none"), E[x^2] ("second"), the variance
    ("variance"), or the maximum and the minimum ("extremes"). Tiles without rows give zeros.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    if tile >= tl.load(starts_ptr + head * (segments + 1) + segments):
        return

    row_base = (tl.load(first_ptr + head) + tile) * TILE
    rows = tl.load(rows_ptr + batch * rows_batch + row_base + tl.arange(0, TILE))
    counted = rows >= 0
    channels = tl.arange(0, PADDED_DIM)
    mask = counted[:, None] & (channels < HEAD_DIM)[None, :]
    base = x_ptr + batch * x_batch + (head // head_repeat).to(tl.int64) * x_head
    at = rows.to(tl.int64)[:, None] * x_token + channels.to(tl.int64)[None, :] * x_channel
    x = tl.load(base + at, mask=mask, other=0.0).to(tl.float32)

    count = tl.sum(counted.to(tl.int32), 0)
    divisor = tl.maximum(count, 1).to(tl.float32)
    mean = tl.sum(x, 0) / divisor
    real = channels < HEAD_DIM
    out = out_ptr + ((batch * tl.num_programs(1) + head) * most_tiles + tile) * FEATURES + channels
    tl.store(out, mean * mean_factor, mask=real)
    if MOMENT == "second":
        tl.store(out + HEAD_DIM, tl.sum(x * x, 0) / divisor * moment_factor, mask=real)
    elif MOMENT == "variance":
        # a second pass: E[x^2] - E[x]^2 cancels badly on keys with a large mean
        centred = tl.where(mask, x - mean[None, :], 0.0)
        variance = tl.sum(centred * centred, 0) / divisor
        tl.store(out + HEAD_DIM, variance * moment_factor, mask=real)
    elif MOMENT == "extremes":
        highest = tl.max(tl.where(mask, x, -float("inf")), 0)
        lowest = tl.min(tl.where(mask, x, float("inf")), 0)
        tl.store(out + HEAD_DIM, tl.where(count > 0, highest, 0.0), mask=real)
        tl.store(out + 2 * HEAD_DIM, tl.where(count > 0, lowest, 0.0), mask=real)


_WIDTHS = {"none": 1, "second": 2, "variance": 2, "extremes": 3}


def pool(
    x: torch.Tensor,
    tables: LayerTables,
    rows: torch.Tensor,
    rows_stride: int,
    moment: str,
    mean_factor: float = 1.0,
    moment_factor: float = 1.0,
) -> torch.Tensor:
    """Pooled rows of x (B, Hx, N, D): (B, H, n, F) float32, F = D, 2 D or 3 D by `moment`.

    rows: (B or 1, R, S), the stacked table, with `rows_stride` elements between batch elements.
    moment: "none", "second", "variance" or "extremes", see the kernel. What lies past a head's
    last tile is never written and holds anything.
    """
    batch, kv_heads, _, head_dim = x.shape
    heads = tables.first.shape[0]
    out = torch.empty(
        (batch, heads, tables.most_tiles, _WIDTHS[moment] * head_dim),
        dtype=torch.float32,
        device=x.device,
    )
    pool_kernel[(tables.most_tiles, heads, batch)](
        x,
        rows,
        tables.first,
        tables.starts,
        out,
        *x.stride(),
        rows_stride,
        heads // kv_heads,
        tables.segments,
        tables.most_tiles,
        mean_factor,
        moment_factor,
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        TILE=tables.tile_size,
        FEATURES=out.shape[-1],
        MOMENT=moment,
        num_warps=pool_warps(head_dim, tables.tile_size),
        enable_fp_fusion=True,
    )
    return out
