"""Graphs under option `sidecar="auto"`: compiled dense and sparse at once, and when which one runs.

Both are compiled while Dynamo holds the graph: the plans are inputs of the sparse one, so it needs
none of them to be known, later nothing is compiled, and all guards are Dynamo's own. The dense one
is left out where the model's plans are known already.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from .backend import Members, accepted_sites, compile_rewritten
from .binding import Bound, LayerMark
from .calibration import CALIBRATIONS, Calibration
from .earlier_graphs import EarlierGraphs, analyse_after
from .errors import LayoutError, VedaError
from .graph_records import note_use
from .grids import GridTeller
from .inner import Compiled, compile_inner, fake_input
from .kernels.observe_op import idle_ticket, receiving
from .kernels.plan import Plan
from .layer_names import SiteName, graph_parameters
from .model_search import model_of_this_call
from .observed_graph import ObservedGraph
from .options import Options
from .passes.analyse import Finding
from .passes.observe import observe_sites
from .passes.owned_graph import own_copy
from .passes.rewrite import PlanInputs
from .planner import Planner
from .report import GraphRecord
from .searched_modes import MOST_COLUMNS
from .told import Grids

logger = logging.getLogger(__name__)

_KEPT_CALLS = 4_096


def compile_auto(
    gm: fx.GraphModule,
    model: nn.Module,
    owned: fx.GraphModule,
    example_inputs: Sequence[Any],
    findings: Sequence[Finding],
    record: GraphRecord,
    planner: Planner,
    options: Options,
    earlier: EarlierGraphs | None,
) -> Compiled:
    """Compile a graph with sites to rewrite.

    gm: Dynamo's graph. model: whose it is. owned: the copy that `findings` are of. record: of this
    graph. Calls raise what those of backend "veda" do.
    """
    accepted = accepted_sites(findings, record)
    calibration = CALIBRATIONS.of(model, options)
    parameters = graph_parameters(owned)
    owner = Owner(calibration, parameters, options)
    dense = None
    if calibration.calibrating:
        dense = DenseRun(gm, example_inputs, record, planner, options, calibration)

    def bound(members: Members, teller: GridTeller, inputs: PlanInputs) -> Bound:
        return auto_bound(members, teller, inputs, owner, parameters)

    sparse = compile_rewritten(owned, example_inputs, accepted, planner, options, earlier, bound)
    if dense is None:
        return sparse

    def run(*args: Any) -> Any:
        of = owner(args)
        if of.calibrating:
            found = dense(of, args)
            if found is not None:
                return found
        return sparse(*args)

    return run


class Owner:
    """Tells whose attention a run of a graph computes: blocks of several models may share it."""

    def __init__(
        self, first: Calibration, parameters: Sequence[tuple[str, int]], options: Options
    ) -> None:
        """first: of the model the graph is compiled for. parameters: see `graph_parameters`."""
        self._first = first
        self._place = parameters[0][1] if parameters else None
        self._options = options
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], Calibration]] = {}

    def __call__(self, args: Sequence[Any]) -> Calibration:
        """args: of the run."""
        if self._place is None:
            return self._find()
        tensor = args[self._place]
        known = self._known.get(id(tensor))
        if known is None or known[0]() is not tensor:
            if len(self._known) >= _KEPT_CALLS:
                self._known.clear()
            known = self._known[id(tensor)] = (weakref.ref(tensor), self._find())
        return known[1]

    def _find(self) -> Calibration:
        model = model_of_this_call()
        return self._first if model is None else CALIBRATIONS.of(model, self._options)


@dataclass(frozen=True)
class Asked:
    """What a plan is asked for. planner: changes when a calibration is done."""

    calibration: Calibration
    planner: Planner
    layer: str | None


def auto_bound(
    members: Members,
    teller: GridTeller,
    inputs: PlanInputs,
    owner: Owner,
    parameters: Sequence[tuple[str, int]],
) -> Bound:
    """What fills the inputs of one attention call, by the name its layer has in its model."""
    ((finding, record),) = members
    dims, layer = finding.dims, finding.layer
    assert dims is not None
    content = LayerMark([place for _, place in layer.parameters])
    names: weakref.WeakKeyDictionary[Calibration, SiteName] = weakref.WeakKeyDictionary()

    def mark(args: Sequence[Any]) -> Asked:
        of = owner(args)
        if of not in names:
            names[of] = SiteName(of.names, layer.name, parameters)
        try:
            name = names[of](args, content(args))
        except VedaError:  # it cannot be told from others: it gets what all of them can have
            name = None
        return Asked(of, of.planner, name)

    def card_name(asked: Asked) -> str | None:
        sidecar = asked.planner.sidecar
        for card in () if sidecar is None else sidecar.model.layers:
            if (card.name, card.heads, card.head_dim) == (asked.layer, dims.heads, dims.head_dim):
                return card.name
        return None

    def plan(asked: Asked, grids: Grids) -> Plan:
        name = card_name(asked)
        if name is None and asked.planner.sidecar is not None:
            # once for each layer and grid: plans are kept by the binder
            logger.warning(
                "veda: layer %s of %s has no plan in its calibration and keeps one tile shape for "
                "all heads; veda cache --clear has it calibrated anew",
                asked.layer or layer.name, asked.calibration.seen.model_class,
            )  # fmt: skip
        chosen = asked.calibration.uniform if name is None else asked.planner
        return chosen.plan(name, dims.heads, grids)

    def used(asked: Asked, grids: Grids, chosen: Plan) -> None:
        asked.calibration.note(record)
        if not asked.calibration.calibrating:
            note_use(record, asked.layer, grids, chosen, asked.planner.executor(finding, chosen))

    order = None if inputs.order is None else inputs.order.order
    device = torch.device(dims.device)
    columns = MOST_COLUMNS if inputs.columns else None
    return Bound(teller, inputs.grids > 0, mark, plan, used, device, order, columns)


class DenseRun:
    """A graph compiled dense, whose attention calls a calibration may measure."""

    def __init__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        record: GraphRecord,
        planner: Planner,
        options: Options,
        calibration: Calibration,
    ) -> None:
        """See `compile_auto`. Compiles."""
        owned = own_copy(gm)
        findings, earlier = analyse_after(gm, owned, example_inputs, planner.policy)
        accepted = accepted_sites(findings, record)
        graph = ObservedGraph(owned, example_inputs, accepted, calibration.names, earlier)
        dims = accepted[0][0].dims
        assert dims is not None
        self._device = torch.device(dims.device)
        self._idle = idle_ticket()
        stand_in = fake_input(self._idle)
        watching = observe_sites(owned, [finding for finding, _ in accepted], stand_in)
        self._compiled = compile_inner(
            watching, [*example_inputs, stand_in], options.inner, options.config_patches()
        )
        self._graph = graph
        self._graphs: weakref.WeakKeyDictionary[Calibration, ObservedGraph] = (
            weakref.WeakKeyDictionary({calibration: graph})
        )
        self._warm = False

    def __call__(self, of: Calibration, args: Sequence[Any]) -> Any:
        """The graph's results; None where the calibration is done, and nothing was run.

        Raises LayoutError as sparse runs do.
        """
        if of not in self._graphs:
            self._graphs[of] = self._graph.of(of.names)
        try:
            now = self._graphs[of].run(args, of.seen, of.observe)
        except LayoutError:
            raise
        except VedaError as error:
            of.give_up(str(error))
            return None
        of.begin([card.name for _, card, _ in now.sites])
        if not of.calibrating:
            return None
        warm, self._warm = self._warm, True
        with of.account.run(self._device, timed=warm), receiving(now.receive) as ticket:
            return self._compiled(*args, ticket)[:-1]
