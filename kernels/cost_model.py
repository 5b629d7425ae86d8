"""Is sparse attention faster than dense for a call? Predicted from measured costs.

Both times are sums of a few kinds of work times what each costs, by device and dtype:

    dense  = call + pairs * p + pairs * D * a
    sparse = call + heads * h + tokens * D * t + tile pairs * s + kept * p + kept * D * a

tokens, pairs of tokens, pairs of tiles and kept pairs are over batch and heads, D is head_dim.
`cost_tables.py` holds the costs; `python -m benchmarks.cost_table` measures them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .budget import kept_density
from .cost_tables import PLAIN_CPU, TABLES, CostTable
from .cpu import has_native_kernels
from .executors import capability_here
from .layout import Layout
from .plan import Plan, count_tiles
from .static_modes import mode_density


@dataclass(frozen=True)
class Work:
    """What one attention call computes.

    heads: of all batch elements together. head_dim: of each. queries, keys: tokens of one sample.
    video: those on a grid. tiles: of the video, mean over heads. kept: share of the video's tile
    pairs that is kept, mean over heads.
    """

    heads: int
    head_dim: int
    queries: int
    keys: int
    video: int
    tiles: float
    kept: float

    @property
    def pairs(self) -> float:
        """Pairs of a query and a key in dense attention."""
        return float(self.heads) * self.queries * self.keys

    @property
    def kept_pairs(self) -> float:
        """Pairs that sparse attention multiplies: tokens without a grid meet everything."""
        others = self.video * (self.keys - self.video) + (self.queries - self.video) * self.keys
        return self.heads * (self.kept * self.video**2 + others)

    def dense_parts(self) -> tuple[float, ...]:
        """What the costs of dense attention are multiplied with."""
        return (1.0, self.pairs, self.pairs * self.head_dim)

    def sparse_parts(self) -> tuple[float, ...]:
        """What the costs of sparse attention are multiplied with."""
        return (
            1.0,
            float(self.heads),
            float(self.heads) * (self.queries + self.keys) * self.head_dim,
            self.heads * self.tiles**2,
            self.kept_pairs,
            self.kept_pairs * self.head_dim,
        )


@dataclass(frozen=True)
class Forecast:
    """How long a call takes dense and sparse, in milliseconds where `measured`, else in no unit.

    worth: whether sparse is to be expected faster, even where the prediction is off as far as such
    predictions were seen to be. most_kept: the largest share of the video's tile pairs with which
    the same call would still be `worth` it; 0.0 where none is.
    """

    dense: float
    sparse: float
    measured: bool
    worth: bool
    most_kept: float

    @property
    def gain(self) -> float:
        """Dense over sparse time."""
        return self.dense / self.sparse


def work_of(plan: Plan, layout: Layout, batch: int, head_dim: int) -> Work:
    """The work of a call with this plan and layout."""
    tiles = kept = 0.0
    for head, shape in enumerate(plan.tile_shapes):
        mode = plan.mode(head)
        tiles += sum(count_tiles(video.grid, shape) for _, video in layout.videos)
        if mode is None:
            kept += kept_density(layout, shape, plan.density[head])
        else:
            kept += mode_density(layout, shape, mode)
    video = sum(video.length for _, video in layout.videos)
    heads = plan.heads
    return Work(
        batch * heads, head_dim, layout.query_length, layout.length, video, tiles / heads,
        kept / heads,
    )  # fmt: skip


def forecast(work: Work, device: str, dtype: torch.dtype, executor: str) -> Forecast | None:
    """The times to expect; None where nothing is known of such calls on that executor.

    device: "cpu", "cuda", ...; a device without a table of its own counts as "cuda". executor: its
    name. Does not look at tensors; may compile the CPU's kernels, where it says they are worth it.
    """
    if (executor == "cpu") != (device == "cpu") or executor == "reference":
        return None
    table = _table_of(device, str(dtype).removeprefix("torch."))
    if table is None:
        return None
    if device == "cpu":
        table = with_threads(table, torch.get_num_threads())
    found = from_table(table, work)
    if device == "cpu" and found.worth and not has_native_kernels():
        plain = table._replace(sparse=tuple(PLAIN_CPU * cost for cost in table.sparse))
        return from_table(plain, work)
    return found


def with_threads(table: CostTable, threads: int) -> CostTable:
    """A table of one thread for several, on the safe side: dense attention is as many times faster,
    and what a sparse call costs whatever its length is not."""
    call, heads, *rest = table.sparse
    return table._replace(
        dense=tuple(cost / threads for cost in table.dense),
        sparse=(call, heads, *(cost / threads for cost in rest)),
    )


def _table_of(device: str, dtype: str) -> CostTable | None:
    if device == "cpu":
        return TABLES.get(f"cpu {dtype}")
    generation = capability_here()[0] if device == "cuda" else 0
    return TABLES.get(f"cuda {generation} {dtype}") or TABLES["cuda"]


def from_table(table: CostTable, work: Work) -> Forecast:
    """What a table foretells of a call."""
    dense = _total(table.dense, work.dense_parts())
    sparse = _total(table.sparse, work.sparse_parts())
    allowed = dense / table.factor
    # of the share kept, times are a straight line
    fixed = _total(table.sparse, replace(work, kept=0.0).sparse_parts())
    slope = _total(table.sparse, replace(work, kept=1.0).sparse_parts()) - fixed
    most = (allowed - fixed) / slope if slope > 0.0 else float(allowed >= fixed)
    enough = work.video >= table.least_tokens
    return Forecast(
        dense,
        sparse,
        table.measured,
        enough and sparse <= allowed,
        min(max(most, 0.0), 1.0) if enough else 0.0,
    )


def _total(costs: tuple[float, ...], parts: tuple[float, ...]) -> float:
    return sum(cost * part for cost, part in zip(costs, parts, strict=True))
