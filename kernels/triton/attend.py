"""The tile-skipping forward: exact softmax attention over the kept tiles and all extra tokens."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..call import AttentionCall, Selection, empty_output
from .configs import attend_config, gpu_generation
from .tables import KeyRows, LayerTables

_LEAST_SCALE = torch.finfo(torch.float32).tiny
"""In place of a scale of 0, which would turn the -inf of masked keys into NaN."""


@triton.jit
def attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    query_rows_ptr,
    key_rows_ptr,
    log_sizes_ptr,
    first_ptr,
    starts_ptr,
    indices_ptr,
    counts_ptr,
    q_batch,
    q_head,
    q_token,
    q_channel,
    k_batch,
    k_head,
    k_token,
    k_channel,
    v_batch,
    v_head,
    v_token,
    v_channel,
    out_batch,
    out_head,
    out_token,
    out_channel,
    rows_batch,
    log_batch,
    list_rows,
    list_width,
    kv_repeat,
    segments,
    extra_tiles,
    extra_query_tiles,
    queries,
    scale,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
    FLIPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program computes BLOCK_M query rows of one tile of one head.

    Keys and queries without a grid stand in tiles of their own after the video tiles, so one loop
    does it all. The key tiles of a video tile are its list, or all video tiles where it keeps as
    many, then the extra tiles; those of an extra tile are all tiles. Extra query tiles run longest
    and come first. scale is positive and carries log2(e), for exp2. log_sizes: log of the rows that
    count in each key tile; from WHOLE on all do, and nothing is masked. WIDE: offsets within one
    head need 64 bits. FLIPPED: -q is meant.
    """
    slot = tl.program_id(0) // (TILE // BLOCK_M)
    part = tl.program_id(0) % (TILE // BLOCK_M)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    tiles = tl.load(starts_ptr + head * (segments + 1) + segments)
    if slot - extra_query_tiles >= tiles:
        return

    is_extra = slot < extra_query_tiles
    tile = tl.where(is_extra, tiles + slot, slot - extra_query_tiles)
    line = (batch * tl.num_programs(1) + head) * list_rows + tile
    listed = tl.load(counts_ptr + line, mask=tile < tiles, other=0)
    has_list = (tile < tiles) & (listed < tiles)
    steps = tl.where(has_list, listed, tiles) + extra_tiles
    # the i-th key tile is indices[i] while i < listed, then i + past_list
    past_list = tl.where(has_list, tiles - listed, 0)
    listed = tl.where(has_list, listed, 0)
    first = tl.load(first_ptr + head) * TILE

    channels = tl.arange(0, PADDED_DIM)
    real = (channels < HEAD_DIM)[None, :]
    channel = channels[None, :]
    q_rows = tl.load(query_rows_ptr + first + tile * TILE + part * BLOCK_M + tl.arange(0, BLOCK_M))
    q_mask = (q_rows >= 0)[:, None] & real
    if WIDE:
        channel = channel.to(tl.int64)
        q_rows = q_rows.to(tl.int64)
    head64 = head.to(tl.int64)
    q_base = q_ptr + batch * q_batch + head64 * q_head
    q = tl.load(q_base + q_rows[:, None] * q_token + channel * q_channel, mask=q_mask, other=0.0)
    if FLIPPED:
        q = (-q.to(tl.float32)).to(q.dtype)

    kv_head = head64 // kv_repeat
    k_base = k_ptr + batch * k_batch + kv_head * k_head + channel * k_channel
    v_base = v_ptr + batch * v_batch + kv_head * v_head + channel * v_channel
    tile_list = indices_ptr + line * list_width
    key_rows = key_rows_ptr + batch * rows_batch + first + tl.arange(0, BLOCK_N)
    log_sizes = log_sizes_ptr + batch * log_batch + tl.load(first_ptr + head)

    highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, PADDED_DIM), tl.float32)
    for step in range(steps * (TILE // BLOCK_N)):
        i = step // (TILE // BLOCK_N)
        key_tile = tl.load(tile_list + i, mask=i < listed, other=i + past_list)
        rows = tl.load(key_rows + key_tile * TILE + (step % (TILE // BLOCK_N)) * BLOCK_N)
        there = rows >= 0
        mask = there[:, None] & real
        row = rows[:, None]
        if WIDE:
            row = row.to(tl.int64)
        k = tl.load(k_base + row * k_token, mask=mask, other=0.0)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        # masking costs as much as the exponentials, and most tiles are whole
        if tl.load(log_sizes + key_tile) < WHOLE:
            products = tl.where(there[None, :], products, -float("inf"))
        higher = tl.maximum(highest, tl.max(products, 1) * scale)
        # rows without any key so far: exp2(-inf - 0) = 0 where -inf - -inf would be NaN
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.math.exp2(products * scale - shift[:, None])
        decay = tl.math.exp2(highest - shift)
        total = total * decay + tl.sum(weights, 1)
        v = tl.load(v_base + row * v_token, mask=mask, other=0.0)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        highest = higher

    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_base = out_ptr + batch * out_batch + head64 * out_head
    out_at = q_rows[:, None] * out_token + channel * out_channel
    tl.store(out_base + out_at, out.to(out_ptr.dtype.element_ty), mask=q_mask)
    lse = (highest + tl.math.log2(total)) * 0.6931471805599453
    lse_base = lse_ptr + (batch * tl.num_programs(1) + head) * queries
    tl.store(lse_base + q_rows, lse, mask=q_rows >= 0)


def attend(
    call: AttentionCall, selection: Selection, tables: LayerTables, keys: KeyRows
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, H, Nq, D) stored as (B, Nq, H, D) and the natural-log LSE (B, H, Nq) float32.

    A row without any key gives 0 and LSE -inf. List entries past a row's count are not read.
    """
    q = call.q
    batch, heads, queries, head_dim = q.shape
    out = empty_output(q)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    indices = selection.indices.contiguous()
    wide = any(_is_wide(x) for x in (q, call.k, call.v, out))
    generation = gpu_generation(q.device)
    config = attend_config(head_dim, tables.tile_size, q.dtype, generation, wide)
    scale = call.scale * math.log2(math.e)
    programs = (tables.most_tiles + tables.extra_query_tiles) * (tables.tile_size // config.block_m)
    attend_kernel[(programs, heads, batch)](
        q,
        call.k,
        call.v,
        out,
        lse,
        tables.query_rows,
        keys.rows,
        keys.log_sizes,
        tables.first,
        tables.starts,
        indices,
        selection.counts.contiguous(),
        *q.stride(),
        *call.k.stride(),
        *call.v.stride(),
        *out.stride(),
        keys.rows_stride,
        keys.log_stride,
        indices.shape[2],
        indices.shape[3],
        call.kv_repeat,
        tables.segments,
        tables.extra_tiles,
        tables.extra_query_tiles,
        queries,
        max(abs(scale), _LEAST_SCALE),
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        TILE=tables.tile_size,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        WHOLE=math.log(tables.tile_size - 0.5),
        WIDE=wide,
        FLIPPED=scale < 0.0,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    return out, lse


def _is_wide(x: torch.Tensor) -> bool:
    """Whether offsets within one head of x (B, H, N, D) pass 32 bits."""
    return x.stride(2) * x.shape[2] + x.stride(3) * x.shape[3] >= 2**31
