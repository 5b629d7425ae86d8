"""Distillation targets on the GPU, in two passes that never store a logit.

The passes are those of the paper's target kernel (Veda, arXiv 2605.30325, the section on kernels):
first the log-sum-exp of every sampled row, then its probabilities again, reduced by tile. The sum
is what to learn from, as the authors found later, and the maximum is the paper's target: see
../targets.py, which this agrees with.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..call import AttentionCall
from ..executors import Traits, choose_executor, on_device
from ..plan import TileShape
from ..targets import TileTargets, as_targets, check_lse, check_sample, group_of
from ..tiles import tile_table
from .configs import AttendConfig
from .tables import KeyRows, LayerTables, key_rows, layer_tables


@triton.jit
def _query_rows(query_rows_ptr, sample_ptr, TILE: tl.constexpr, BLOCK_M: tl.constexpr):
    """(BLOCK_M,) int64: this program's rows of q, -1 for none."""
    tile = tl.load(sample_ptr + tl.program_id(0) // (TILE // BLOCK_M))
    part = tl.program_id(0) % (TILE // BLOCK_M)
    at = tile * TILE + part * BLOCK_M + tl.arange(0, BLOCK_M)
    return tl.load(query_rows_ptr + at).to(tl.int64)


@triton.jit
def _gathered(x_ptr, rows, x_token, x_channel, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """(len(rows), PADDED_DIM): rows of one head, 0 where there is none."""
    channels = tl.arange(0, PADDED_DIM)
    mask = (rows >= 0)[:, None] & (channels < HEAD_DIM)[None, :]
    at = rows.to(tl.int64)[:, None] * x_token + channels.to(tl.int64)[None, :] * x_channel
    return tl.load(x_ptr + at, mask=mask, other=0.0)


@triton.jit
def _logits(
    q, k_ptr, rows, k_token, k_channel, scale, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr
):
    """Logits of q for some rows of k, -inf where there is none. They carry log2(e), for exp2."""
    k = _gathered(k_ptr, rows, k_token, k_channel, HEAD_DIM, q.shape[1])
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    return tl.where((rows >= 0)[None, :], logits, -float("inf"))


@triton.jit
def lse_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    query_rows_ptr,
    key_rows_ptr,
    sample_ptr,
    heads_ptr,
    q_batch,
    q_head,
    q_token,
    q_channel,
    k_batch,
    k_head,
    k_token,
    k_channel,
    rows_batch,
    heads,
    kv_repeat,
    queries,
    key_tiles,
    scale,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program computes the log-sum-exp of BLOCK_M rows of one sampled tile of one head.

    key_rows: (B or 1, C, TILE), the tiles that hold all keys. sample: (m,) query tiles. heads_ptr:
    (h,) heads to work on, of the `heads` there are. lse: (B, heads, queries) float32, contiguous;
    only rows of the sample are written. Logits carry log2(e), for exp2.
    """
    head = tl.load(heads_ptr + tl.program_id(1)).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    q_rows = _query_rows(query_rows_ptr, sample_ptr, TILE, BLOCK_M)
    q_head_ptr = q_ptr + batch * q_batch + head * q_head
    q = _gathered(q_head_ptr, q_rows, q_token, q_channel, HEAD_DIM, PADDED_DIM)
    k_head_ptr = k_ptr + batch * k_batch + (head // kv_repeat) * k_head
    key_rows = key_rows_ptr + batch * rows_batch + tl.arange(0, BLOCK_N)

    highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for step in range(key_tiles * (TILE // BLOCK_N)):
        rows = tl.load(key_rows + step * BLOCK_N)
        logits = _logits(q, k_head_ptr, rows, k_token, k_channel, scale, HEAD_DIM, PRECISION)
        higher = tl.maximum(highest, tl.max(logits, 1))
        # rows without any key so far: exp2(-inf - 0) = 0 where -inf - -inf would be NaN
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.math.exp2(highest - shift)
        total += tl.sum(tl.math.exp2(logits - shift[:, None]), 1)
        highest = higher

    lse = (highest + tl.math.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + (batch * heads + head) * queries + q_rows, lse, mask=q_rows >= 0)


@triton.jit
def reduce_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    query_rows_ptr,
    key_rows_ptr,
    sample_ptr,
    heads_ptr,
    total_ptr,
    highest_ptr,
    q_batch,
    q_head,
    q_token,
    q_channel,
    k_batch,
    k_head,
    k_token,
    k_channel,
    rows_batch,
    heads,
    kv_repeat,
    queries,
    key_tiles,
    scale,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program sums up the probabilities of BLOCK_M rows of one sampled tile, by key tile.

    total, highest: (B, h, m * TILE // BLOCK_M, C) float32, contiguous: the sum of probabilities
    and the largest one. The rest as in `lse_kernel`, which wrote lse.
    """
    head = tl.load(heads_ptr + tl.program_id(1)).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    q_rows = _query_rows(query_rows_ptr, sample_ptr, TILE, BLOCK_M)
    q_head_ptr = q_ptr + batch * q_batch + head * q_head
    q = _gathered(q_head_ptr, q_rows, q_token, q_channel, HEAD_DIM, PADDED_DIM)
    k_head_ptr = k_ptr + batch * k_batch + (head // kv_repeat) * k_head
    # a row the tile does not have gets +inf, and so probabilities of exp2(-inf) = 0
    lse_base = lse_ptr + (batch * heads + head) * queries
    lse = tl.load(lse_base + q_rows, mask=q_rows >= 0, other=float("inf"))
    shift = tl.where(lse == -float("inf"), 0.0, lse * 1.4426950408889634)
    key_rows = key_rows_ptr + batch * rows_batch + tl.arange(0, BLOCK_N)
    line = (batch * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)

    total = tl.zeros((BLOCK_M,), tl.float32)
    highest = tl.zeros((BLOCK_M,), tl.float32)
    # one flat loop: an inner one would be unrolled, which spills, or not be pipelined
    for step in range(key_tiles * (TILE // BLOCK_N)):
        rows = tl.load(key_rows + step * BLOCK_N)
        logits = _logits(q, k_head_ptr, rows, k_token, k_channel, scale, HEAD_DIM, PRECISION)
        weights = tl.math.exp2(logits - shift[:, None])
        fresh = step % (TILE // BLOCK_N) == 0
        total = tl.where(fresh, 0.0, total) + tl.sum(weights, 1)
        highest = tl.maximum(tl.where(fresh, 0.0, highest), tl.max(weights, 1))
        if (step + 1) % (TILE // BLOCK_N) == 0:
            at = line * key_tiles + step // (TILE // BLOCK_N)
            mass = tl.sum(total, 0)
            tl.store(total_ptr + at, mass)
            # a maximum passes over NaN, which must show
            tl.store(highest_ptr + at, tl.where(mass == mass, tl.max(highest, 0), mass))


def tile_targets(
    call: AttentionCall,
    query_tiles: torch.Tensor,
    lse: torch.Tensor | None = None,
    shape: TileShape | None = None,
) -> TileTargets:
    """As `targets.tile_targets`, which see. With `lse` given there is only the second pass.

    Waits for the GPU only to check `query_tiles`, and not if they are on the CPU. Also raises
    ExecutorError for calls that `TritonExecutor.verify` refuses.
    """
    device = call.q.device
    choose_executor(
        "triton", Traits(device.type, call.q.dtype, call.q.shape[-1], call.plan.tile_size)
    )
    shape, heads = group_of(call, shape)
    table = tile_table(call.layout, shape, device)
    check_sample(query_tiles, table.tiles)
    check_lse(call, lse)
    tables = layer_tables(call.layout, (shape,), device)
    keys = key_rows(tables, call.key_valid)
    sample = query_tiles.to(device, torch.int32).contiguous()
    with on_device(device):
        total, highest = _pooled(call, sample, _numbers(tuple(heads), device), lse, tables, keys)
    return as_targets(total.sum(3), highest.amax(3), table, sample.long())


def _pooled(
    call: AttentionCall,
    sample: torch.Tensor,
    heads: torch.Tensor,
    lse: torch.Tensor | None,
    tables: LayerTables,
    keys: KeyRows,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum and maximum of probabilities, (B, h, m, parts of a query tile, C) float32 each."""
    q = call.q
    head_dim, size = q.shape[-1], tables.tile_size
    config = _config(head_dim, size, q.dtype)
    parts, key_tiles = size // config.block_m, keys.rows.shape[1]
    grid = (len(sample) * parts, len(heads), q.shape[0])
    tokens = (tables.query_rows, keys.rows, sample, heads)
    numbers = (
        *q.stride(),
        *call.k.stride(),
        keys.rows_stride,
        q.shape[1],
        call.kv_repeat,
        q.shape[2],
        key_tiles,
        call.scale * math.log2(math.e),
    )
    constants = {
        "HEAD_DIM": head_dim,
        "PADDED_DIM": triton.next_power_of_2(head_dim),
        "TILE": size,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }
    if lse is None:
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        lse_kernel[grid](q, call.k, lse, *tokens, *numbers, **constants)
    total, highest = torch.empty(
        (2, q.shape[0], len(heads), len(sample), parts, key_tiles),
        dtype=torch.float32,
        device=q.device,
    )
    reduce_kernel[grid](q, call.k, lse.contiguous(), *tokens, total, highest, *numbers, **constants)
    return total, highest


def _config(head_dim: int, tile_size: int, dtype: torch.dtype) -> AttendConfig:
    """How both kernels are launched; each compiles without register spills."""
    if dtype == torch.float32:  # each product is three TF32 ones, see `configs`
        return AttendConfig(32, 32 if head_dim == 64 else 16, 4, 2)
    return AttendConfig(tile_size, 64, tile_size // 16, 3)


@lru_cache(maxsize=256)
def _numbers(heads: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(h,) int32 on `device`; cached, so that a call copies nothing to it. Read-only."""
    return torch.tensor(heads, dtype=torch.int32, device="cpu").to(device)
