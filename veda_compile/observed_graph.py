"""Observed graphs: a graph compiled dense, and whom its attention calls are handed to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from .backend import input_checks
from .binding import Check, LayerMark
from .earlier_graphs import EarlierGraphs
from .grid_choice import grid_teller
from .grids import GridTeller
from .kernels.layout import Layout
from .kernels.op import completed_layout
from .layer_names import ModelNames, SiteName, graph_parameters
from .observed_call import ObservedCall, ObservedModel, Observer
from .passes.analyse import Finding
from .passes.rewrite import input_positions
from .passes.timestep import find_timestep
from .report import SiteRecord
from .sidecar_schema import LayerCard
from .told import Grids, running_call

DispatchKeys = tuple[torch._C.DispatchKeySet, torch._C.DispatchKeySet]
"""Those included and those excluded, as `torch._C._ForceDispatchKeyGuard` takes them."""


@dataclass(frozen=True, eq=False)
class _Site:
    """One observed attention call of a graph.

    order: (N,) the tokens in raster order, on the attention's device; None where they stand so.
    """

    heads: int
    head_dim: int
    scale: float
    grids: GridTeller
    per_call: bool
    order: Tensor | None
    mark: LayerMark
    layer: str | None
    name: SiteName


class ObservedGraph:
    """The observed attention calls of one compiled graph."""

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        accepted: Sequence[tuple[Finding, SiteRecord]],
        names: ModelNames,
        earlier: EarlierGraphs | None,
    ) -> None:
        """gm: the owned copy the findings are of, not yet changed. inputs: its example inputs."""
        self._parameters = graph_parameters(gm)
        tellers: dict[object, GridTeller] = {}
        self._sites = [
            _site(finding, grid_teller(gm, finding, tellers, earlier), names, self._parameters)
            for finding, _ in accepted
        ]
        self._checks: list[Check] = [
            *input_checks(gm, accepted, inputs),
            *([] if earlier is None else [earlier]),
        ]
        dims = accepted[0][0].dims
        assert dims is not None
        timestep = find_timestep(gm, inputs, dims.batch)
        self._timestep = (
            None if isinstance(timestep, str) else input_positions(gm, [timestep.node])[0]
        )

    def of(self, names: ModelNames) -> ObservedGraph:
        """The same graph serving another model."""
        other = copy(self)
        other._sites = [
            replace(site, name=SiteName(names, site.layer, self._parameters))
            for site in self._sites
        ]
        return other

    def run(self, args: Sequence[Any], seen: ObservedModel, observer: Observer) -> ObservedRun:
        """What is known of a run with these arguments. Raises LayoutError where its grids cannot be
        told, and VedaError where its layers cannot."""
        for check in self._checks:
            check(args)
        told: dict[GridTeller, Grids] = {}
        sites = []
        for site in self._sites:
            if site.grids not in told:
                told[site.grids] = site.grids(args)
            mark = site.mark(args)
            card = LayerCard(site.name(args, mark), site.heads, site.head_dim, mark)
            sites.append((site, seen.note_layer(card), told[site.grids]))
        return ObservedRun(sites, self._timestep_of(args), observer, _dispatch_keys())

    def _timestep_of(self, args: Sequence[Any]) -> Tensor | None:
        if self._timestep is not None:
            value = args[self._timestep]
        else:
            call = running_call()
            value = None if call is None else call.told.timestep
        if not isinstance(value, Tensor):
            return None
        return value.detach().to(torch.float32).amax()


@dataclass(frozen=True, eq=False)
class ObservedRun:
    """One run of a graph: makes an `ObservedCall` of each of its attention calls.

    caller: torch's dispatch keys where the graph was called.
    """

    sites: Sequence[tuple[_Site, LayerCard, Grids]]
    timestep: Tensor | None
    observer: Observer
    caller: DispatchKeys

    def receive(
        self,
        number: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_valid: Tensor | None,
        segments: list[int],
    ) -> None:
        """See `veda_compile.kernels.observe_op.Receiver`. Raises LayoutError where layout and
        tokens disagree, and whatever the observer raises."""
        site, card, grids = self.sites[number]
        told = torch.tensor(grids, dtype=torch.int64, device="cpu") if site.per_call else None
        queries, keys = q.shape[2], k.shape[2]
        layout = Layout.decode(completed_layout(segments, told, queries, keys))
        layout.check_length(keys, queries)
        if site.order is not None:
            q, k, v = (x.index_select(2, site.order) for x in (q, k, v))
            key_valid = None if key_valid is None else key_valid.index_select(1, site.order)
        call = ObservedCall(
            card, q.detach(), k.detach(), v.detach(), layout, site.scale, key_valid, self.timestep
        )
        # inside an op torch records no gradients; observers that learn need them
        with torch._C._ForceDispatchKeyGuard(*self.caller):
            self.observer(call)


def _dispatch_keys() -> DispatchKeys:
    included = torch._C._dispatch_tls_local_include_set()
    return included, torch._C._dispatch_tls_local_exclude_set()


def _site(
    finding: Finding,
    teller: GridTeller,
    names: ModelNames,
    parameters: Sequence[tuple[str, int]],
) -> _Site:
    dims, layout, layer = finding.dims, finding.layout, finding.layer
    assert dims is not None and layout is not None
    scale = finding.site.scale
    return _Site(
        dims.heads,
        dims.head_dim,
        1.0 / math.sqrt(dims.head_dim) if scale is None else scale,
        teller,
        finding.sizes is None or finding.sizes.grids is None,
        None if layout.order is None else layout.order.to(dims.device),
        LayerMark([place for _, place in layer.parameters]),
        layer.name,
        SiteName(names, layer.name, parameters),
    )
