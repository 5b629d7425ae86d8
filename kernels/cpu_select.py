"""Selection by the compiled CPU kernels: the Python side of cpu_select.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from .budget import tiles_to_keep
from .call import AttentionCall, Selection
from .cpu_build import DTYPES, TensorView, load_library, threads_for
from .plan import TileShape
from .scores import key_features, query_features, tile_scores
from .static_modes import StaticLists, static_lists
from .statistics import TileStatistics
from .tiles import TileTable, tile_table, tiles_with_keys


class _Statistics(ctypes.Structure):
    """`Statistics` of the C++ source, field by field."""

    _fields_ = [
        ("x", TensorView),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "valid", "rows", "heads", "count", "mean", "second", "variance", "highest",
                "lowest",
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                "dtype", "batches", "head_count", "tokens", "head_dim", "tiles", "tile_size",
                "threads",
            )
        ),
    ]  # fmt: skip


class _Choice(ctypes.Structure):
    """`Choice` of the C++ source, field by field."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("scores", "budgets", "starts", "heads", "indices", "counts")
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                "batches", "head_count", "tiles", "segments", "all_heads", "list_rows",
                "list_width", "threads",
            )
        ),
    ]  # fmt: skip


def native_select(call: AttentionCall) -> Selection:
    """`select_tiles`, compiled. Raises BuildError where the kernels cannot be built."""
    call = call.with_flag_read()
    batch, heads = call.q.shape[:2]
    plan, layout = call.plan, call.layout
    groups = plan.groups()
    tables = {shape: tile_table(layout, shape, call.q.device) for shape in groups}
    budgets: dict[TileShape, torch.Tensor] = {}
    scored = {shape: [h for h in own if plan.mode(h) is None] for shape, own in groups.items()}
    for shape, members in scored.items():
        if members:
            own = [tiles_to_keep(layout, shape, plan.density[head]) for head in members]
            budgets[shape] = torch.stack(own)
    fixed = _static_heads(call)
    widths = [int(budget.sum(-1).max()) for budget in budgets.values()]
    width = max(widths + [lists.indices.shape[1] for lists in fixed.values()])
    rows = max(table.tiles for table in tables.values())
    indices = torch.empty(batch, heads, rows, width, dtype=torch.int32, device=call.q.device)
    counts = torch.zeros(batch, heads, rows, dtype=torch.int32, device=call.q.device)
    selection = Selection(indices, counts)
    for shape, budget in budgets.items():
        scores = _scores(call, tables[shape], scored[shape])
        _choose(scores, budget, tables[shape], scored[shape], selection)
    alive = {
        shape: tiles_with_keys(tables[shape], call.key_valid)
        for shape in {plan.tile_shapes[head] for head in fixed}
    }
    for head, lists in fixed.items():
        _place(lists, alive[plan.tile_shapes[head]], selection, head)
    return selection


def _static_heads(call: AttentionCall) -> dict[int, StaticLists]:
    """The lists of the static heads, by head."""
    found: dict[int, StaticLists] = {}
    for head, shape in enumerate(call.plan.tile_shapes):
        mode = call.plan.mode(head)
        if mode is not None:
            found[head] = static_lists(call.layout, shape, mode)
    return found


def _place(lists: StaticLists, alive: torch.Tensor, selection: Selection, head: int) -> None:
    """Write the lists of one static head into `selection`. alive: (B or 1, n) bool."""
    tiles, width = lists.indices.shape
    indices, counts = selection.indices[:, head, :tiles, :width], selection.counts[:, head, :tiles]
    if bool(alive.all()):
        indices.copy_(lists.indices)
        counts.copy_(lists.counts)
        return
    listed = torch.arange(width, device=alive.device) < lists.counts[:, None]
    kept = listed & alive[:, lists.indices.long()]  # (B, n, K)
    kept_first = torch.argsort(kept.to(torch.int8), dim=-1, descending=True, stable=True)
    indices.copy_(lists.indices.expand(kept.shape).gather(-1, kept_first))
    counts.copy_(kept.sum(-1))


def native_statistics(
    x: torch.Tensor,
    heads: list[int],
    tile_rows: torch.Tensor,
    valid: torch.Tensor | None,
    extremes: bool,
) -> TileStatistics:
    """`tile_statistics` of the heads `heads` of x (B, H, N, D), h of them, compiled."""
    batch, _, tokens, head_dim = x.shape
    tiles, size = tile_rows.shape
    count = x.new_empty((batch, len(heads), tiles), dtype=torch.float32)
    shape = (5 if extremes else 3, batch, len(heads), tiles, head_dim)
    moments = x.new_empty(shape, dtype=torch.float32)
    head_numbers = _numbers(heads)
    counted = None if valid is None else valid.contiguous()
    job = _Statistics(
        TensorView.of(x),
        None if counted is None else counted.data_ptr(),
        tile_rows.data_ptr(),
        ctypes.addressof(head_numbers),
        count.data_ptr(),
        *(moment.data_ptr() for moment in moments.unbind()),
        *(() if extremes else (None, None)),
        DTYPES[x.dtype],
        batch,
        len(heads),
        tokens,
        head_dim,
        tiles,
        size,
        threads_for(batch * len(heads) * tokens * head_dim),
    )
    load_library().veda_statistics(ctypes.byref(job))
    mean, second, variance = moments[:3]
    highest, lowest = (moments[3], moments[4]) if extremes else (None, None)
    return TileStatistics(count[:, :1], mean, second, variance, highest, lowest)


def _scores(call: AttentionCall, table: TileTable, heads: list[int]) -> torch.Tensor:
    """(B, h, n, n) float32."""
    extremes = call.plan.score == "projection"
    q_stats = native_statistics(call.q, heads, table.query_rows, None, extremes)
    kv_heads = [head // call.kv_repeat for head in heads]
    distinct = sorted(set(kv_heads))
    k_stats = native_statistics(call.k, distinct, table.rows, call.key_valid, extremes)
    if distinct != kv_heads:  # query heads that share KV heads share their statistics
        k_stats = _of_heads(k_stats, [distinct.index(head) for head in kv_heads])
    return tile_scores(
        query_features(q_stats, call.plan, heads, call.scale),
        key_features(k_stats, call.plan, heads),
        k_stats.count,
        call.plan,
    )


def _numbers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _of_heads(stats: TileStatistics, heads: list[int]) -> TileStatistics:
    return TileStatistics(
        stats.count,
        stats.mean[:, heads],
        stats.second[:, heads],
        stats.variance[:, heads],
        None if stats.highest is None else stats.highest[:, heads],
        None if stats.lowest is None else stats.lowest[:, heads],
    )


def _choose(
    scores: torch.Tensor,
    budgets: torch.Tensor,
    table: TileTable,
    heads: list[int],
    selection: Selection,
) -> None:
    """Write the lists of one group of heads into `selection`."""
    scores, budgets = scores.contiguous(), budgets.contiguous()
    starts, head_numbers = _numbers(table.starts), _numbers(heads)
    batch, all_heads, rows, width = selection.indices.shape
    job = _Choice(
        scores.data_ptr(),
        budgets.data_ptr(),
        ctypes.addressof(starts),
        ctypes.addressof(head_numbers),
        selection.indices.data_ptr(),
        selection.counts.data_ptr(),
        batch,
        len(heads),
        table.tiles,
        len(table.starts) - 1,
        all_heads,
        rows,
        width,
        threads_for(scores.numel()),
    )
    load_library().veda_choose(ctypes.byref(job))
