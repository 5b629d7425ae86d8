"""Higher-order operators: graph modules called from a graph (checkpointing, compiled regions)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx


@dataclass(frozen=True, eq=False)
class SubgraphCall:
    """A node that calls a nested graph module.

    attribute: name of the module on its owner. operands: the node's arguments that become the
    nested graph's placeholders, in order; the last `len(operands)` arguments of the node.
    """

    node: fx.Node
    attribute: str
    module: fx.GraphModule
    operands: tuple[object, ...]


def subgraph_call(owner: fx.GraphModule, node: fx.Node) -> SubgraphCall | None:
    """`node` as a call of one nested graph, or None if it is not one.

    Operators with more than one nested graph (cond, flex_attention) are not followed.
    """
    if node.op != "call_function" or any(isinstance(x, fx.Node) for x in node.kwargs.values()):
        return None
    if node.target is torch.ops.higher_order.flex_attention:
        return None
    places = [
        i
        for i, arg in enumerate(node.args)
        if isinstance(arg, fx.Node)
        and arg.op == "get_attr"
        and isinstance(getattr(owner, str(arg.target), None), fx.GraphModule)
    ]
    if len(places) != 1:
        return None
    body = node.args[places[0]]
    assert isinstance(body, fx.Node)
    module = getattr(owner, str(body.target))
    count = len(module.graph.find_nodes(op="placeholder"))
    tail = node.args[places[0] + 1 :]
    if count > len(tail):
        return None
    return SubgraphCall(node, str(body.target), module, tail[len(tail) - count :])


def subgraph_calls(owner: fx.GraphModule) -> Iterator[SubgraphCall]:
    """The nested graphs called directly from `owner`, in order."""
    for node in owner.graph.nodes:
        call = subgraph_call(owner, node)
        if call is not None:
            yield call


def output_value(graph: fx.Graph) -> object:
    """What a graph returns."""
    return graph.output_node().args[0]
