"""Attention written out: softmax(q @ k^T * scale + mask) @ v, in whatever operations.

From the last product back to the softmax, and from there back to the first product. What happens
to logits or weights in between and is no scale, cast, mask or dropout is an oddity: the call is
seen, and left.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from .compute import is_elementwise
from .logit_mask import LogitMask
from .logits import CASTS, Logits, argument, back_to_product, keeps_rows_and_columns
from .operations import operation_name
from .products import Product, find_product


@dataclass(frozen=True, eq=False)
class Explicit:
    """A written-out attention call. Axes as in `Operand`; masks and oddity as in `Site`."""

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    q_axes: str
    k_axes: str
    v_axes: str
    out_axes: str
    scale: float
    masks: tuple[LogitMask, ...]
    dropout: float
    oddity: str | None


@dataclass(frozen=True, eq=False)
class _Weights:
    """Normalised weights: what they are the softmax of, and along which of its sides."""

    logits: object
    dim: int
    dropout: float = 0.0
    oddity: str | None = None


def match_explicit(node: fx.Node) -> Explicit | None:
    """The attention whose last step is `node`; None if it is something else."""
    last = find_product(node)
    if last is not None:
        for operand in (last.left, last.right):
            found = _assembled(node, last, operand, _weights(operand))
            if found is not None:
                return found
        return None
    if operation_name(node) in ("div", "truediv"):
        # exp(logits) @ v, divided by the sums last
        last, sums = _product_at(argument(node, 0, "input")), argument(node, 1, "other")
        exponentials = None if last is None else _uncast(last.left)
        dim = _summed_side(sums, exponentials)
        if last is not None and dim is not None and _is_exp(exponentials):
            return _assembled(node, last, last.left, _Weights(_exponent(exponentials), dim))
    return None


def _assembled(
    node: fx.Node, last: Product, operand: fx.Node, weights: _Weights | None
) -> Explicit | None:
    """The whole call from its last product, one operand of which are the weights."""
    logits = None if weights is None else back_to_product(weights.logits)
    if weights is None or logits is None:
        return None
    first = _with_keys_at(logits, weights.dim)
    if first is None:
        return None
    scores = first.product
    on_left = operand is last.left
    own, others = (
        (last.left_axes, last.right_axes) if on_left else (last.right_axes, last.left_axes)
    )
    row, column = ("n", "m") if on_left else ("m", "n")
    # weights in the letters of the scores: rows are queries, what is summed are keys
    if own.replace(row, "Q").replace("d", "K") != _of_logits(scores.out_axes):
        return None
    v_axes = others.replace("d", "K").replace(column, "d").replace("K", "n")
    out_axes = last.out_axes.replace(row, "Q").replace(column, "d").replace("Q", "n")
    return Explicit(
        node,
        scores.left,
        scores.right,
        last.right if on_left else last.left,
        scores.left_axes,
        scores.right_axes.replace("m", "n"),
        v_axes,
        out_axes,
        first.scale * scores.scale,
        first.masks,
        weights.dropout,
        weights.oddity or first.oddity,
    )


def _of_logits(axes: str) -> str:
    return axes.replace("n", "Q").replace("m", "K")


def _with_keys_at(logits: Logits, dim: int) -> Logits | None:
    """The logits with the side that is normalised called "m"; None if it is no side of tokens."""
    product = logits.product
    axes = product.out_axes
    if logits.reshaped and dim not in (-1, logits.rank - 1):
        return None
    if any(side != dim % logits.rank - logits.rank for side in logits.shifted):
        return None
    place = len(axes) - 1 if logits.reshaped else dim % len(axes)
    if axes[place] == "n":  # k @ q^T
        swapped = str.maketrans("nm", "mn")
        product = replace(
            product, left=product.right, right=product.left,
            left_axes=product.right_axes.translate(swapped),
            right_axes=product.left_axes.translate(swapped),
            out_axes=axes.translate(swapped),
        )  # fmt: skip
    elif axes[place] != "m":
        return None
    roles = {"n": "q", "m": "k"}
    named = tuple(roles.get(axis, axis) for axis in product.out_axes)
    # after a reshape of the batch sides nothing is known of them
    masks = tuple(
        replace(mask, roles=("h", "h", "h", *named[-2:]) if logits.reshaped else named)
        for mask in logits.masks
    )
    return replace(logits, product=product, masks=masks)


def _weights(node: object) -> _Weights | None:
    """From the weights back over casts and dropout to what normalises them."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return None
    name = operation_name(node)
    first = argument(node, 0, "input")
    if name in ("softmax", "_softmax"):
        dim = argument(node, 1, "dim")
        return _Weights(first, dim) if isinstance(dim, int) else None
    if name in ("div", "truediv"):
        exponentials = _uncast(first)
        dim = _summed_side(argument(node, 1, "other"), exponentials)
        if dim is not None and _is_exp(exponentials):
            return _Weights(_exponent(exponentials), dim)
    found = _weights(first) if _passes(node, name) else None
    if found is None or name in CASTS:
        return found
    if name == "dropout":
        p = argument(node, 1, "p", 0.5)
        training = argument(node, 2, "training", True)
        if isinstance(p, (int, float)) and isinstance(training, bool):
            return replace(found, dropout=float(p) if training else 0.0)
    if keeps_rows_and_columns(node):
        return found
    return replace(found, oddity=f"the weights pass through {name}")


def _passes(node: fx.Node, name: str) -> bool:
    return (
        name in CASTS or name == "dropout" or is_elementwise(name) or keeps_rows_and_columns(node)
    )


def _product_at(node: object) -> Product | None:
    node = _uncast(node)
    return find_product(node) if isinstance(node, fx.Node) else None


def _uncast(node: object) -> object:
    while isinstance(node, fx.Node) and node.op != "placeholder" and operation_name(node) in CASTS:
        node = argument(node, 0, "input")
    return node


def _is_exp(node: object) -> bool:
    return isinstance(node, fx.Node) and node.op != "placeholder" and (
        operation_name(node) in ("exp", "exp_")
    )  # fmt: skip


def _exponent(node: object) -> object:
    return argument(node, 0, "input") if isinstance(node, fx.Node) else None


def _summed_side(sums: object, terms: object) -> int | None:
    """The side along which `sums` adds up `terms`, kept at size 1; None if it is no such sum."""
    sums = _uncast(sums)
    if not isinstance(sums, fx.Node) or sums.op == "placeholder":
        return None
    dim, keep = argument(sums, 1, "dim"), argument(sums, 2, "keepdim", False)
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    same = operation_name(sums) == "sum" and _uncast(argument(sums, 0, "input")) is terms
    value = sums.meta.get("example_value")
    if not same or not isinstance(dim, int) or keep is not True:
        return None
    return dim if isinstance(value, torch.Tensor) else None
