"""Selection in plain torch: which key tiles each query tile keeps."""

from __future__ import annotations

import itertools

import torch

from .budget import tiles_to_keep
from .call import AttentionCall, Selection
from .plan import TileShape
from .scores import key_features, query_features, tile_scores
from .static_modes import static_lists
from .statistics import tile_statistics
from .tiles import TileTable, tile_table, tiles_with_keys


def select_tiles(call: AttentionCall) -> Selection:
    """Score the tiles of every head and keep the budget's share, by batch element and query tile.

    Within each video segment of the keys the highest scores win, ties going to the lower tile
    number; the query's own tile is always kept and counted; tiles without a valid key never are.
    Static heads keep what their mode says, but for tiles without a valid key. Executors may count
    such tiles in rows that keep everything.
    """
    call = call.with_flag_read()
    keeps = {shape: _kept(call, shape, heads) for shape, heads in call.plan.groups().items()}
    return lists_of(keeps, call)


def lists_of(keeps: dict[TileShape, torch.Tensor], call: AttentionCall) -> Selection:
    """Turn boolean maps (B, h, n, n), one per group of heads, into padded ascending lists."""
    batch, heads = call.q.shape[:2]
    rows = max(keep.shape[2] for keep in keeps.values())
    width = max(1, *(int(keep.sum(-1).max()) for keep in keeps.values()))
    indices = torch.zeros(batch, heads, rows, width, dtype=torch.int32, device=call.q.device)
    counts = torch.zeros(batch, heads, rows, dtype=torch.int32, device=call.q.device)
    groups = call.plan.groups()
    for shape, keep in keeps.items():
        n = keep.shape[2]
        kept_first = torch.argsort(keep.to(torch.int8), dim=-1, descending=True, stable=True)
        used = min(width, n)
        indices[:, groups[shape], :n, :used] = kept_first[..., :used].int()
        counts[:, groups[shape], :n] = keep.sum(-1).int()
    return Selection(indices, counts)


def kept_map(selection: Selection, heads: list[int], tiles: int) -> torch.Tensor:
    """Inverse of `lists_of` for one group of heads: (B, h, n, n) bool."""
    indices = selection.indices[:, heads, :tiles].long()
    counts = selection.counts[:, heads, :tiles]
    everything = (counts == tiles)[..., None]
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    listed &= ~everything
    # unlisted entries are unspecified: send them to a column that is cut off
    keep = indices.new_zeros((*indices.shape[:3], tiles + 1), dtype=torch.bool)
    keep.scatter_(-1, torch.where(listed, indices, tiles), True)
    return keep[..., :tiles] | everything


def _kept(call: AttentionCall, shape: TileShape, heads: list[int]) -> torch.Tensor:
    """(B, h, n, n) bool for the heads that share one tile shape."""
    table = tile_table(call.layout, shape, call.q.device)
    scored = [head for head in heads if call.plan.mode(head) is None]
    if scored == heads:
        return _kept_by_score(call, table, shape, heads)
    sizes = (call.q.shape[0], len(heads), table.tiles, table.tiles)
    keep = torch.zeros(sizes, dtype=torch.bool, device=call.q.device)
    if scored:
        keep[:, [heads.index(head) for head in scored]] = _kept_by_score(call, table, shape, scored)
    for place, head in enumerate(heads):
        mode = call.plan.mode(head)
        if mode is not None:
            keep[:, place] = static_lists(call.layout, shape, mode).map().to(keep.device)
    return keep & tiles_with_keys(table, call.key_valid)[:, None, None]


def _kept_by_score(
    call: AttentionCall, table: TileTable, shape: TileShape, heads: list[int]
) -> torch.Tensor:
    """(B, h, n, n) bool for scored heads: the best of each video segment."""
    scores = _scores(call, table, heads)
    own = torch.eye(table.tiles, dtype=torch.bool, device=scores.device)
    scores = scores.masked_fill(own & (scores > -torch.inf), torch.inf)
    keep = torch.zeros_like(scores, dtype=torch.bool)
    budgets = torch.stack(
        [tiles_to_keep(call.layout, shape, call.plan.density[head]) for head in heads]
    ).to(scores.device)
    for segment, (start, stop) in enumerate(itertools.pairwise(table.starts)):
        part = scores[..., start:stop]
        best_first = torch.argsort(part, dim=-1, descending=True, stable=True)
        rank = torch.argsort(best_first, dim=-1)
        keep[..., start:stop] = (rank < budgets[:, :, segment, None]) & (part > -torch.inf)
    return keep


def _scores(call: AttentionCall, table: TileTable, heads: list[int]) -> torch.Tensor:
    extremes = call.plan.score == "projection"
    kv_heads = [head // call.kv_repeat for head in heads]
    q_stats = tile_statistics(call.q[:, heads], table.query_rows, None, extremes)
    k_stats = tile_statistics(call.k[:, kv_heads], table.rows, call.key_valid, extremes)
    return tile_scores(
        query_features(q_stats, call.plan, heads, call.scale),
        key_features(k_stats, call.plan, heads),
        k_stats.count,
        call.plan,
    )
