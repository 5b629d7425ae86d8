"""`flex_attention`: softmax attention where its score changes nothing and its block mask is a mask
of tokens, or hides none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .flex_blocks import Indexed, indexed_masks, lists_all_of
from .operations import operation_name
from .sizes import example_tensor, hint
from .writes import Writes

_LENGTHS = 2
"""The block mask starts with the lengths of queries and keys it is made for."""
_BLOCK_MASK_SIDES = (13, 17)
"""How many values stand for it: in torch 2.11, and from 2.13 on with the orders of the backward."""


@dataclass(frozen=True, eq=False)
class FlexCall:
    """A call of `flex_attention` by meaning, q, k, v of shape (B, H, N, D).

    oddity: a score function that changes the logits. structure: what the block mask may hide.
    masks: the boolean tensors it is proven to stand for, with what their sides are.
    """

    q: fx.Node
    k: fx.Node
    v: fx.Node
    scale: float | None
    oddity: str | None
    structure: str | None
    masks: tuple[Indexed, ...] = ()


def is_flex(node: fx.Node) -> bool:
    """Whether a node is a call of the higher-order operator."""
    return node.op == "call_function" and node.target is torch.ops.higher_order.flex_attention


_NAMES = (
    "query", "key", "value", "score_mod", "block_mask", "scale", "kernel_options",
    "score_mod_other_buffers", "mask_mod_other_buffers",
)  # fmt: skip


def read_flex(owner: fx.GraphModule, node: fx.Node, writes: Writes) -> FlexCall | None:
    """The arguments of a call; None where they are not tensors of the graph. writes: those of the
    call's graph."""
    names = _NAMES
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    q, k, v, scale = given["query"], given["key"], given["value"], given["scale"]
    if not all(isinstance(x, fx.Node) for x in (q, k, v)):
        return None
    known = isinstance(scale, (int, float))
    oddity = None
    if not _returns_first_input(_body(owner, given["score_mod"])):
        oddity = "a score_mod that changes the logits"
    elif not known:
        oddity = "scale is computed in the graph"
    factor, block_mask = float(scale) if known else None, given["block_mask"]
    captured = given.get("mask_mod_other_buffers", ())
    masks = _token_masks(owner, node, block_mask, captured, (q, k), writes)
    if masks:
        return FlexCall(q, k, v, factor, oddity, None, masks)
    return FlexCall(q, k, v, factor, oddity, _structure(owner, block_mask, k))


def _token_masks(
    owner: fx.GraphModule,
    node: fx.Node,
    block_mask: object,
    captured: object,
    operands: tuple[fx.Node, fx.Node],
    writes: Writes,
) -> tuple[Indexed, ...]:
    """The boolean tensors that a block mask made in the graph stands for; none if unproven."""
    if not isinstance(block_mask, tuple) or len(block_mask) not in _BLOCK_MASK_SIDES:
        return ()
    body = _body(owner, block_mask[-1])
    if body is None or not isinstance(captured, (tuple, list)):
        return ()
    if not all(isinstance(size, int) for size in block_mask[-3:-1]):
        return ()
    masks = indexed_masks(body, captured)
    read = None if masks is None else lists_all_of(block_mask, masks, *operands)
    if masks is None or read is None:
        return ()
    # what the lists were made of is what the mask function reads
    order = writes.order
    kept = not any(writes.between(mask.node, order[read], order[node]) for mask in masks)
    return tuple(masks) if kept else ()


def _structure(owner: fx.GraphModule, block_mask: object, k: fx.Node) -> str | None:
    """None if a block mask provably shows every query every key, else what it is."""
    if not isinstance(block_mask, tuple) or len(block_mask) not in _BLOCK_MASK_SIDES:
        return "a block mask of an unknown form"
    counts, indices, full_counts = block_mask[_LENGTHS : _LENGTHS + 3]
    block_q, block_k, rule = block_mask[-3:]
    body = _body(owner, rule)
    if body is None or not _returns_true(body):
        return "its mask_mod tells tokens apart"
    tensor = example_tensor(k)
    one_block = (
        full_counts is None
        and isinstance(counts, fx.Node)
        and isinstance(indices, fx.Node)
        and operation_name(counts) == "ones"
        and operation_name(indices) == "zeros"
        and _one(counts)
        and _one(indices)
        and isinstance(block_q, int)
        and isinstance(block_k, int)
        and tensor is not None
        and min(block_q, block_k) >= 1 << 30
        and hint(tensor.shape[-2]) < 1 << 30
    )
    return None if one_block else "its blocks are listed by tensors"


def _one(node: fx.Node) -> bool:
    """Whether a tensor holds one element, and nothing writes to it."""
    tensor = example_tensor(node)
    return tensor is not None and all(side == 1 for side in tensor.shape)


def _body(owner: fx.GraphModule, node: object) -> fx.GraphModule | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    body = getattr(owner, str(node.target), None)
    return body if isinstance(body, fx.GraphModule) else None


def _returned(body: fx.GraphModule) -> object:
    value = body.graph.output_node().args[0]
    return value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value


def _returns_first_input(body: fx.GraphModule | None) -> bool:
    return body is not None and _returned(body) is body.graph.find_nodes(op="placeholder")[0]


def _returns_true(body: fx.GraphModule) -> bool:
    """Whether a mask function is the constant True."""
    value = _returned(body)
    if isinstance(value, fx.Node):
        name = operation_name(value)
        if name in ("new_full", "full"):
            return value.args[-1] is True or value.kwargs.get("fill_value") is True
        return name in ("new_ones", "ones", "ones_like") and value.kwargs.get("dtype") == torch.bool
    return value is True
