"""`nn.MultiheadAttention`: one call that projects, attends and projects back.

Only a call that turns out to be video self-attention is taken apart, when it is rewritten.
"""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from .sizes import example_tensor

_LINEAR = torch._C._nn.linear
_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
_NEUTRAL: dict[str, object] = {
    "bias_k": None,
    "bias_v": None,
    "add_zero_attn": False,
    "static_k": None,
    "static_v": None,
}


@dataclass(frozen=True, eq=False)
class MultiHead:
    """The projections of one call.

    weights, biases: of q, k and v; three times the same node where they are packed in one tensor.
    """

    heads: int
    width: int
    weights: tuple[fx.Node, fx.Node, fx.Node]
    biases: fx.Node | None
    packed: bool
    out_weight: fx.Node
    out_bias: fx.Node | None

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.width // self.heads

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The weights and biases."""
        found = (*self.weights, self.biases, self.out_weight, self.out_bias)
        return tuple(node for node in found if node is not None)

    def project(self, graph: fx.Graph, inputs: tuple[fx.Node, fx.Node, fx.Node]) -> list[fx.Node]:
        """q, k, v as (..., H, D) from inputs (..., C)."""
        if self.packed and inputs[0] is inputs[1] is inputs[2]:
            whole = graph.call_function(_LINEAR, (inputs[0], self.weights[0], self.biases))
            parts = graph.call_function(torch.chunk, (whole, 3, -1))
            projected = [graph.call_function(operator.getitem, (parts, i)) for i in range(3)]
        else:
            projected = [self._one(graph, x, place) for place, x in enumerate(inputs)]
        sides = (self.heads, self.head_dim)
        return [graph.call_function(torch.unflatten, (x, -1, sides)) for x in projected]

    def _one(self, graph: fx.Graph, x: fx.Node, place: int) -> fx.Node:
        rows = slice(place * self.width, (place + 1) * self.width)
        weight, bias = self.weights[place], self.biases
        if self.packed:
            weight = graph.call_function(operator.getitem, (weight, rows))
        if bias is not None:
            bias = graph.call_function(operator.getitem, (bias, rows))
        return graph.call_function(_LINEAR, (x, weight, bias))

    def combine(self, graph: fx.Graph, out: fx.Node, x: fx.Node) -> fx.Node:
        """What the call returns, (..., C), from the attention's output (..., H, D).

        x: the call's query.
        """
        flat = graph.call_function(torch.flatten, (out, -2))
        return graph.call_function(_LINEAR, (flat, self.out_weight, self.out_bias))


@dataclass(frozen=True, eq=False)
class MultiHeadCall:
    """A call of `F.multi_head_attention_forward` by meaning.

    inputs: query, key, value of shape (N, B, C), or (N, C). masks: (node, sides) of boolean or
    added masks, True where nothing may be attended to. oddity: what makes it more than attention
    between projections, or None. weighs: it also computes the attention weights.
    """

    inputs: tuple[fx.Node, fx.Node, fx.Node]
    projections: MultiHead | None
    masks: tuple[tuple[fx.Node, tuple[str, ...]], ...]
    dropout: float
    causal: bool
    weighs: bool
    oddity: str | None


def with_heads(axes: str) -> str:
    """Sides of a projected operand, from those of the input; see `Operand`."""
    return axes.replace("d", "hd")


def is_multihead(node: fx.Node) -> bool:
    """Whether a node is a call of `nn.MultiheadAttention`."""
    return node.op == "call_function" and node.target is F.multi_head_attention_forward


def read_multihead(node: fx.Node) -> MultiHeadCall:
    """The arguments of a call."""
    bound = _SIGNATURE.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    given = bound.arguments
    odd = [name for name, neutral in _NEUTRAL.items() if given[name] is not neutral]
    projections = _projections(given)
    if projections is None:
        odd.append("projection weights that are no tensors")
    padding, mask = given["key_padding_mask"], given["attn_mask"]
    batched = _rank(given["query"]) == 3
    masks: list[tuple[fx.Node, tuple[str, ...]]] = []
    if isinstance(padding, fx.Node):
        masks.append((padding, ("b", "k") if batched else ("k",)))
    if isinstance(mask, fx.Node):
        masks.append((mask, ("h", "q", "k")))
    return MultiHeadCall(
        (given["query"], given["key"], given["value"]),
        projections,
        tuple(masks),
        float(given["dropout_p"]) if given["training"] else 0.0,
        bool(given["is_causal"]),
        bool(given["need_weights"]),
        f"nn.MultiheadAttention with {odd[0]}" if odd else None,
    )


def _projections(given: dict[str, Any]) -> MultiHead | None:
    separate = bool(given["use_separate_proj_weight"])
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    weights = tuple(given[name] if separate else given["in_proj_weight"] for name in names)
    out = given["out_proj_weight"]
    if not all(isinstance(weight, fx.Node) for weight in (*weights, out)):
        return None
    query = example_tensor(given["query"])
    heads = given["num_heads"]
    if query is None or not isinstance(heads, int) or not isinstance(query.shape[-1], int):
        return None
    q, k, v = weights
    return MultiHead(
        heads, query.shape[-1], (q, k, v), given["in_proj_bias"], not separate, out,
        given["out_proj_bias"],
    )  # fmt: skip


def _rank(node: object) -> int:
    tensor = example_tensor(node)
    return 0 if tensor is None else tensor.dim()
