"""The log: one INFO line per compiled graph, and one WARNING per model and reason to act on."""

from __future__ import annotations

import logging
from collections import Counter

from .missed import WatchedModel
from .report import GraphRecord, SiteRecord

logger = logging.getLogger("veda_compile")


def log_graph(record: GraphRecord, watched: WatchedModel | None) -> None:
    """Log what became of a graph; call it when its plans are known."""
    left = Counter(str(site.reason) for site in record.sites if not site.rewritten)
    reasons = ", ".join(f"{name} x{n}" if n > 1 else name for name, n in sorted(left.items()))
    name = f"{record.compile_id} of {record.model}" if record.model else record.compile_id
    if not record.sites:
        logger.info("veda: graph %s: no attention calls", name)
        return
    logger.info(
        "veda: graph %s: %d of %d attention calls %s%s%s",
        name,
        len(record.sites) - sum(left.values()),
        len(record.sites),
        _state(record),
        _grids(record),
        f"; {sum(left.values())} left dense: {reasons}" if left else "",
    )
    said: set[str] = set() if watched is None else watched.said
    for site in record.sites:
        if site.harmless or site.remedy is None or site.reason in said:
            continue
        said.add(str(site.reason))
        alike = sum(other.reason == site.reason for other in record.sites)
        logger.warning(
            "veda: %d attention calls of %s stay dense, the first is %s: %s. Remedy: %s",
            alike, record.model or f"graph {record.compile_id}", site.name, site.explanation,
            site.remedy,
        )  # fmt: skip


def _state(record: GraphRecord) -> str:
    """What those that are not left dense are by now."""
    states = (site.calibration for site in record.sites if site.rewritten)
    return next((state for state in states if state is not None), "sparse")


def _grids(record: GraphRecord) -> str:
    """The grids and densities in use, such as " (grid 21x45x80, density 0.198)"."""
    sparse = [site for site in record.sites if site.rewritten]
    seen = dict.fromkeys(_place(site) for site in sparse)
    return f" ({'; '.join(seen)})" if seen else ""


def _place(site: SiteRecord) -> str:
    grid = "grid told per call" if site.grid is None else "grid " + "x".join(map(str, site.grid))
    return grid if site.density is None else f"{grid}, density {site.density:.3f}"
