"""Operands of an attention call as (B, H, N, D), and its result in the order the graph has."""

from __future__ import annotations

import torch
from torch import fx

from .multihead import with_heads
from .sites import Operand, Site
from .sizes import example_tensor

_ORDER = "bhnd"


def operands(graph: fx.Graph, site: Site) -> list[Operand]:
    """q, k and v as they enter the attention."""
    operands = [site.q, site.k, site.v]
    if site.projections is None:
        return operands
    q, k, v = (operand.node for operand in operands)
    projected = site.projections.project(graph, (q, k, v))
    return [Operand(node, with_heads(site.q.axes)) for node in projected]


def to_bhnd(graph: fx.Graph, operand: Operand) -> fx.Node:
    """An operand as (B, H, N, D)."""
    axes, node = operand.axes, operand.node
    if operand.samples > 1:
        place = axes.index("n")
        node = graph.call_function(torch.unflatten, (node, place, (operand.samples, -1)))
        axes = axes.replace("n", "bn")
    present = [axes.index(letter) for letter in _ORDER if letter in axes]
    if present != sorted(present):
        node = graph.call_function(torch.permute, (node, present))
    for place, letter in enumerate(_ORDER):
        if letter not in axes:
            node = graph.call_function(torch.unsqueeze, (node, place))
    return node


def cast_to(graph: fx.Graph, node: fx.Node, recorded: fx.Node, dtype: torch.dtype) -> fx.Node:
    """`node` in `dtype`, given the node that holds the same values."""
    tensor = example_tensor(recorded)
    if tensor is None or tensor.dtype == dtype:
        return node
    return graph.call_function(torch.ops.aten.to.dtype, (node, dtype))


def from_bhnd(graph: fx.Graph, node: fx.Node, axes: str, samples: int = 1) -> fx.Node:
    """A (B, H, N, D) result with the axes and the packed samples of an `Operand`."""
    if samples > 1:  # of packed tokens, one after the other
        unpacked = axes.replace("n", "bn")
        node = from_bhnd(graph, node, unpacked)
        place = unpacked.index("b")
        return graph.call_function(torch.flatten, (node, place, place + 1))
    for place, letter in reversed(list(enumerate(_ORDER))):
        if letter not in axes:
            node = graph.call_function(torch.squeeze, (node, place))
    kept = [letter for letter in _ORDER if letter in axes]
    order = [kept.index(letter) for letter in axes]
    if order != sorted(order):
        node = graph.call_function(torch.permute, (node, order))
    return node
