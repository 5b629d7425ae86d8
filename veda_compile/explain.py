"""Explaining a model before it is run: its report, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from .earlier_graphs import analyse_after
from .errors import VedaError
from .explain_subject import ExplainError, Subject
from .graph_records import graph_record, note_use
from .handing_on import tagger
from .inner import Compiled
from .kernels.cost_model import Forecast
from .options import Options
from .passes.analyse import Finding
from .passes.layers import Layer
from .passes.layout import SiteLayout
from .passes.owned_graph import own_copy
from .passes.sizes import example
from .passes.subgraphs import output_value
from .passes.verdict import Dimensions, Forecasting, Policy
from .planner import Planner
from .report import STORE, Report, SiteRecord, report, reset_report
from .watching import watch_graph


@dataclass(frozen=True)
class Explanation:
    """A model's report. stopped: why its call could not be followed to the end, or None."""

    report: Report
    stopped: str | None


def explain(
    subject: Subject,
    options: Mapping[str, Any] | None = None,
    device: str = "cuda",
    dynamic_ops: bool = False,
) -> Explanation:
    """The report the model would get if it were compiled whole and called on `device`.

    options: the backend's. dynamic_ops: let Dynamo capture operations whose results have sizes that
    depend on values, as its settings capture_dynamic_output_shape_ops and capture_scalar_outputs
    do. Values that only a real call has, such as those of rotary tables that
    come as inputs, are no evidence where the subject has no weights. Clears the report of this
    process. Raises OptionsError, and ExplainError where the call fails before any graph.
    """
    chosen = Options.from_dict(options)
    planner = Planner(chosen)
    reset_report()
    torch._dynamo.reset()

    def look(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        found, _ = analyse_after(gm, own_copy(gm), example_inputs, lambda: _policy(planner, device))
        findings = [_on_device(finding, device) for finding in found]
        handing = tagger(gm, example_inputs)
        record = graph_record(gm, findings, planner)
        _, observe = watch_graph(gm, example_inputs, findings, record, False)
        for finding, site in zip(findings, record.sites, strict=True):
            _note_plan(finding, site, planner)
        STORE.add(record)

        def run(*args: Any) -> Any:
            if observe is not None:
                observe(args)
            return _blank_results(gm) if subject.fake is not None else gm.forward(*args)

        return run if handing is None else handing.wrap(run)

    compiled: Any = torch.compile(subject.model, backend=look, dynamic=False)
    stopped = None
    try:
        with subject.fake or nullcontext(), torch.no_grad(), _capture(dynamic_ops):
            if isinstance(subject.inputs, Mapping):
                compiled(**subject.inputs)
            else:
                compiled(*subject.inputs)
    except VedaError:
        raise
    except Exception as error:  # the model's own code may raise anything
        stopped = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if not STORE.report().graphs:
            raise ExplainError(
                f"calling {type(subject.model).__name__} failed: {stopped}. Give "
                "package.module:callable, which returns a model that can be called, and its inputs"
            ) from error
    return Explanation(report(subject.model), stopped)


def _capture(dynamic_ops: bool) -> AbstractContextManager[Any]:
    if not dynamic_ops:
        return nullcontext()
    patched: AbstractContextManager[Any] = torch._dynamo.config.patch(
        capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True
    )
    return patched


def _note_plan(finding: Finding, site: SiteRecord, planner: Planner) -> None:
    """Add the tile shapes and density the site would start with."""
    if not site.rewritten or finding.layout is None or finding.dims is None:
        return
    grids = tuple(run.grid for run in finding.layout.videos if run.grid is not None)
    card = planner.card_by_name(site.layer)
    name = None if card is None else card.name
    plan = planner.plan(name, finding.dims.heads, grids)
    note_use(site, name, grids, plan, planner.executor(finding, plan))


def _blank_results(gm: fx.GraphModule) -> list[Any]:
    """Results of the graph's shapes, without computing anything."""
    results: Any = output_value(gm.graph)
    values = [example(result) if isinstance(result, fx.Node) else result for result in results]
    return [
        torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        if isinstance(value, torch.Tensor)
        else value
        for value in values
    ]


def _policy(planner: Planner, device: str) -> Policy:
    """Verdicts as on `device`, wherever the tensors are."""
    policy = planner.policy()
    return replace(
        policy,
        forecast=None if policy.forecast is None else _forecasting(policy.forecast, device),
        min_tokens=lambda _: policy.min_tokens(device),
        verify=lambda _, dtype, head_dim, tokens: policy.verify(device, dtype, head_dim, tokens),
    )


def _forecasting(here: Forecasting, device: str) -> Forecasting:
    def there(layer: Layer, dims: Dimensions, layout: SiteLayout) -> Forecast | None:
        return here(layer, replace(dims, device=device), layout)

    return there


def _on_device(finding: Finding, device: str) -> Finding:
    dims = None if finding.dims is None else replace(finding.dims, device=device)
    return replace(finding, dims=dims)
