"""`nn.TransformerEncoderLayer` as one operator: norms, attention, feed-forward and residuals."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from .multihead import MultiHead

_NAMES = tuple(
    """src embed_dim num_heads qkv_weight qkv_bias proj_weight proj_bias use_gelu norm_first eps
    norm_weight_1 norm_bias_1 norm_weight_2 norm_bias_2 ffn_weight_1 ffn_bias_1 ffn_weight_2
    ffn_bias_2 mask mask_type""".split()
)

Affine = tuple[fx.Node, fx.Node]
"""Weight and bias."""


@dataclass(frozen=True, eq=False)
class EncoderLayer(MultiHead):
    """The projections of the attention, and the layer around it."""

    norm_first: bool
    gelu: bool
    eps: float
    norms: tuple[Affine, Affine]
    feed_forward: tuple[Affine, Affine]

    def project(self, graph: fx.Graph, inputs: tuple[fx.Node, fx.Node, fx.Node]) -> list[fx.Node]:
        """q, k, v as (..., H, D) from three times the layer's input."""
        x = inputs[0]
        if self.norm_first:
            x = self._norm(graph, x, 0)
        return super().project(graph, (x, x, x))

    def combine(self, graph: fx.Graph, out: fx.Node, x: fx.Node) -> fx.Node:
        """The layer's output from the attention's and the layer's input x."""
        out = super().combine(graph, out, x)
        x = graph.call_function(operator.add, (x, out))
        if self.norm_first:
            return graph.call_function(operator.add, (x, self._fed(graph, self._norm(graph, x, 1))))
        x = self._norm(graph, x, 0)
        return self._norm(graph, graph.call_function(operator.add, (x, self._fed(graph, x))), 1)

    def _norm(self, graph: fx.Graph, x: fx.Node, place: int) -> fx.Node:
        return graph.call_function(F.layer_norm, (x, (self.width,), *self.norms[place], self.eps))

    def _fed(self, graph: fx.Graph, x: fx.Node) -> fx.Node:
        hidden = graph.call_function(torch._C._nn.linear, (x, *self.feed_forward[0]))
        hidden = graph.call_function(F.gelu if self.gelu else F.relu, (hidden,))
        return graph.call_function(torch._C._nn.linear, (hidden, *self.feed_forward[1]))


def is_encoder_layer(node: fx.Node) -> bool:
    """Whether a node is a whole encoder layer."""
    return node.op == "call_function" and node.target is torch._transformer_encoder_layer_fwd


def read_encoder_layer(node: fx.Node) -> tuple[fx.Node, EncoderLayer, str | None]:
    """(input (B, N, C), the layer, what makes it more than that or None)."""
    given: dict[str, Any] = dict.fromkeys(_NAMES)
    given |= dict(zip(_NAMES, node.args, strict=False)) | node.kwargs
    qkv = given["qkv_weight"]
    layer = EncoderLayer(
        given["num_heads"], given["embed_dim"], (qkv, qkv, qkv), given["qkv_bias"], True,
        given["proj_weight"], given["proj_bias"], given["norm_first"], given["use_gelu"],
        given["eps"],
        ((given["norm_weight_1"], given["norm_bias_1"]),
         (given["norm_weight_2"], given["norm_bias_2"])),
        ((given["ffn_weight_1"], given["ffn_bias_1"]),
         (given["ffn_weight_2"], given["ffn_bias_2"])),
    )  # fmt: skip
    oddity = None if given["mask"] is None else "nn.TransformerEncoderLayer with a mask"
    return given["src"], layer, oddity
