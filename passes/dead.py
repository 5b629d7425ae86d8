"""Dead values: what a graph computes and nothing uses."""

from __future__ import annotations

import operator

from torch import fx

from .operations import is_in_place, operation_name, written_operands


def takes_output(node: fx.Node) -> bool:
    """Whether a node takes the first of several results."""
    return node.target is operator.getitem and node.args[1:] == (0,)


def is_live(node: fx.Node) -> bool:
    """Whether anything that matters depends on a node: the graph's output, or a write."""
    if node.op == "output" or next(written_operands(node), None) is not None:
        return True
    if node.op == "call_method" or node.op == "call_function":
        name = operation_name(node)
        if name == "setitem" or is_in_place(name):
            return True
        return any(is_live(user) for user in node.users)
    return True


def erase(node: fx.Node) -> None:
    """Remove a node that is not live, and what is computed from it."""
    for user in list(node.users):
        erase(user)
    node.graph.erase_node(node)
