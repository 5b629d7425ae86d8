"""The report: what every compiled graph held, what was rewritten, what stayed dense and why."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

_KEPT_GRAPHS = 1_000


@dataclass
class SiteRecord:
    """One attention call of a compiled graph. Lists grow as calls bring new layers and grids.

    layer: path in the compiled module; layers: the sidecar's layers it served, by fingerprint.
    grid: of the last new call; grids: all seen. density: share of tile pairs really kept, mean
    over heads. tile_shapes: the shapes in use, most heads first.
    """

    layer: str | None
    rewritten: bool
    reason: str | None = None
    explanation: str | None = None
    layout: str | None = None
    evidence: str | None = None
    grid: tuple[int, int, int] | None = None
    grids: list[tuple[int, int, int]] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    density: float | None = None
    tile_shapes: list[tuple[int, int, int]] = field(default_factory=list)
    executor: str | None = None
    score: str | None = None
    fingerprint: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `Report.to_dict` shows it."""
        return {
            "layer": self.layer,
            "verdict": "rewritten" if self.rewritten else "left",
            "reason": self.reason,
            "explanation": self.explanation,
            "layout": self.layout,
            "evidence": self.evidence,
            "grid": self.grid,
            "grids": list(self.grids),
            "layers": list(self.layers),
            "density": self.density,
            "tile_shapes": list(self.tile_shapes),
            "executor": self.executor,
            "score": self.score,
            "fingerprint": self.fingerprint,
        }


@dataclass
class GraphRecord:
    """One graph that reached the backend. unknown: operations the analysis could not follow."""

    compile_id: str
    sites: list[SiteRecord]


class Report:
    """Records of compiled graphs, newest last. Printing it shows one row per attention call."""

    def __init__(self, graphs: list[GraphRecord]) -> None:
        self.graphs = graphs

    @property
    def sites(self) -> list[SiteRecord]:
        """All attention calls of all graphs."""
        return [site for graph in self.graphs for site in graph.sites]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: {"graphs": [{"compile_id", "sites"}], "totals": {...}}."""
        left = Counter(site.reason for site in self.sites if not site.rewritten)
        return {
            "graphs": [
                {"compile_id": graph.compile_id, "sites": [site.to_dict() for site in graph.sites]}
                for graph in self.graphs
            ],
            "totals": {
                "sites": len(self.sites),
                "rewritten": sum(site.rewritten for site in self.sites),
                "left": dict(left),
            },
        }

    def table(self) -> Table:
        """The report as a rich table."""
        totals = self.to_dict()["totals"]
        table = Table(
            title=f"veda: {totals['rewritten']} of {totals['sites']} attention calls rewritten, "
            f"{len(self.graphs)} graphs",
        )
        for column in ("graph", "layer", "verdict", "grid", "layout", "tiles", "density",
                       "executor"):  # fmt: skip
            table.add_column(column, overflow="fold")
        for graph in self.graphs:
            if not graph.sites:
                table.add_row(graph.compile_id, "-", "no attention in this graph")
            for site in graph.sites:
                table.add_row(graph.compile_id, *_cells(site))
        return table

    def __str__(self) -> str:
        console = Console(width=140)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def _cells(site: SiteRecord) -> tuple[str, ...]:
    name = site.layer or "(unnamed)"
    if len(site.layers) > 1:
        name += f" ({len(site.layers)} layers)"
    if not site.rewritten:
        return name, f"dense: {site.reason}\n{site.explanation}", _grid(site), site.layout or ""
    tiles = " ".join("x".join(map(str, shape)) for shape in site.tile_shapes[:4])
    tiles += f" +{len(site.tile_shapes) - 4}" if len(site.tile_shapes) > 4 else ""
    density = "" if site.density is None else f"{site.density:.3f}"
    return (
        name,
        "sparse",
        _grid(site),
        site.layout or "",
        tiles,
        density,
        str(site.executor),
    )


def _grid(site: SiteRecord) -> str:
    seen = site.grids or ([site.grid] if site.grid else [])
    return " ".join("x".join(map(str, grid)) for grid in seen)


class ReportStore:
    """Where backend calls leave their records; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._graphs: OrderedDict[str, GraphRecord] = OrderedDict()

    def add(self, record: GraphRecord) -> None:
        """Add a graph, replacing an earlier record of the same compilation."""
        with self._lock:
            self._graphs.pop(record.compile_id, None)
            self._graphs[record.compile_id] = record
            while len(self._graphs) > _KEPT_GRAPHS:
                self._graphs.popitem(last=False)

    def report(self) -> Report:
        """A report of all records."""
        with self._lock:
            return Report(list(self._graphs.values()))

    def clear(self) -> None:
        """Forget all records."""
        with self._lock:
            self._graphs.clear()


STORE = ReportStore()
"""The records of this process, what `veda_compile.report()` shows."""


def report() -> Report:
    """What the veda backend did in this process: print it, or take `.to_dict()`.

    A model that does not appear never reached the backend: it was not compiled with
    backend="veda", or its attention ran outside the compiled graphs.
    """
    return STORE.report()


def reset_report() -> None:
    """Forget what was recorded so far; compiled models keep running."""
    STORE.clear()
