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
    heads_ptr,
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
    EXTREMES: tl.constexpr,
    PICKED: tl.constexpr,
):
    """One program pools one tile of one head; the tile stays in registers for both passes.

    x: (B, Hx, N, D), head h reading x's head h // head_repeat. PICKED: the h-th of the pooled heads
    is heads[h], not h. out: (B, h, n, FEATURES) float32, contiguous: the mean, then with EXTREMES
    the maximum and the minimum, then by MOMENT nothing ("none"), E[x^2] ("second") or the variance
    ("variance"). Tiles without rows give zeros.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    if PICKED:
        head = tl.load(heads_ptr + head)
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
    line = (batch * tl.num_programs(1) + tl.program_id(1)) * most_tiles + tile
    out = out_ptr + line * FEATURES + channels
    tl.store(out, mean * mean_factor, mask=real)
    if EXTREMES:
        highest = tl.max(tl.where(mask, x, -float("inf")), 0)
        lowest = tl.min(tl.where(mask, x, float("inf")), 0)
        tl.store(out + HEAD_DIM, tl.where(count > 0, highest, 0.0), mask=real)
        tl.store(out + 2 * HEAD_DIM, tl.where(count > 0, lowest, 0.0), mask=real)
    if MOMENT == "second":
        second = tl.sum(x * x, 0) / divisor
        tl.store(out + FEATURES - HEAD_DIM, second * moment_factor, mask=real)
    elif MOMENT == "variance":
        # a second pass: E[x^2] - E[x]^2 cancels badly on keys with a large mean
        centred = tl.where(mask, x - mean[None, :], 0.0)
        variance = tl.sum(centred * centred, 0) / divisor
        tl.store(out + FEATURES - HEAD_DIM, variance * moment_factor, mask=real)


def pool(
    x: torch.Tensor,
    tables: LayerTables,
    rows: torch.Tensor,
    rows_stride: int,
    moment: str,
    mean_factor: float = 1.0,
    moment_factor: float = 1.0,
    extremes: bool = False,
    heads: torch.Tensor | None = None,
) -> torch.Tensor:
    """Pooled rows of x (B, Hx, N, D): (B, h, n, F) float32, F = D to 4 D by what is asked for.

    rows: (B or 1, R, S), the stacked table, with `rows_stride` elements between batch elements.
    moment: "none", "second" or "variance", extremes: see the kernel. heads: (h,) int32, those to
    pool, or None for all. What lies past a head's last tile is never written and holds anything.
    """
    batch, kv_heads, _, head_dim = x.shape
    all_heads = tables.first.shape[0]
    pooled = all_heads if heads is None else heads.shape[0]
    features = head_dim * (1 + 2 * extremes + (moment != "none"))
    out = torch.empty(
        (batch, pooled, tables.most_tiles, features), dtype=torch.float32, device=x.device
    )
    pool_kernel[(tables.most_tiles, pooled, batch)](
        x,
        rows,
        tables.first,
        tables.starts,
        tables.first if heads is None else heads,
        out,
        *x.stride(),
        rows_stride,
        all_heads // kv_heads,
        tables.segments,
        tables.most_tiles,
        mean_factor,
        moment_factor,
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        TILE=tables.tile_size,
        FEATURES=features,
        MOMENT=moment,
        EXTREMES=extremes,
        PICKED=heads is not None,
        num_warps=pool_warps(head_dim, tables.tile_size),
        enable_fp_fusion=True,
    )
    return out
