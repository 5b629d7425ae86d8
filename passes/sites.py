"""Sites: every attention call of a graph, whatever form it is written in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .attention_ops import AttentionOp, arguments, find_op
from .encoder_layer import is_encoder_layer, read_encoder_layer
from .explicit_softmax import Explicit, match_explicit
from .flex import is_flex, read_flex
from .logit_mask import LogitMask
from .multihead import MultiHead, is_multihead, read_multihead
from .offsets import Offsets
from .reasons import Reason, Refusal
from .segments import Segments
from .subgraphs import SubgraphCall, subgraph_calls


@dataclass(frozen=True)
class Operand:
    """A tensor of an attention call and what its sides are.

    axes: one letter a side: b batch, h heads, n tokens, d head_dim. A side may be absent.
    samples: how many samples of equal length stand one after the other along the side of tokens.
    """

    node: fx.Node
    axes: str
    samples: int = 1

    @property
    def unpacked_axes(self) -> str:
        """The sides once every sample has its place along a side of its own, the first."""
        return self.axes if self.samples == 1 else "b" + self.axes


@dataclass(frozen=True, eq=False)
class Site:
    """One attention call.

    node: what is replaced; its value is the output, or a tuple with the output first
        (`output_first`). out_axes: the sides of the output.
    masks: all that keep queries from keys; causal, dropout: as given.
    scale: None is 1/sqrt(head_dim).
    oddity: an argument that makes this more than plain softmax attention, or None.
    fused: one operator, not softmax and products written out.
    structure: why the tokens may not all see each other, as a block mask or segments tell.
    segments: of packed samples, where they are proven.
    projections: of a call that projects its operands itself; they are (N, B, C) then.
    calls: the nested graphs the site lies in, outermost first; empty in the main graph.
    """

    owner: fx.GraphModule
    node: fx.Node
    q: Operand
    k: Operand
    v: Operand
    out_axes: str
    masks: tuple[LogitMask, ...] = ()
    dropout: float = 0.0
    causal: bool = False
    scale: float | None = None
    output_first: bool = False
    oddity: str | None = None
    fused: bool = True
    structure: Refusal | None = None
    segments: Segments | None = None
    projections: MultiHead | None = None
    calls: tuple[SubgraphCall, ...] = ()

    def first_output(self) -> torch.Tensor | None:
        """What tracing recorded as the attention's output."""
        value = self.node.meta.get("example_value")
        if self.output_first and isinstance(value, (tuple, list)) and value:
            value = value[0]
        return value if isinstance(value, torch.Tensor) else None


_SDPA = (
    torch._C._nn.scaled_dot_product_attention,
    torch.nn.functional.scaled_dot_product_attention,
)
_SDPA_ARGUMENTS = (
    "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
)  # fmt: skip


def find_sites(gm: fx.GraphModule, calls: tuple[SubgraphCall, ...] = ()) -> Iterator[Site]:
    """Every attention call of `gm` and of the graphs nested in it, in execution order."""
    nested = {call.node: call for call in subgraph_calls(gm)}
    offsets = Offsets(gm.graph)
    for node in gm.graph.nodes:
        if node in nested:
            yield from find_sites(nested[node].module, (*calls, nested[node]))
        else:
            site = _site_at(gm, node, calls, offsets)
            if site is not None:
                yield site


def _site_at(
    gm: fx.GraphModule, node: fx.Node, calls: tuple[SubgraphCall, ...], offsets: Offsets
) -> Site | None:
    if node.op == "call_function" and node.target in _SDPA:
        return _sdpa(gm, node, calls)
    if is_flex(node):
        return _flex(gm, node, calls, offsets)
    if is_multihead(node):
        return _multihead(gm, node, calls)
    if is_encoder_layer(node):
        x, layer, oddity = read_encoder_layer(node)
        whole = Operand(x, "bnd")
        return Site(
            gm, node, whole, whole, whole, "bnd", oddity=oddity, calls=calls, projections=layer
        )
    op = find_op(node)
    if op is not None:
        return _registered(gm, node, op, calls, offsets)
    explicit = match_explicit(node)
    if explicit is not None:
        return _explicit(gm, explicit, calls)
    return None


def _sdpa(gm: fx.GraphModule, node: fx.Node, calls: tuple[SubgraphCall, ...]) -> Site | None:
    given: dict[str, Any] = dict(zip(_SDPA_ARGUMENTS, node.args, strict=False)) | node.kwargs
    q, k, v = (given[name] for name in _SDPA_ARGUMENTS[:3])
    mask = given.get("attn_mask")
    dropout, causal, scale = given.get("dropout_p", 0.0), given.get("is_causal"), given.get("scale")
    if not all(isinstance(x, fx.Node) for x in (q, k, v)):
        return None
    odd = [
        name
        for name, value in (("dropout_p", dropout), ("is_causal", causal), ("scale", scale))
        if isinstance(value, fx.Node)
    ]
    axes = _sdpa_axes(q)
    return Site(
        gm,
        node,
        Operand(q, axes),
        Operand(k, axes),
        Operand(v, axes),
        axes,
        masks=_masks(mask, axes),
        dropout=0.0 if "dropout_p" in odd else float(dropout or 0.0),
        causal=bool(causal) and "is_causal" not in odd,
        scale=None if scale is None or "scale" in odd else float(scale),
        oddity=f"{odd[0]} is computed in the graph" if odd else None,
        calls=calls,
    )


def _flex(
    gm: fx.GraphModule, node: fx.Node, calls: tuple[SubgraphCall, ...], offsets: Offsets
) -> Site | None:
    call = read_flex(gm, node, offsets.writes)
    if call is None:
        return None
    q, k, v = (Operand(x, "bhnd") for x in (call.q, call.k, call.v))
    return Site(
        gm, node, q, k, v, "bhnd", scale=call.scale, output_first=True, oddity=call.oddity,
        masks=tuple(LogitMask(mask.node, mask.roles, -math.inf) for mask in call.masks),
        structure=None if call.structure is None else Refusal(Reason.BLOCK_MASK, call.structure),
        calls=calls,
    )  # fmt: skip


def _multihead(gm: fx.GraphModule, node: fx.Node, calls: tuple[SubgraphCall, ...]) -> Site | None:
    call = read_multihead(node)
    tensor = call.inputs[0].meta.get("example_value")
    axes = "nbd" if isinstance(tensor, torch.Tensor) and tensor.dim() == 3 else "nd"
    q, k, v = (Operand(x, axes) for x in call.inputs)
    masks = tuple(
        LogitMask(mask, roles, -math.inf if _boolean(mask) else None, shown_where=False)
        for mask, roles in call.masks
    )
    return Site(
        gm, node, q, k, v, axes, masks=masks, dropout=call.dropout, causal=call.causal,
        output_first=True, oddity=call.oddity, fused=not call.weighs, calls=calls,
        projections=call.projections,
    )  # fmt: skip


def _boolean(node: fx.Node) -> bool:
    tensor = node.meta.get("example_value")
    return isinstance(tensor, torch.Tensor) and tensor.dtype == torch.bool


def _masks(node: object, axes: str) -> tuple[LogitMask, ...]:
    """The mask argument of a fused op over q with sides `axes`: True where a query may attend, or
    added to the logits."""
    if not isinstance(node, fx.Node):
        return ()
    roles = tuple({"n": "q", "d": "k"}.get(axis, axis) for axis in axes)
    return (LogitMask(node, roles, -math.inf if _boolean(node) else None),)


def _sdpa_axes(q: fx.Node) -> str:
    value = q.meta.get("example_value")
    rank = value.dim() if isinstance(value, torch.Tensor) else 4
    return "bhnd"[4 - rank :] if rank <= 4 else "?" * rank


def _registered(
    gm: fx.GraphModule,
    node: fx.Node,
    op: AttentionOp,
    calls: tuple[SubgraphCall, ...],
    offsets: Offsets,
) -> Site:
    call = arguments(op, node, offsets)
    proven = call.segments if isinstance(call.segments, Segments) else None
    samples = 1 if proven is None else proven.samples
    return Site(
        gm,
        node,
        Operand(call.q, op.axes, samples),
        Operand(call.k, op.axes, samples),
        Operand(call.v, op.axes, samples),
        op.axes,
        masks=_masks(call.mask, "bhnd"[4 - len(op.axes) :]),
        dropout=call.dropout,
        causal=call.causal,
        scale=call.scale,
        output_first=call.output_first,
        oddity=call.oddity,
        structure=Refusal(Reason.SEGMENTS, call.segments)
        if isinstance(call.segments, str)
        else None,
        segments=proven,
        calls=calls,
    )


def _explicit(gm: fx.GraphModule, found: Explicit, calls: tuple[SubgraphCall, ...]) -> Site:
    return Site(
        gm,
        found.node,
        Operand(found.q, found.q_axes),
        Operand(found.k, found.k_axes),
        Operand(found.v, found.v_axes),
        found.out_axes,
        masks=found.masks,
        scale=found.scale,
        dropout=found.dropout,
        oddity=found.oddity,
        fused=False,
        calls=calls,
    )
