"""Tile pooling: the statistics of each tile's rows that scores are made of, one launch for all."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..call import AttentionCall
from .configs import pool_warps
from .lines import SIZES, Lines, line_head
from .tables import KeyRows, LayerTables


@triton.jit
def _pool_tile(
    x,
    rows,
    out,
    x_token,
    x_channel,
    mean_factor,
    moment_factor,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    FEATURES: tl.constexpr,
    MOMENT: tl.constexpr,
    EXTREMES: tl.constexpr,
):
    """Write the statistics of the given rows of x, which stay in registers for both passes."""
    counted = rows >= 0
    channels = tl.arange(0, PADDED_DIM)
    mask = counted[:, None] & (channels < HEAD_DIM)[None, :]
    at = rows.to(tl.int64)[:, None] * x_token + channels.to(tl.int64)[None, :] * x_channel
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)

    count = tl.sum(counted.to(tl.int32), 0)
    divisor = tl.maximum(count, 1).to(tl.float32)
    mean = tl.sum(values, 0) / divisor
    real = channels < HEAD_DIM
    tl.store(out + channels, mean * mean_factor, mask=real)
    if EXTREMES:
        highest = tl.max(tl.where(mask, values, -float("inf")), 0)
        lowest = tl.min(tl.where(mask, values, float("inf")), 0)
        tl.store(out + HEAD_DIM + channels, tl.where(count > 0, highest, 0.0), mask=real)
        tl.store(out + 2 * HEAD_DIM + channels, tl.where(count > 0, lowest, 0.0), mask=real)
    if MOMENT == "second":
        second = tl.sum(values * values, 0) / divisor
        tl.store(out + FEATURES - HEAD_DIM + channels, second * moment_factor, mask=real)
    elif MOMENT == "variance":
        # a second pass: E[x^2] - E[x]^2 cancels badly on keys with a large mean
        # (which reads the rows again, near as they are: held, they would cost half the occupancy)
        values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, values - mean[None, :], 0.0)
        variance = tl.sum(centred * centred, 0) / divisor
        tl.store(out + FEATURES - HEAD_DIM + channels, variance * moment_factor, mask=real)


@triton.jit(do_not_specialize=SIZES)
def pool_kernel(
    q_ptr,
    k_ptr,
    query_rows_ptr,
    key_rows_ptr,
    first_ptr,
    starts_ptr,
    heads_ptr,
    out_ptr,
    q_batch,
    q_head,
    q_token,
    q_channel,
    k_batch,
    k_head,
    k_token,
    k_channel,
    rows_batch,
    kv_repeat,
    scored_heads,
    segments,
    most_tiles,
    first_line,
    lines,
    mean_factor,
    moment_factor,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,
    FEATURES: tl.constexpr,
    SECOND: tl.constexpr,
    EXTREMES: tl.constexpr,
    PICKED: tl.constexpr,
):
    """One program pools one tile of the queries (axis 1 is 0) or of the keys (1) of one line.

    q: (B, H, Nq, D); k: (B, Hkv, Nk, D). out: (2, lines, n, FEATURES) float32, contiguous: the
    mean, then with EXTREMES the maximum and the minimum, then with SECOND the second moment, E[x^2]
    of queries and the variance of keys. The factors are on the mean and the second moment of
    queries. Tiles without rows give zeros. Neighbouring programs are heads, whose rows lie side by
    side in most models. Lines: see `lines`.
    """
    place = tl.program_id(0) % lines
    tile = tl.program_id(0) // lines
    batch, _, head = line_head(first_line + place, scored_heads, heads_ptr, PICKED)
    if tile >= tl.load(starts_ptr + head * (segments + 1) + segments):
        return

    head64 = head.to(tl.int64)
    row_at = (tl.load(first_ptr + head) + tile) * TILE + tl.arange(0, TILE)
    line = (tl.program_id(1) * lines + place).to(tl.int64) * most_tiles + tile
    out = out_ptr + line * FEATURES
    if tl.program_id(1) == 0:
        _pool_tile(
            q_ptr + batch * q_batch + head64 * q_head,
            tl.load(query_rows_ptr + row_at),
            out,
            q_token,
            q_channel,
            mean_factor,
            moment_factor,
            HEAD_DIM,
            PADDED_DIM,
            FEATURES,
            "second" if SECOND else "none",
            EXTREMES,
        )
    else:
        _pool_tile(
            k_ptr + batch * k_batch + (head64 // kv_repeat) * k_head,
            tl.load(key_rows_ptr + batch * rows_batch + row_at),
            out,
            k_token,
            k_channel,
            1.0,
            1.0,
            HEAD_DIM,
            PADDED_DIM,
            FEATURES,
            "variance" if SECOND else "none",
            EXTREMES,
        )


def pool(
    call: AttentionCall,
    tables: LayerTables,
    keys: KeyRows,
    lines: Lines,
    out: torch.Tensor,
    second: bool,
    extremes: bool,
    mean_factor: float = 1.0,
    moment_factor: float = 1.0,
) -> None:
    """Pool the query and key tiles of some lines into out (2, lines, n, F) float32, contiguous.

    F is D for the mean, 2 D more with `extremes`, D more with `second`, in this order: see the
    kernel. What lies past a head's last tile is never written and holds anything.
    """
    head_dim = call.q.shape[3]
    pool_kernel[(lines.count * tables.most_tiles, 2)](
        call.q,
        call.k,
        tables.query_rows,
        keys.rows,
        tables.first,
        tables.starts,
        lines.heads,
        out,
        *call.q.stride(),
        *call.k.stride(),
        keys.rows_stride,
        call.kv_repeat,
        lines.scored_heads,
        tables.segments,
        tables.most_tiles,
        lines.begin,
        lines.count,
        mean_factor,
        moment_factor,
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        TILE=tables.tile_size,
        FEATURES=out.shape[3],
        SECOND=second,
        EXTREMES=extremes,
        PICKED=lines.picked,
        num_warps=pool_warps(tables.tile_size),
        enable_fp_fusion=True,
    )
