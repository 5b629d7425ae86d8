"""Attaching too late: what was compiled dense before stays so, for nothing compiles it again."""

from __future__ import annotations

import logging

from torch import nn

from .missed import WATCH
from .passes.reasons import Reason
from .report import STORE, SiteRecord

logger = logging.getLogger(__name__)

_HELPED = frozenset({Reason.NO_GRID.name, Reason.UNPROVEN_SIZES.name})
"""Reasons that `attach` takes away."""


def warn_if_late(model: nn.Module) -> None:
    """Log a warning if attention of `model` was compiled dense for lack of what `attach` tells."""
    sites = _dense_for_lack_of_a_grid(model)
    if sites:
        logger.warning(
            "veda_compile.attach: %d attention calls of %s were compiled before, without a grid, "
            "and stay dense: %s. Remedy: call torch.compiler.reset() now, if you have not since, "
            "so that the model's next call compiles them again",
            len(sites), type(model).__name__, ", ".join(site.name for site in sites[:4]),
        )  # fmt: skip


def _dense_for_lack_of_a_grid(model: nn.Module) -> list[SiteRecord]:
    watched = next((held for held in WATCH.models() if held.reference() is model), None)
    if watched is None:
        return []
    frames = {frame for held in watched.reached.values() for frame in held}
    return [
        site
        for graph in STORE.report().graphs
        if graph.model == watched.name and graph.compile_id.partition("/")[0] in frames
        for site in graph.sites
        if site.reason in _HELPED
    ]
