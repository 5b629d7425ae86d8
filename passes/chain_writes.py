"""Writes in place into what a written-out attention is in the middle of computing.

The rewrite reads q, k, v and the masks where the last step stands. That is right only if nobody
changes them, or a result on the way, between the step that made it and the last one that uses it.
"""

from __future__ import annotations

from torch import fx

from .sites import Site
from .writes import Writes


def written_on_the_way(site: Site, writes: Writes) -> str | None:
    """What is written to between the first and the last step of `site`, or None."""
    last = site.node
    steps = _steps(site)
    end = writes.order[last]
    for step in steps:
        for source in step.all_input_nodes:
            # a result on the way must hold until this step; what comes from outside, which the
            # rewrite reads at the last step, from this step on
            if source in steps:
                start, stop = writes.order[source] + 1, writes.order[step]
            else:
                start, stop = writes.order[step], end
            if any(write.node is not step for write in writes.between(source, start, stop)):
                return f"{source.name} is written to in place before {last.name} has used it"
    return None


def _steps(site: Site) -> set[fx.Node]:
    """The nodes between the operands of `site` and its last step, that included."""
    ends = {operand.node for operand in (site.q, site.k, site.v)}
    after: set[fx.Node] = set()
    for node in site.owner.graph.nodes:
        if node in ends or any(source in after for source in node.all_input_nodes):
            after.add(node)
        if node is site.node:
            break
    steps, waiting = set(), [site.node]
    while waiting:
        node = waiting.pop()
        if node in steps:
            continue
        steps.add(node)
        waiting += [
            source for source in node.all_input_nodes if source in after and source not in ends
        ]
    return steps
