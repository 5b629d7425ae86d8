"""Records: what the report holds of a graph, made from what the passes found."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from torch import fx

from .errors import StrictError
from .kernels.budget import kept_density
from .kernels.executors import Choice
from .kernels.layout import Layout, Video
from .kernels.plan import Plan
from .kernels.static_modes import mode_density
from .passes.analyse import Finding
from .passes.reasons import Reason
from .planner import Planner
from .report import GraphRecord, SiteRecord
from .told import Grids

_unnamed = count()


def graph_record(gm: fx.GraphModule, findings: Sequence[Finding], planner: Planner) -> GraphRecord:
    """What the report is to hold of a graph with these findings; not yet in the report."""
    return GraphRecord(
        _compile_id(gm),
        [_site_record(finding, planner) for finding in findings],
        findings[0].unknown if findings else (),
    )


def _site_record(finding: Finding, planner: Planner) -> SiteRecord:
    refusal, layout = finding.refusal, finding.layout
    video = max(layout.videos, key=lambda run: run.length) if layout is not None else None
    record = SiteRecord(
        layer=finding.layer.name,
        rewritten=refusal is None,
        reason=None if refusal is None else refusal.reason.name,
        explanation=None if refusal is None else str(refusal),
        remedy=None if refusal is None else refusal.remedy,
        grid=None if video is None else video.grid,
    )
    if finding.forecast is not None:
        record.predicted_gain = round(finding.forecast.gain, 2)
        record.measured = finding.forecast.measured
    if layout is not None:
        runs = [f"{'video' if run.grid else 'extra'} {run.length}" for run in layout.runs]
        before, after = ([f"context {n}"] if n else [] for n in (layout.before, layout.after))
        record.layout = " + ".join([*before, *runs, *after])
        record.evidence = layout.evidence.value
    if refusal is None and finding.dims is not None:
        _note_executor(record, planner.executor(finding))
        record.score = planner.score
    return record


def note_use(
    record: SiteRecord, layer: str | None, grids: Grids, plan: Plan, executor: Choice
) -> None:
    """Keep the report true to what runs: grids, layers, shapes and densities met so far."""
    _note_executor(record, executor)
    for grid in grids:
        if grid not in record.grids:
            record.grids.append(grid)
    record.grid = max(grids, key=lambda g: g[0] * g[1] * g[2])
    if layer is not None and layer not in record.layers:
        record.layers.append(layer)
    groups = plan.groups()
    record.tile_shapes = sorted(groups, key=lambda shape: -len(groups[shape]))
    layout = Layout(tuple(Video(*grid) for grid in grids))
    kept = []
    for head, shape in enumerate(plan.tile_shapes):
        mode = plan.mode(head)
        if mode is None:
            kept.append(kept_density(layout, shape, plan.density[head]))
        else:
            kept.append(mode_density(layout, shape, mode))
    record.density = sum(kept) / len(kept)


def _note_executor(record: SiteRecord, executor: Choice) -> None:
    record.executor, record.executor_reason = executor.name, executor.reason or None


def require_sparse(record: GraphRecord) -> None:
    """Raise StrictError where `strict` does not accept a verdict."""
    bad = [site for site in record.sites if not site.harmless]
    if bad:
        lines = "; ".join(
            f"{site.name}: {site.explanation}" + (f" ({site.remedy})" if site.remedy else "")
            for site in bad[:8]
        )
        raise StrictError(f"strict: {len(bad)} attention calls would stay dense: {lines}")
    slower = (Reason.TOO_FEW_TOKENS.name, Reason.DENSITY_TOO_HIGH.name)
    few = [site for site in record.sites if site.reason in slower]
    if few and not any(site.rewritten for site in record.sites):
        raise StrictError(
            f"strict: nothing was rewritten in graph {record.compile_id}: {few[0].name}: "
            f"{few[0].explanation}; set min_tokens=0 to go sparse all the same"
        )


def _compile_id(gm: fx.GraphModule) -> str:
    compile_id = gm.meta.get("dynamo_compile_id")
    return str(compile_id) if compile_id is not None else f"unnamed-{next(_unnamed)}"
