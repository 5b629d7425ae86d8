"""Untold: naming the cause where a verdict lacks what an earlier graph should have told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from .passes.analyse import Finding
from .passes.operations import is_in_place, operation_name, written_operands
from .passes.reasons import Reason, Refusal
from .passes.sites import Site
from .tags import TAGS, Untold


def with_causes(
    gm: fx.GraphModule, inputs: Sequence[Any], findings: Sequence[Finding]
) -> list[Finding]:
    """The findings of `gm`, those that lack what an earlier graph could not tell with the cause.

    Queries and keys that seem to come from two places (cross-attention) may come from one where
    nothing is known of them: these count as not followed.
    """
    untold = _untold_inputs(gm, inputs)
    if not untold:
        return list(findings)
    given = {
        node
        for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)
        if node in untold or _is_handed_on(value)
    }
    reach = _reach(gm.graph, given)
    return [_named(finding, untold, reach) for finding in findings]


def _named(
    finding: Finding,
    untold: Mapping[fx.Node, Untold],
    reach: Mapping[fx.Node, frozenset[fx.Node]],
) -> Finding:
    refusal = finding.refusal
    if refusal is None or refusal.reason not in (Reason.NO_PROVENANCE, Reason.CROSS_ATTENTION):
        return finding
    asking, asked = _sides(finding.site, reach)
    reached = [why for node, why in untold.items() if node in asking | asked]
    if not reached:
        return finding
    crosses = refusal.reason is Reason.CROSS_ATTENTION
    if crosses and not (asking and asked and finding.dims and finding.dims.tokens > 1):
        return finding
    why = reached[0]
    detail = why.cause if crosses or not refusal.detail else f"{refusal.detail}; {why.cause}"
    return replace(finding, refusal=Refusal(Reason.NO_PROVENANCE, detail, why.remedy))


def _untold_inputs(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, Untold]:
    found = {}
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        why = TAGS.why_untold(value) if isinstance(value, torch.Tensor) else None
        if why is not None:
            found[node] = why
    return found


def _is_handed_on(value: object) -> bool:
    tag = TAGS.of(value) if type(value) is torch.Tensor and not value.is_inference() else None
    return tag is not None and tag.handed_on


def _sides(
    site: Site, reach: Mapping[fx.Node, frozenset[fx.Node]]
) -> tuple[frozenset[fx.Node], frozenset[fx.Node]]:
    """The inputs that reach the queries, and those that reach keys or values."""
    q, k, v = (reach.get(x.node, frozenset()) for x in (site.q, site.k, site.v))
    return q, k | v


def _reach(graph: fx.Graph, starts: set[fx.Node]) -> dict[fx.Node, frozenset[fx.Node]]:
    """Per node, which of `starts` it was computed from; a tensor that is written to holds what it
    was written with."""
    found: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        own = frozenset([node]) if node in starts else frozenset()
        found[node] = own.union(*(found[given] for given in node.all_input_nodes))
        if not node.op.startswith("call"):
            continue
        name, written = operation_name(node), list(written_operands(node))
        if node.args and (name == "setitem" or is_in_place(name)):
            written += [x for x in node.args[:1] if isinstance(x, fx.Node)]
        for target in written:
            found[target] = found[node]
    return found
