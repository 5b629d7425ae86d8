"""From a calibration's measurements to a sidecar."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .allocation import allocate
from .kernels.plan import TileShape
from .layer_search import LayerSearch
from .sidecar import Sidecar
from .sidecar_schema import Grid, GridPlan, LayerCard, ModelCard

Option = tuple[TileShape, float, float]


def calibrated_sidecar(
    model_class: str,
    layers: Sequence[LayerCard],
    searches: Mapping[tuple[str, Grid], LayerSearch],
    density: float,
    provenance: Mapping[str, Any],
) -> Sidecar:
    """Plans for every grid on which all of `layers` are searched; there must be one.

    density: the mean over all heads of all layers, spent where it lowers the output error most.
    """
    plans = []
    for grid in dict.fromkeys(grid for _, grid in searches):
        found = [searches.get((card.name, grid)) for card in layers]
        done = [search for search in found if search is not None and search.done]
        if len(done) == len(layers):
            plans.append(_grid_plan(grid, done, density))
    score = next(iter(searches.values())).score
    size = math.prod(plans[0].tile_shapes[0][0])
    return Sidecar(ModelCard(model_class, tuple(layers)), tuple(plans), score, size, provenance)


def _grid_plan(grid: Grid, searches: Sequence[LayerSearch], density: float) -> GridPlan:
    heads: list[list[Option]] = []
    costs, errors, groups = [], [], []
    for search in searches:
        weights = search.weights()
        for head in range(search.heads):
            options = search.options(head)
            heads.append(options)
            costs.append([cost for _, cost, _ in options])
            errors.append([error * weights[head] for _, _, error in options])
            known = list(search.taken)
            groups.append([known.index(shape) for shape, _, _ in options])
    chosen = []
    for options, choice in zip(heads, allocate(costs, errors, density, groups), strict=True):
        shape, low, _ = options[choice.index]
        chosen.append((shape, low + choice.share * (options[choice.toward][1] - low)))
    plans = iter(chosen)
    layers = [[next(plans) for _ in range(search.heads)] for search in searches]
    return GridPlan(
        grid,
        tuple(tuple(shape for shape, _ in layer) for layer in layers),
        tuple(tuple(kept for _, kept in layer) for layer in layers),
    )
