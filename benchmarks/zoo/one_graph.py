"""A graph by itself: probed with NaNs in what its backend was given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from veda_compile.passes.sites import Site, find_sites

from .claims import Claims, Entrance, GraphCall, Mark
from .entry import Entry, Grid
from .probe import Bypass, Probe


@dataclass(frozen=True)
class Graph:
    """A Dynamo graph and the inputs its backend was given."""

    gm: fx.GraphModule
    inputs: list[Any]


def captured(entry: Entry, grid: Grid, batch: int) -> list[Graph]:
    """Every graph of one call of a model."""
    graphs: list[Graph] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(Graph(gm, _copies(inputs)))
        return gm.forward

    torch._dynamo.reset()
    model, inputs = entry.make(entry.fit(grid), batch)
    with torch.no_grad(), entry.settings():
        torch.compile(model, backend=backend, dynamic=False)(**inputs)
    return graphs


def _copies(inputs: list[Any]) -> list[Any]:
    """Inputs that a graph may write to."""
    return [pytree.tree_map_only(Tensor, _copy, value) for value in inputs]


def _copy(value: Tensor) -> Tensor:
    return value if isinstance(value, torch.nn.Parameter) else value.detach().clone()


class OneGraph:
    """A graph whose attention takes its tokens from the graph's own inputs.

    calls: the only one.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._sites: Sequence[Site] = list(find_sites(graph.gm))
        claims = Claims(graph.gm, self._sites, graph.inputs)
        held = set().union(*claims.held.values())
        places = {n: i for i, n in enumerate(graph.gm.graph.find_nodes(op="placeholder"))}
        sources = {
            Entrance(0, places[node], source.name): source
            for source, node in claims.provenance.sources.items()
            if source in held
        }
        self.calls = [GraphCall(0, claims, sources)]

    def run(self, bypass: Bypass, mark: Mark) -> list[Probe]:
        """The probe of the call with a mark on an input."""
        inputs = _copies(self._graph.inputs)
        inputs[mark.entrance.place][mark.element] = torch.nan
        probe = Probe(self._graph.gm, self._sites, bypass)
        with torch.no_grad():
            probe.run(*inputs)
        return [probe]
