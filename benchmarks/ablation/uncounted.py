"""The score without log S_j: ragged tiles count as if they were full. For comparison alone."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.quality.rule import Choice, Site, counted
from veda_compile.keep_maps import keep_maps
from veda_compile.kernels.plan import Plan
from veda_compile.kernels.scores import key_features, query_features, tile_scores
from veda_compile.kernels.selection import lists_of
from veda_compile.kernels.static_modes import static_lists
from veda_compile.kernels.statistics import tile_statistics
from veda_compile.kernels.tiles import tile_table


def without_log_sizes(site: Site, plan: Plan) -> Choice:
    """What the backend would keep under `plan` if its scores lacked log S_j."""
    return by_scores(site, plan, 0.0)


def by_scores(site: Site, plan: Plan, size_weight: float) -> Choice:
    """What a plan keeps when log S_j counts `size_weight` times; 1 is the backend's own choice."""
    call = site.call(plan)
    keeps = {}
    for shape, heads in plan.groups().items():
        table = tile_table(site.layout, shape, site.q.device)
        extremes = plan.projection is not None
        q, k = (tile_statistics(x[:, heads], table.rows, None, extremes) for x in (site.q, site.k))
        scores = tile_scores(
            query_features(q, plan, heads, site.scale), key_features(k, plan, heads), k.count, plan
        )
        scores += (size_weight - 1.0) * torch.log(k.count)[..., None, :]
        tiles = torch.arange(table.tiles)
        maps: list[Tensor] = []
        for place, head in enumerate(heads):
            mode = plan.mode(head)
            if mode is not None:
                maps.append(static_lists(site.layout, shape, mode).map())
                continue
            density = plan.density[head]
            maps.append(keep_maps(scores[0, place], tiles, site.layout, shape, [density])[0])
        keeps[shape] = torch.stack(maps)[None]
    return counted(call, lists_of(keeps, call))
