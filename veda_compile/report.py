"""The report: what every compiled graph held, what was rewritten, what stayed dense and why."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from torch import nn

from .causes import Missed, all_missed, in_words
from .errors import StrictError
from .missed import WATCH
from .passes.reasons import HARMLESS, Reason

_KEPT_GRAPHS = 1_000


@dataclass
class SiteRecord:
    """One attention call of a compiled graph. Lists grow as calls bring new layers and grids.

    layer: path in the compiled module; layers: the model's, where one graph serves several.
    remedy: what the user can change where it stays dense. grid: of the last new call; grids: all
    seen. density: share of tile pairs really kept, mean over heads. tile_shapes: the shapes in
    use, most heads first. calibration: how far option `sidecar="auto"` is; None without it.
    executor_reason: why calls do not run on the executor that was measured faster, where one was.
    predicted_gain: dense over sparse time of the call as the cost model expects it, None where it
    was not asked. measured: whether its costs were measured on such a device; else it is a guess.
    """

    layer: str | None
    rewritten: bool
    reason: str | None = None
    explanation: str | None = None
    remedy: str | None = None
    layout: str | None = None
    evidence: str | None = None
    grid: tuple[int, int, int] | None = None
    grids: list[tuple[int, int, int]] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    density: float | None = None
    tile_shapes: list[tuple[int, int, int]] = field(default_factory=list)
    executor: str | None = None
    executor_reason: str | None = None
    score: str | None = None
    fingerprint: str | None = None
    calibration: str | None = None
    predicted_gain: float | None = None
    measured: bool | None = None

    @property
    def name(self) -> str:
        """The layer, or the layers of the model it served."""
        return ", ".join(self.layers) if self.layers else self.layer or "an unnamed layer"

    @property
    def harmless(self) -> bool:
        """Whether nothing is lost here: sparse, nothing to gain, or the user's own choice."""
        return self.rewritten or (self.reason is not None and Reason[self.reason] in HARMLESS)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `Report.to_dict` shows it."""
        return {
            "layer": self.layer,
            "verdict": "rewritten" if self.rewritten else "left",
            "reason": self.reason,
            "explanation": self.explanation,
            "remedy": self.remedy,
            "layout": self.layout,
            "evidence": self.evidence,
            "grid": self.grid,
            "grids": list(self.grids),
            "layers": list(self.layers),
            "density": self.density,
            "tile_shapes": list(self.tile_shapes),
            "executor": self.executor,
            "executor_reason": self.executor_reason,
            "score": self.score,
            "fingerprint": self.fingerprint,
            "calibration": self.calibration,
            "predicted_gain": self.predicted_gain,
            "measured": self.measured,
        }


@dataclass
class GraphRecord:
    """One graph that reached the backend.

    unknown: operations the analysis could not follow. model: class of the model it belongs to,
    None if no model's call was in progress.
    """

    compile_id: str
    sites: list[SiteRecord]
    unknown: tuple[str, ...] = ()
    model: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `Report.to_dict` shows it."""
        return {
            "compile_id": self.compile_id,
            "model": self.model,
            "unknown": list(self.unknown),
            "sites": [site.to_dict() for site in self.sites],
        }


class Report:
    """Records of compiled graphs, newest last, and the attention that no graph showed.

    Print it, or show it in a notebook, for tables with equal layers in one row; `to_dict` has
    every attention call.
    """

    def __init__(self, graphs: list[GraphRecord], missed: list[Missed] | None = None) -> None:
        self.graphs = graphs
        self.missed = missed or []

    @property
    def sites(self) -> list[SiteRecord]:
        """All attention calls of all graphs."""
        return [site for graph in self.graphs for site in graph.sites]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: {"graphs": [...], "missed": [...], "totals": {...}}.

        A graph is {"compile_id", "model", "unknown", "sites"}; a missed layer
        {"model", "layer", "cause", "remedy"}; the totals {"sites", "rewritten", "left", "missed"}.
        """
        left = Counter(site.reason for site in self.sites if not site.rewritten)
        return {
            "graphs": [graph.to_dict() for graph in self.graphs],
            "missed": [missed.to_dict() for missed in self.missed],
            "totals": {
                "sites": len(self.sites),
                "rewritten": sum(site.rewritten for site in self.sites),
                "left": dict(left),
                "missed": len(self.missed),
            },
        }

    def require(self) -> None:
        """Raise StrictError, naming every layer, unless all video attention seen runs sparse.

        Also raises where attention never reached the backend, and where nothing was rewritten.
        Ask after the model was called once: before, none of its layers has been seen.
        """
        lines = [
            f"{site.name}: {site.explanation}" + (f"; {site.remedy}" if site.remedy else "")
            for site in self.sites
            if not site.harmless
        ]
        lines += in_words(self.missed)
        if not lines and not any(site.rewritten for site in self.sites):
            remedies = {f"{s.explanation}; {s.remedy}" for s in self.sites if s.remedy}
            lines = sorted(remedies) or ["no attention over a video reached the backend"]
        if lines:
            raise StrictError("not all attention is sparse:\n" + "\n".join(lines))

    def table(self) -> Table:
        """The graphs as a rich table: equal rows of numbered layers are one."""
        from .report_tables import graph_table

        return graph_table(self)

    def __str__(self) -> str:
        from .report_tables import as_text

        return as_text(self)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        from .report_tables import as_html

        return as_html(self)

    def __rich__(self) -> Any:
        from .report_tables import renderable

        return renderable(self)


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


def report(model: nn.Module | None = None) -> Report:
    """What the veda backend did in this process: print it, or take `.to_dict()`.

    Attention modules of a compiled model that no graph showed are listed as missed. Of a model none
    of whose graphs reached the backend nothing is known, unless it is given as `model`: then all of
    its attention modules are.
    """
    if model is not None:
        WATCH.model(getattr(model, "_orig_mod", model))
    return Report(STORE.report().graphs, all_missed())


def reset_report() -> None:
    """Forget what was recorded so far; compiled models keep running."""
    STORE.clear()
    WATCH.clear()
