"""A model that Dynamo cuts: probed from graph to graph, by the tags that veda itself leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from veda_compile.handing_on import tagger
from veda_compile.layer_names import ModelNames, graph_parameters
from veda_compile.passes.origins import Origins, tensor_inputs
from veda_compile.passes.owned_graph import own_copy
from veda_compile.passes.sites import Site, find_sites
from veda_compile.tags import TAGS, Root

from .claims import Claims, Entrance, GraphCall, Mark
from .entry import Entry, Grid
from .probe import Bypass, Probe


@dataclass
class _Run:
    """One call of the model: its probes by graph call, and the mark that is to enter it.

    replaced: the tensor the mark was written to, and what stood there.
    """

    bypass: Bypass = Bypass()  # noqa: RUF009 - frozen
    mark: Mark | None = None
    probes: list[Probe] = field(default_factory=list)
    replaced: tuple[Tensor, Tensor] | None = None


class GraphChain:
    """A model in several graphs, with the Python code between them.

    calls: the calls of graphs with attention. Every source that their claims are about is a
    *root*: a tensor that entered some graph, this one or one before it, with nothing known of it.
    """

    def __init__(self, entry: Entry, grid: Grid, batch: int) -> None:
        torch._dynamo.reset()
        self._entry = entry
        model, self._inputs = entry.make(entry.fit(grid), batch)
        self._names = ModelNames(model)
        self._model = torch.compile(model, backend=self._backend, dynamic=False)
        self._entrances: dict[Root, Entrance] = {}
        self.calls: list[GraphCall] = []
        self._compiling, self._learning = True, False
        self._run(_Run())  # a model may fill caches of its own, and call fewer graphs from then on
        self._learning = True
        self._graphs = len(self._run(_Run()))
        self._compiling, self._learning = False, False

    def run(self, bypass: Bypass, mark: Mark) -> list[Probe]:
        """The probes of all graph calls, with a mark on a root."""
        now = _Run(bypass, mark)
        try:
            probes = self._run(now)
        finally:
            if now.replaced is not None:
                value, before = now.replaced
                value[mark.element] = before
        if now.replaced is None or len(probes) != self._graphs:
            raise RuntimeError("the model called other graphs than before")
        return probes

    def _run(self, now: _Run) -> list[Probe]:
        self._now = now
        with torch.no_grad(), self._entry.settings():
            self._model(**self._inputs)
        return now.probes

    def _backend(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if not self._compiling:
            raise RuntimeError("a graph was compiled anew")
        owned = own_copy(gm)
        sites = list(find_sites(owned))
        handing = tagger(gm, inputs)

        def probed(*args: Any) -> Any:
            return self._probe(owned, sites, args)

        tagged = probed if handing is None else handing.wrap(probed)

        def run(*args: Any) -> Any:
            self._put(args)  # before the arguments are tagged: a write later makes tags void
            return tagged(*args)

        return run

    def _put(self, args: Sequence[Any]) -> None:
        now = self._now
        if now.mark is None or now.mark.entrance.call != len(now.probes):
            return
        value = args[now.mark.entrance.place]
        now.replaced = (value, value[now.mark.element].clone())
        value[now.mark.element] = torch.nan

    def _probe(self, gm: fx.GraphModule, sites: Sequence[Site], args: Sequence[Any]) -> Any:
        if self._learning:
            self._learn(gm, sites, args)
        probes = self._now.probes
        sees_neighbours = bool(probes) and probes[-1].sees_neighbours
        probe = Probe(gm, sites, self._bypass(gm, args), sees_neighbours)
        probes.append(probe)
        return probe.run(*args)

    def _bypass(self, gm: fx.GraphModule, args: Sequence[Any]) -> Bypass:
        """What to leave out of one graph, with modules named as the graph names them: from where
        tracing began, which the parameters tell."""
        bypass = self._now.bypass
        starts = {
            name.removesuffix(path)
            for path, place in graph_parameters(gm)
            for name in self._names.of_tensor(args[place])
            if name.endswith(path)
        }
        inside = {
            module.removeprefix(start)
            for module in bypass.modules
            for start in starts
            if module.startswith(start)
        }
        return replace(bypass, modules=frozenset(inside))

    def _learn(self, gm: fx.GraphModule, sites: Sequence[Site], args: Sequence[Any]) -> None:
        """Note the roots that enter a graph, and what is claimed of its attention."""
        number = len(self._now.probes)
        nodes = gm.graph.find_nodes(op="placeholder")
        places = tensor_inputs(gm, args)
        tensors = [args[place] for place in places]
        relation = TAGS.relation(tensors, roots=bool(sites))
        for place, tensor in zip(places, tensors, strict=True):
            tag = TAGS.of(tensor)
            if tag is not None and not tag.handed_on:
                name = f"{nodes[place].name} of graph call {number}"
                self._entrances.setdefault(tag.roots[0], Entrance(number, place, name))
        if not sites:
            return
        known = zip(places, relation.key, strict=True)
        origins = Origins({nodes[place]: told for place, told in known if told is not None})
        claims = Claims(gm, sites, args, origins)
        held = set().union(*claims.held.values())
        sources = {
            self._entrances[root]: origins.sources[place]
            for place, root in enumerate(relation.roots)
            if origins.sources.get(place) in held
        }
        self.calls.append(GraphCall(number, claims, sources))
