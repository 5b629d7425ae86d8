"""The backend: what `torch.compile(model, backend="veda")` calls for every graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from .binding import Binder, Bound, LayerMark
from .calibrated_model import model_to_calibrate
from .calibration import State
from .dense_steps import REMEDY, StepInput, add_dense_steps
from .earlier_graphs import EarlierGraphs, analyse_after
from .graph_records import graph_record, note_use, require_sparse
from .grid_choice import grid_teller
from .grids import GridTeller
from .handing_on import tagger
from .inner import Compiled, compile_inner, fake_input
from .kernels.plan import Plan
from .known_inputs import KnownInput
from .options import AUTO, Options
from .passes.analyse import Finding
from .passes.layers import matches
from .passes.owned_graph import own_copy
from .passes.rewrite import PlanInputs, Rewriter
from .planner import Planner
from .report import STORE, GraphRecord, SiteRecord
from .report_log import log_graph
from .told import Grids
from .watching import watch_graph

logger = logging.getLogger(__name__)

Members = Sequence[tuple[Finding, SiteRecord]]
MakeBound = Callable[[Members, GridTeller, PlanInputs], Bound]
"""Makes what fills the inputs that some attention calls share."""


def veda(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compile a Dynamo graph with its video self-attention replaced by sparse attention.

    Called by torch.compile(model, backend="veda", options=...); see `Options`. Graphs without a
    site to rewrite are compiled as they are. Raises OptionsError, SidecarError or, with
    options={"strict": True}, StrictError.
    """
    chosen = Options.from_dict(options, mode)
    model = model_to_calibrate(gm, chosen)
    uncalibrated = chosen.sidecar == AUTO and model is None
    if uncalibrated:
        chosen = replace(chosen, sidecar=None)
    planner = Planner(chosen)
    owned = own_copy(gm)
    findings, earlier = analyse_after(gm, owned, example_inputs, planner.policy)
    handing = tagger(gm, example_inputs)
    record = graph_record(gm, findings, planner)
    if uncalibrated and chosen.density != 1.0:  # which needs no calibration
        for site in record.sites:
            site.calibration = State.GIVEN_UP.value if site.rewritten else None
    watched, observe = watch_graph(gm, example_inputs, findings, record, chosen.strict)
    STORE.add(record)
    _warn_unmatched(findings, chosen, record.compile_id)
    if chosen.strict:
        require_sparse(record)
    if model is not None and any(site.rewritten for site in record.sites):
        from .auto_backend import compile_auto  # which builds on this module

        compiled = compile_auto(
            gm, model, owned, example_inputs, findings, record, planner, chosen, earlier
        )
    else:
        compiled = _compile(owned, example_inputs, findings, record, planner, chosen, earlier)
    if handing is not None:
        compiled = handing.wrap(compiled)
    log_graph(record, watched)
    if observe is None:
        return compiled

    def run(*args: Any) -> Any:
        observe(args)
        return compiled(*args)

    return run


def _compile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    findings: Sequence[Finding],
    record: GraphRecord,
    planner: Planner,
    options: Options,
    earlier: EarlierGraphs | None,
) -> Compiled:
    accepted = accepted_sites(findings, record)
    if not accepted:
        return compile_inner(gm, example_inputs, options.inner, options.config_patches())
    return compile_rewritten(gm, example_inputs, accepted, planner, options, earlier)


def accepted_sites(
    findings: Sequence[Finding], record: GraphRecord
) -> list[tuple[Finding, SiteRecord]]:
    """The findings that are to be rewritten, with their records."""
    return [
        (finding, site)
        for finding, site in zip(findings, record.sites, strict=True)
        if finding.refusal is None
    ]


def compile_rewritten(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    accepted: Sequence[tuple[Finding, SiteRecord]],
    planner: Planner,
    options: Options,
    earlier: EarlierGraphs | None,
    bound: MakeBound | None = None,
) -> Compiled:
    """Compile `gm`, an owned copy, with its accepted sites sparse.

    bound: fills the inputs of one site; None is as `planner` says.
    """
    rewriter = Rewriter(gm, planner.score, options.executor)
    groups: dict[PlanInputs, list[tuple[Finding, SiteRecord]]] = {}
    tellers: dict[object, GridTeller] = {}
    told: dict[PlanInputs, GridTeller] = {}
    for place, (finding, record) in enumerate(accepted):
        teller = grid_teller(gm, finding, tellers, earlier)
        assert finding.layout is not None and finding.dims is not None
        # without a sidecar all layers of one size and grid are alike and share their inputs
        alike = planner.sidecar is None and bound is None
        key = f"{finding.dims.heads} {id(teller)}" if alike else f"site {place}"
        told_per_call = finding.sizes is None or finding.sizes.grids is None
        per_call = len(finding.layout.videos) if told_per_call else 0
        order = finding.layout if finding.layout.order is not None else None
        inputs = PlanInputs(
            key,
            planner.score == "projection",
            per_call,
            order,
            planner.factor_rank(finding.dims.head_dim) > 0,
            planner.columns is not None,
            bool(planner.columns),
        )
        groups.setdefault(inputs, []).append((finding, record))
        told[inputs] = teller
    steps = _dense_steps(gm, rewriter, accepted, example_inputs, options)
    for inputs, members in groups.items():
        for finding, _ in members:
            rewriter.rewrite(finding, inputs)
    binder = Binder(
        [
            _bound(groups[extra.inputs], told[extra.inputs], extra.inputs, planner)
            if bound is None
            else bound(groups[extra.inputs], told[extra.inputs], extra.inputs)
            for extra in rewriter.extra
        ],
        [*input_checks(gm, accepted, example_inputs), *([] if earlier is None else [earlier])],
    )
    rewritten = rewriter.finish()

    def added(args: Sequence[Any]) -> list[torch.Tensor]:
        return [*(step.value() for step in steps), *binder(args)]

    nodes = [node for group in rewriter.extra for node in group.nodes]
    stand_ins = []
    for extra, value in zip(
        [*(step.node for step in steps), *nodes], added(example_inputs), strict=True
    ):
        stand_ins.append(fake_input(value))
        extra.meta["example_value"] = stand_ins[-1]
    compiled = compile_inner(
        rewritten, [*example_inputs, *stand_ins], options.inner, options.config_patches()
    )

    def run(*args: Any) -> Any:
        return compiled(*args, *added(args))

    return run


def _dense_steps(
    gm: fx.GraphModule,
    rewriter: Rewriter,
    accepted: Sequence[tuple[Finding, SiteRecord]],
    inputs: Sequence[Any],
    options: Options,
) -> list[StepInput]:
    """The input that option `dense_timesteps` adds; none, with a warning, where it cannot work."""
    if not options.dense_timesteps:
        return []
    findings = [finding for finding, _ in accepted]
    step = add_dense_steps(gm, rewriter, findings, inputs, options.dense_timesteps)
    if not isinstance(step, str):
        return [step]
    for _, record in accepted:
        record.explanation = f"option dense_timesteps has no effect here: {step}; {REMEDY}"
    logger.warning(
        "option dense_timesteps has no effect on %d attention calls: %s; %s",
        len(accepted), step, REMEDY,
    )  # fmt: skip
    return []


def input_checks(
    gm: fx.GraphModule, accepted: Sequence[tuple[Finding, SiteRecord]], inputs: Sequence[Any]
) -> list[KnownInput]:
    """Checks of the inputs on whose values the layouts rest."""
    layouts = [finding.layout for finding, _ in accepted if finding.layout is not None]
    reads = {node for layout in layouts for node in layout.reads}
    return [KnownInput(gm, node, inputs) for node in reads]


def _bound(
    members: Sequence[tuple[Finding, SiteRecord]],
    teller: GridTeller,
    inputs: PlanInputs,
    planner: Planner,
) -> Bound:
    finding = members[0][0]
    dims, layer = finding.dims, finding.layer
    assert dims is not None
    named = planner.card_by_name(layer.name)
    by_mark = (
        planner.sidecar is not None
        and bool(layer.parameters)
        and (
            planner.sidecar.fingerprints_unique()
            if named is None
            else named.fingerprint is not None
        )
    )

    def plan(mark: str | None, grids: Grids) -> Plan:
        if not by_mark:
            return planner.plan(named.name if named else None, dims.heads, grids)
        if named is not None and mark == named.fingerprint:
            return planner.plan(named.name, dims.heads, grids)
        return planner.plan(planner.card_by_fingerprint(mark, layer.name).name, dims.heads, grids)

    def used(mark: str | None, grids: Grids, chosen: Plan) -> None:
        card = planner.card_by_fingerprint(mark, layer.name) if by_mark else named
        for member, record in members:
            runs_on = planner.executor(member, chosen)
            note_use(record, card.name if card else None, grids, chosen, runs_on)

    mark = LayerMark([place for _, place in layer.parameters]) if by_mark else None
    device = torch.device(dims.device)
    order = None if inputs.order is None else inputs.order.order
    return Bound(teller, inputs.grids > 0, mark, plan, used, device, order, planner.columns)


def _warn_unmatched(findings: Sequence[Finding], options: Options, compile_id: str) -> None:
    """Say which `dense_layers` name nothing here; another graph of the model may have them."""
    layers = [finding.layer for finding in findings if finding.layout is not None]
    if not layers:
        return
    for entry in options.dense_layers:
        if not any(matches(layer.name, place, (entry,)) for place, layer in enumerate(layers)):
            logger.warning(
                "option dense_layers: %r is none of the video attention layers of graph %s: %s",
                entry, compile_id, ", ".join(str(layer.name) for layer in layers),
            )  # fmt: skip
