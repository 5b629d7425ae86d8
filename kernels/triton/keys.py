"""The keys of a call, tile by tile: the layer's table without the keys that are ruled out."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

ROWS = 8
"""Tiles per program."""


@triton.jit(do_not_specialize=["all_rows"])
def valid_keys_kernel(
    rows_ptr,
    valid_ptr,
    out_ptr,
    log_sizes_ptr,
    valid_batch,
    valid_token,
    all_rows,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program copies ROWS rows of the table (R, TILE) int32 for one batch element.

    Keys that valid (B, Nk) bool rules out become -1. out: (B, R, TILE) int32; log_sizes: (B, R)
    float32, the log of the keys left in each row, -inf for none.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < all_rows
    batch = tl.program_id(1).to(tl.int64)
    at = row[:, None] * TILE + tl.arange(0, TILE)[None, :]
    keys = tl.load(rows_ptr + at, mask=there[:, None], other=-1)
    valid = valid_ptr + batch * valid_batch + keys.to(tl.int64) * valid_token
    seen = tl.load(valid, mask=keys >= 0, other=0).to(tl.int1)
    tl.store(out_ptr + batch * all_rows * TILE + at, tl.where(seen, keys, -1), mask=there[:, None])
    count = tl.sum(seen.to(tl.int32), 1)
    log_size = tl.where(count > 0, tl.log(tl.maximum(count, 1).to(tl.float32)), -float("inf"))
    tl.store(log_sizes_ptr + batch * all_rows + row, log_size, mask=there)
