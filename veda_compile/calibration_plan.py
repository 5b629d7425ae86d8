"""From a calibration's measurements to a sidecar."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .allocation import allocate
from .distilled_sidecar import LEAST_DENSITY
from .layer_search import LayerSearch, Option
from .sidecar import Sidecar
from .sidecar_schema import Grid, GridPlan, LayerCard, ModelCard


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
            costs.append([option.density for option in options])
            errors.append([option.error * weights[head] for option in options])
            known = list(search.taken)
            groups.append(
                [
                    # between static modes there is nothing
                    known.index(option.shape) if option.mode == "scored" else -1 - place
                    for place, option in enumerate(options)
                ]
            )
    choices = iter(zip(heads, allocate(costs, errors, density, groups), strict=True))
    shapes, kept, modes = [], [], []
    for search in searches:
        taken, budgets = [], []
        for _ in range(search.heads):
            options, choice = next(choices)
            low, high = options[choice.index], options[choice.toward]
            taken.append(low)
            budgets.append(low.density + choice.share * (high.density - low.density))
        shapes.append(tuple(option.shape for option in taken))
        kept.append(tuple(max(value, LEAST_DENSITY) for value in budgets))
        modes.append(tuple(search.static_mode(head, option) for head, option in enumerate(taken)))
    return GridPlan(grid, tuple(shapes), tuple(kept), tuple(modes))
