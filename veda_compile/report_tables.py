"""The report as tables: for terminals, files and notebooks."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .grouping import joint_name, joint_text, pattern

if TYPE_CHECKING:
    from .report import GraphRecord, Report, SiteRecord

_WIDTH = 120
_COLUMNS = (
    "graph", "layer", "verdict", "grid", "layout", "tiles", "density", "gain", "executor",
)  # fmt: skip
_GAINS = "gain: time of the dense attention call over that of the sparse one, as predicted."
_GUESSED = " With ~ it is a guess: nothing was measured on such a device."


def as_text(report: Report) -> str:
    """The report as plain text, without colours."""
    console = Console(width=_WIDTH, no_color=True, emoji=False)
    with console.capture() as capture:
        console.print(renderable(report))
    return capture.get()


def as_html(report: Report) -> str:
    """The report as HTML for a notebook."""
    console = Console(width=_WIDTH, record=True, file=io.StringIO(), emoji=False)
    console.print(renderable(report))
    style = "white-space:pre;overflow-x:auto;line-height:normal;font-family:monospace"
    return console.export_html(
        inline_styles=True, code_format=f'<pre style="{style}">{{code}}</pre>'
    )


def renderable(report: Report) -> RenderableType:
    """The table of graphs, then what is to be done and what was never seen, as far as there is."""
    parts: list[RenderableType] = [graph_table(report)]
    if any(site.explanation for site in report.sites):
        parts.append(_explanations(report))
    gains = [site.measured for site in report.sites if site.predicted_gain is not None]
    if gains:
        parts.append(_GAINS + ("" if all(gains) else _GUESSED))
    slower = dict.fromkeys(
        (site.executor, site.executor_reason) for site in report.sites if site.executor_reason
    )
    if slower:
        told = [(f"{name}: {reason}", None) for name, reason in slower]
        parts.append(_list("Why not on the executor that was measured faster:", told))
    unknown = sorted({name for graph in report.graphs for name in graph.unknown})
    if unknown and not all(site.harmless for site in report.sites):
        parts.append(Text(f"Operations the analysis could not follow: {', '.join(unknown)}"))
    if report.missed:
        parts.append(_missed(report))
    if not report.graphs:
        parts.append(
            "No graph reached the backend: nothing was compiled with backend='veda' and called "
            "since, or its calls ran eager. veda_compile.report(model) lists a model's attention."
        )
    return Group(*parts)


def graph_table(report: Report) -> Table:
    """One row per attention call; layers that differ in numbers alone share a row."""
    models = {graph.model for graph in report.graphs if graph.model is not None}
    table = Table(title=_title(report, models), box=box.SQUARE)
    for column in _COLUMNS:
        table.add_column(column, overflow="fold")
    empty = [graph for graph in report.graphs if not graph.sites]
    for graph in report.graphs:
        name = graph.compile_id
        if len(models) > 1 and graph.model is not None:
            name += f" {graph.model}"
        for cells in _rows(graph):
            table.add_row(*(escape(cell) for cell in (name, *cells)))
            name = ""
        if graph.sites:
            table.add_section()
    if empty:
        table.add_row(_named(empty), "-", "no attention in these graphs")
    return table


def _title(report: Report, models: set[str]) -> str:
    totals = report.to_dict()["totals"]
    title = f"veda: {totals['rewritten']} of {totals['sites']} attention calls rewritten, "
    title += "1 graph" if len(report.graphs) == 1 else f"{len(report.graphs)} graphs"
    title += f", {totals['missed']} missed" if totals["missed"] else ""
    return f"{title} ({models.pop()})" if len(models) == 1 else title


def _named(graphs: list[GraphRecord]) -> str:
    names = [graph.compile_id for graph in graphs]
    return " ".join(names[:6]) + (f" +{len(names) - 6}" if len(names) > 6 else "")


def _rows(graph: GraphRecord) -> list[tuple[str, ...]]:
    groups: dict[tuple[str, ...], list[str]] = {}
    for site in graph.sites:
        name = site.layer if site.layer is not None else "(unnamed)"
        if len(site.layers) > 1 or (site.layer is None and site.layers):
            kinds: dict[str, list[str]] = {}
            for layer in site.layers:
                kinds.setdefault(pattern(layer), []).append(layer)
            name = ", ".join(joint_name(layers) for layers in kinds.values())
        groups.setdefault((pattern(name), *_cells(site)), []).append(name)
    return [(joint_name(names), *cells) for (_, *cells), names in groups.items()]


def _cells(site: SiteRecord) -> tuple[str, ...]:
    if not site.rewritten:
        return f"dense: {site.reason}", _grid(site), site.layout or "", "", "", _gain(site), ""
    tiles = " ".join("x".join(map(str, shape)) for shape in site.tile_shapes[:4])
    tiles += f" +{len(site.tile_shapes) - 4}" if len(site.tile_shapes) > 4 else ""
    density = "" if site.density is None else f"{site.density:.3f}"
    return (
        site.calibration or "sparse",
        _grid(site),
        site.layout or "",
        tiles,
        density,
        _gain(site),
        str(site.executor),
    )


def _gain(site: SiteRecord) -> str:
    """The predicted gain; with ~ where it is a guess."""
    if site.predicted_gain is None:
        return ""
    return f"{'' if site.measured else '~'}{site.predicted_gain:.1f}x"


def _grid(site: SiteRecord) -> str:
    seen = site.grids or ([site.grid] if site.grid else [])
    return " ".join("x".join(map(str, grid)) for grid in seen)


def _explanations(report: Report) -> RenderableType:
    told = dict.fromkeys(
        (site.reason or "sparse", site.explanation, site.remedy)
        for site in report.sites
        if site.explanation is not None
    )
    return _list(
        "Why it stays dense, and what to change:",
        [(f"{reason}: {why}", remedy) for reason, why, remedy in told],
    )


def _missed(report: Report) -> RenderableType:
    groups: dict[tuple[str, str, str, str], list[tuple[str, str]]] = {}
    for missed in report.missed:
        model, layer = missed.model or "all models", missed.layer or "all layers"
        alike = (model, pattern(layer), pattern(missed.cause), missed.remedy)
        groups.setdefault(alike, []).append((layer, missed.cause))
    items = []
    for (model, _, _, remedy), members in groups.items():
        layers = joint_name([layer for layer, _ in members])
        cause = joint_text([cause for _, cause in members])
        items.append((f"{model}, {layers}: {cause}", remedy))
    return _list("Missed, attention that never reached the backend:", items)


def _list(heading: str, items: Sequence[tuple[str, str | None]]) -> RenderableType:
    """Sentences with a remedy below each, wrapped between words so that settings can be copied."""
    lines: list[RenderableType] = [Text(heading, style="bold")]
    for text, remedy in items:
        lines.append(Padding(Text(text), (0, 0, 0, 2)))
        if remedy is not None:
            lines.append(Padding(Text(f"-> {remedy}", style="green"), (0, 0, 0, 4)))
    return Group(*lines)
