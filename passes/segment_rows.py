"""Segments of packed samples as nodes of a graph: valid keys, and the output of padding."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from .segments import Segments
from .sizes import Length, SizeOf, example_tensor

_SIZE = torch.ops.aten.sym_size.int


def own_keys(graph: fx.Graph, segments: Segments, q: fx.Node) -> fx.Node | None:
    """(B, N) bool: the tokens of q (B, H, N, D) that stand in a sample's first segment; None where
    all do. Where it takes values to tell, a check of them enters the graph."""
    tokens = graph.call_function(_SIZE, (q, 2))
    if segments.padding is None:
        if segments.checked:
            whole = _starts(graph, segments, tokens, segments.samples + 1)
            same = graph.call_function(torch.eq, (segments.bounds, whole))
            _check(graph, same, "one segment as long as the sequence")
        return None
    splits = _every_second(graph, segments.bounds)
    starts = _starts(graph, segments, tokens, segments.samples)
    ends = graph.call_function(operator.sub, (splits, starts))
    if segments.checked:
        least = graph.call_function(operator.sub, (tokens, _length(graph, segments.padding)))
        late = graph.call_function(torch.ge, (ends, least))
        early = graph.call_function(torch.le, (ends, tokens))
        both = graph.call_function(torch.logical_and, (late, early))
        _check(graph, both, "the text a mask of zeros and ones counts")
    places = _counted(graph, segments, tokens)
    column = graph.call_function(torch.unsqueeze, (ends, -1))
    return graph.call_function(torch.lt, (places, column))


def with_padding(
    graph: fx.Graph,
    segments: Segments,
    own: fx.Node,
    operands: tuple[fx.Node, fx.Node, fx.Node],
    out: fx.Node,
    scale: float | None,
    grouped: bool,
) -> fx.Node:
    """`out` (B, H, N, D) with the rows of padding attending to the padding of their sample.

    own: what `own_keys` returned. operands: q, k, v of shape (B, H, N, D). grouped: k and v have
    fewer heads.
    """
    assert segments.padding is not None
    tokens = graph.call_function(_SIZE, (out, 2))
    length = _length(graph, segments.padding)
    start = graph.call_function(operator.sub, (tokens, length))
    q, k, v = (graph.call_function(torch.narrow, (x, 2, start, length)) for x in operands)
    before = graph.call_function(torch.narrow, (out, 2, 0, start))
    last = graph.call_function(torch.narrow, (out, 2, start, length))
    shown = graph.call_function(torch.narrow, (own, 1, start, length))
    rows = graph.call_function(operator.getitem, (shown, (slice(None), None, slice(None), None)))
    keys = graph.call_function(operator.getitem, (shown, (slice(None), None, None)))
    # rows of the first segment see its keys here: no row is without any, which could give NaN
    mask = graph.call_function(torch.eq, (rows, keys))
    among = graph.call_function(
        F.scaled_dot_product_attention,
        (q, k, v),
        {"attn_mask": mask, "scale": scale, "enable_gqa": grouped},
    )
    merged = graph.call_function(torch.where, (rows, last, among))
    # stored as the op stores its output, (B, N, H, D): the model may view it as such
    parts = [graph.call_function(torch.transpose, (part, 1, 2)) for part in (before, merged)]
    whole = graph.call_function(torch.cat, (parts, 1))
    return graph.call_function(torch.transpose, (whole, 1, 2))


def _length(graph: fx.Graph, length: Length) -> Any:
    if isinstance(length, SizeOf):
        return graph.call_function(_SIZE, (length.node, length.dim))
    return length


def _counted(graph: fx.Graph, segments: Segments, count: Any) -> fx.Node:
    """(count,) integers from 0 on, beside the offsets."""
    tensor = example_tensor(segments.bounds)
    assert tensor is not None
    return graph.call_function(torch.arange, (count,), {"device": tensor.device})


def _starts(graph: fx.Graph, segments: Segments, tokens: fx.Node, count: int) -> fx.Node:
    """(count,) where samples of `tokens` tokens start."""
    return graph.call_function(operator.mul, (_counted(graph, segments, count), tokens))


def _every_second(graph: fx.Graph, bounds: fx.Node) -> fx.Node:
    return graph.call_function(operator.getitem, (bounds, slice(1, None, 2)))


def _check(graph: fx.Graph, holds: fx.Node, expected: str) -> None:
    every = graph.call_function(torch.all, (holds,))
    message = f"cu_seqlens of a packed attention call do not say what the graph shows: {expected}"
    graph.call_function(torch.ops.aten._assert_async.msg, (every, message))
