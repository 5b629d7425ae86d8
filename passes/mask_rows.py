"""Key validity as nodes of a graph: rows of booleans for the op, and what masked queries get."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import fx

from .masks import KeyValidity, Nothing
from .truth import Leaf, Predicate


def key_rows(graph: fx.Graph, mask: KeyValidity, k: fx.Node) -> fx.Node | None:
    """(B, N) validity of the keys k (B, H, N, D); None where all count."""
    return None if mask.keys is None else _rows(graph, mask.keys, k)


def attending_rows(graph: fx.Graph, mask: KeyValidity, q: fx.Node) -> fx.Node | None:
    """(B, N), whether the queries q (B, H, N, D) attend to anything; None where all do."""
    return None if mask.queries is None else _rows(graph, mask.queries, q)


def masked_output(
    graph: fx.Graph, mask: KeyValidity, valid: fx.Node | None, q: fx.Node, v: fx.Node, out: fx.Node
) -> fx.Node:
    """`out` (B, H, N, D) with the rows of queries that attend to nothing as the model has them.

    valid: `key_rows`. The op itself gives zeros where no key counts.
    """
    attends = attending_rows(graph, mask, q)
    if mask.nothing is not Nothing.ZEROS and valid is not None:
        some = graph.call_function(torch.any, (valid, -1, True))
        attends = some if attends is None else graph.call_function(operator.and_, (attends, some))
    if attends is None:
        return out
    attends = graph.call_function(operator.getitem, (attends, (slice(None), None, slice(None),
                                                               None)))  # fmt: skip
    return graph.call_function(torch.where, (attends, out, _nothing(graph, mask.nothing, v, out)))


def _nothing(graph: fx.Graph, nothing: Nothing, v: fx.Node, out: fx.Node) -> fx.Node:
    """A tensor that broadcasts to `out`."""
    if nothing is not Nothing.MEAN:
        value = 0.0 if nothing is Nothing.ZEROS else float("nan")
        return graph.call_function(torch.ops.aten.new_full.default, (out, [1], value))
    mean = graph.call_function(torch.mean, (v, 2, True))
    heads = graph.call_function(torch.ops.aten.sym_size.int, (out, 1))
    shared = graph.call_function(torch.ops.aten.sym_size.int, (v, 1))
    groups = graph.call_function(operator.floordiv, (heads, shared))
    return graph.call_function(torch.repeat_interleave, (mean, groups), {"dim": 1})


def _rows(graph: fx.Graph, predicate: Predicate, like: fx.Node) -> fx.Node:
    """(B, N) of booleans for the tokens of `like` (B, H, N, D)."""
    leaves = [_row(graph, leaf) for leaf in predicate.leaves]
    terms = []
    for choice in itertools.product((0, 1), repeat=len(leaves)):
        if bool(predicate.values[choice]):
            literals = [
                leaf if on else graph.call_function(operator.invert, (leaf,))
                for leaf, on in zip(leaves, choice, strict=True)
            ]
            terms.append(_joined(graph, operator.and_, literals))
    rows = _joined(graph, operator.or_, terms)
    batch, tokens = (
        graph.call_function(torch.ops.aten.sym_size.int, (like, side)) for side in (0, 2)
    )
    return graph.call_function(torch.ops.aten.expand.default, (rows, (batch, tokens)))


def _joined(graph: fx.Graph, how: Any, nodes: list[fx.Node]) -> fx.Node:
    joined = nodes[0]
    for node in nodes[1:]:
        joined = graph.call_function(how, (joined, node))
    return joined


def _row(graph: fx.Graph, leaf: Leaf) -> fx.Node:
    """A leaf as (B or 1, N or 1)."""
    token = "q" if leaf.of_queries else "k"
    index = tuple(slice(None) if role in ("b", token) else 0 for role in leaf.roles)
    node = graph.call_function(operator.getitem, (leaf.node, index))
    kept = [role for role in leaf.roles if role in ("b", token)]
    if kept == [token, "b"]:
        node = graph.call_function(torch.transpose, (node, 0, 1))
    if "b" not in kept:
        node = graph.call_function(torch.unsqueeze, (node, 0))
    if token not in kept:
        node = graph.call_function(torch.unsqueeze, (node, -1))
    return node
