"""Observing: beside each accepted site stands an op that sees the same queries, keys and values.

The site keeps its node. The ops pass a ticket on, from the graph's last input to its last output,
so that none is dropped and they run in the order of the sites.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

import torch
from torch import fx

from ..kernels.observe_op import observe_v1
from .analyse import Finding
from .bhnd import cast_to, operands, to_bhnd
from .rewrite import Rewriter, lift, valid_keys
from .subgraphs import SubgraphCall, output_value

Numbered = tuple[int, Finding]


def observe_sites(
    gm: fx.GraphModule,
    findings: Sequence[Finding],
    stand_in: torch.Tensor,
) -> fx.GraphModule:
    """Let `veda::observe_v1` see every one of `findings`, which are the graph's accepted ones.

    gm: an owned copy. stand_in: what tracing is to take the ticket for. The graph gets the ticket
    as its last input, and returns it after its other outputs.
    """
    rewriter = Rewriter(gm, "closed_form", "reference")
    ticket = rewriter.add_input("veda_ticket")
    ticket.meta["example_value"] = stand_in
    _return_too(gm.graph, _chained(gm.graph, ticket, list(enumerate(findings)), 0, rewriter))
    return rewriter.finish()


def _chained(
    graph: fx.Graph, ticket: fx.Node, sites: list[Numbered], depth: int, rewriter: Rewriter
) -> fx.Node:
    """The ticket after all `sites`, which lie in `graph` or in graphs nested in it."""

    def call_of(site: Numbered) -> SubgraphCall | None:
        calls = site[1].site.calls
        return calls[depth] if len(calls) > depth else None

    for call, group in itertools.groupby(sites, call_of):
        if call is None:
            for number, finding in group:
                ticket = _observed(graph, finding, number, ticket, rewriter)
        else:
            inner = lift(call.node, call.module, ticket)
            inner.meta["example_value"] = ticket.meta["example_value"]
            last = _chained(call.module.graph, inner, list(group), depth + 1, rewriter)
            place = _return_too(call.module.graph, last)
            ticket = _outcome(graph, call.node, place, ticket)
    return ticket


def _observed(
    graph: fx.Graph, finding: Finding, number: int, ticket: fx.Node, rewriter: Rewriter
) -> fx.Node:
    """The op for one site, right behind it: the attention itself is to choose the strides."""
    site = finding.site
    assert finding.dims is not None
    with graph.inserting_before(site.node.next):
        q, k, v = (
            cast_to(graph, to_bhnd(graph, operand), operand.node, finding.dims.dtype)
            for operand in operands(graph, site)
        )
        valid = valid_keys(graph, finding, q, k)
        layout = rewriter.layout(graph, finding)
        node = graph.call_function(observe_v1._opoverload, (q, k, v, valid, layout, number, ticket))
    node.meta["example_value"] = ticket.meta["example_value"]
    return node


def _outcome(graph: fx.Graph, call: fx.Node, place: int, ticket: fx.Node) -> fx.Node:
    """The ticket as the nested graph of `call` returns it, at `place`."""
    recorded = call.meta.get("example_value")
    if isinstance(recorded, tuple | list):
        call.meta["example_value"] = (*recorded, ticket.meta["example_value"])
    with graph.inserting_before(call.next):
        node = graph.call_function(operator.getitem, (call, place))
    node.meta["example_value"] = ticket.meta["example_value"]
    return node


def _return_too(graph: fx.Graph, node: fx.Node) -> int:
    """Let a graph return `node` after all else; at which place."""
    returned = output_value(graph)
    assert isinstance(returned, tuple | list)
    graph.output_node().args = ((*returned, node),)
    return len(returned)
