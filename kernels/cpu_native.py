"""Attention by the compiled CPU kernel: the Python side of cpu_attend.cpp."""

from __future__ import annotations

import ctypes

import torch

from .call import AttentionCall, Selection, empty_output
from .cpu_build import DTYPES, TensorView, load_library
from .tiles import tile_table


class _Call(ctypes.Structure):
    """`Call` of the C++ source, field by field."""

    _fields_ = [
        *((name, TensorView) for name in ("q", "k", "v")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "out", "lse", "key_valid", "tile_rows", "query_rows", "tile_counts", "extra",
                "extra_queries", "indices", "counts",
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                "dtype", "batches", "heads", "kv_heads", "queries", "keys", "head_dim",
                "tile_size", "extra_count", "extra_query_count", "list_rows", "list_width",
                "threads",
            )
        ),
        ("scale", ctypes.c_double),
    ]  # fmt: skip


def native_attend(call: AttentionCall, selection: Selection) -> tuple[torch.Tensor, torch.Tensor]:
    """`Executor.attend` by the compiled kernel. Raises BuildError where there is none."""
    library = load_library()
    out = empty_output(call.q)
    lse = call.q.new_empty(call.q.shape[:3], dtype=torch.float32)
    # the kernel writes float16 results as float32
    target = torch.empty_like(out, dtype=torch.float32) if call.q.dtype == torch.float16 else out
    tables = [tile_table(call.layout, s, call.q.device) for s in call.plan.tile_shapes]
    rows = (ctypes.c_void_p * len(tables))(*(table.rows.data_ptr() for table in tables))
    query_rows = (ctypes.c_void_p * len(tables))(*(t.query_rows.data_ptr() for t in tables))
    tile_counts = (ctypes.c_int64 * len(tables))(*(table.tiles for table in tables))
    indices, counts = selection.indices.contiguous(), selection.counts.contiguous()
    valid = None if call.key_valid is None else call.key_valid.contiguous()
    extra, extra_queries = tables[0].extra, tables[0].extra_queries
    batch, heads, queries, head_dim = call.q.shape
    native = _Call(
        TensorView.of(call.q),
        TensorView.of(call.k),
        TensorView.of(call.v),
        target.data_ptr(),
        lse.data_ptr(),
        None if valid is None else valid.data_ptr(),
        ctypes.addressof(rows),
        ctypes.addressof(query_rows),
        ctypes.addressof(tile_counts),
        extra.data_ptr(),
        extra_queries.data_ptr(),
        indices.data_ptr(),
        counts.data_ptr(),
        DTYPES[call.q.dtype],
        batch,
        heads,
        call.k.shape[1],
        queries,
        call.k.shape[2],
        head_dim,
        call.plan.tile_size,
        extra.numel(),
        extra_queries.numel(),
        indices.shape[2],
        indices.shape[3],
        torch.get_num_threads(),
        call.scale,
    )
    library.veda_attend(ctypes.byref(native))
    if target is not out:
        out.copy_(target)
    return out, lse
