"""Lists of scored heads: statistics, scores and choice, a bounded number of lines at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ..call import AttentionCall, Selection
from ..layout import Layout
from ..plan import TileShape
from ..static_modes import Modes
from .choose import choose
from .fused import score_and_choose
from .lines import Lines
from .place import StaticTable, static_table
from .pool import pool
from .project import project
from .score import score
from .steps import steps_of
from .tables import KeyRows, LayerTables, budget_table


@dataclass(frozen=True, eq=False)
class ListTables:
    """What a layer's lists are made of, as far as no call changes it.

    heads: (h,) int32, the scored heads, with h = 0 where there are none. budgets: (h, n, V) int32,
    see `budget_table`, or None. static: the static heads, or None. width: entries of the longest
    list there can be, at least 1.
    """

    heads: torch.Tensor
    budgets: torch.Tensor | None
    static: StaticTable | None
    width: int


@lru_cache(maxsize=256)
def list_tables(
    layout: Layout,
    tile_shapes: tuple[TileShape, ...],
    density: tuple[float, ...],
    modes: Modes | None,
    most_tiles: int,
    device: torch.device,
) -> ListTables:
    """The tables of heads with these shapes, densities and modes; cached, read-only."""
    scored = [h for h in range(len(tile_shapes)) if modes is None or modes[h] is None]
    static = None if modes is None else static_table(layout, tile_shapes, modes, device)
    width, budgets = 1 if static is None else max(static.width, 1), None
    if scored:
        shapes = tuple(tile_shapes[head] for head in scored)
        shares = tuple(density[head] for head in scored)
        budgets, most = budget_table(layout, shapes, shares, most_tiles, device)
        width = max(width, most)
    heads = torch.tensor(scored, dtype=torch.int32, device="cpu").to(device)
    return ListTables(heads, budgets, static, width)


def select_scored(
    call: AttentionCall,
    tables: LayerTables,
    keys: KeyRows,
    lists: ListTables,
    selection: Selection,
) -> None:
    """Write the lists of the scored heads; the rules are `select_tiles`'.

    The workspace for features and scores does not grow with batch and heads, nor with the square of
    the tiles: see `steps`. Nothing waits for the device.
    """
    if lists.budgets is None:
        return
    plan, scored = call.plan, lists.heads.shape[0]
    second, extremes = plan.score != "mean", plan.projection is not None
    total = call.q.shape[0] * scored
    steps = steps_of(plan, call.q.shape[3], total, tables.most_tiles)

    def workspace(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=call.q.device)

    features = workspace(2, steps.lines, steps.tiles, steps.features)
    pooled, factors = features, (call.scale, 0.5 * call.scale * call.scale)
    if steps.weighted:
        pooled, factors = workspace(2, steps.lines, steps.tiles, steps.pooled), (1.0, 1.0)
    scores = None if steps.fused else workspace(steps.lines, steps.rows, steps.stride)
    for begin in range(0, total, steps.lines):
        count = min(steps.lines, total - begin)
        lines = Lines(begin, count, lists.heads, scored < plan.heads, scored)
        pool(call, tables, keys, lines, pooled, second, extremes, *factors)
        if steps.weighted:
            project(plan, pooled, tables, lines, features, call.scale)
        target = (second, keys, tables, lists.budgets, selection, call.keep_all, lines)
        if scores is None:
            score_and_choose(features, *target)
            continue
        for first_row in range(0, steps.tiles, steps.rows):
            rows = min(steps.rows, steps.tiles - first_row)
            score(features, tables, lines, first_row, rows, scores)
            choose(scores, first_row, rows, *target)
