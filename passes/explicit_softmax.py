"""Attention written out: softmax(q @ k^T * scale) @ v, in methods, functions, operators, einsum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .provenance import operation_name

_PRODUCTS = frozenset({"matmul", "bmm", "__matmul__", "einsum"})
_CASTS = frozenset({"to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous"})
_MASKS = frozenset({"add", "add_", "iadd", "masked_fill", "masked_fill_", "where", "sub"})


@dataclass(frozen=True, eq=False)
class Explicit:
    """A written-out attention call. Axes as in `Operand`; `oddity` as in `Site`."""

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    q_axes: str
    k_axes: str
    v_axes: str
    out_axes: str
    scale: float
    dropout: float
    oddity: str | None


@dataclass(frozen=True, eq=False)
class _Product:
    """A product of two activations and the axes of its sides."""

    left: fx.Node
    right: fx.Node
    left_axes: str
    right_axes: str
    out_axes: str
    scale: float


def match_explicit(node: fx.Node) -> Explicit | None:
    """The attention whose last step, weights @ v, is `node`; None if it is something else."""
    if not _is_product(node):
        return None
    weights = _product_operands(node)
    if weights is None:
        return None
    softmax, dropout = _back_to_softmax(weights[0])
    if softmax is None:
        return None
    first, scale, oddity = _back_to_product(_argument(softmax, 0, "input"))
    if first is None:
        return None
    scores = _scores(first)
    final = _final(node)
    if scores is None or final is None:
        return None
    if not _over_keys(softmax, scores.out_axes):
        return None
    return Explicit(
        node,
        scores.left,
        scores.right,
        weights[1],
        scores.left_axes,
        scores.right_axes,
        final[0],
        final[1],
        scale * scores.scale,
        dropout,
        oddity,
    )


def _is_product(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and operation_name(node) in _PRODUCTS


def _product_operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    args = node.args[1:] if operation_name(node) == "einsum" else node.args
    args = (*args, *(node.kwargs[x] for x in ("input", "other", "mat2") if x in node.kwargs))
    if len(args) == 1 and isinstance(args[0], (tuple, list)):
        args = tuple(args[0])
    if len(args) == 2 and isinstance(args[0], fx.Node) and isinstance(args[1], fx.Node):
        return args[0], args[1]
    return None


def _argument(node: fx.Node, place: int, name: str) -> object:
    """An argument given by position or by name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


def _back_to_softmax(node: object) -> tuple[fx.Node | None, float]:
    """From the weights back over casts and dropout to the softmax."""
    dropout = 0.0
    while isinstance(node, fx.Node) and node.op in ("call_function", "call_method"):
        name = operation_name(node)
        if name in ("softmax", "_softmax"):
            return node, dropout
        if name == "dropout":
            p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
            training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
            dropout = float(p) if training and isinstance(p, (int, float)) else 0.0
        elif name not in _CASTS:
            return None, 0.0
        node = node.args[0] if node.args else node.kwargs.get("input")
    return None, 0.0


def _back_to_product(node: object) -> tuple[fx.Node | None, float, str | None]:
    """From the logits back over casts and scaling to the product; masks make it odd."""
    scale, oddity = 1.0, None
    while isinstance(node, fx.Node) and node.op in ("call_function", "call_method"):
        name = operation_name(node)
        if _is_product(node) or name == "baddbmm":
            return node, scale, oddity
        if name in ("mul", "mul_", "imul", "div", "truediv", "div_", "itruediv"):
            inner, factor = _constant_operand(node)
            if inner is None:
                return None, 1.0, None
            scale *= factor if name in ("mul", "mul_", "imul") else 1.0 / factor
            node = inner
            continue
        if name in _MASKS:
            oddity = f"{name} on the logits, a mask or bias"
            tensors = [a for a in node.args if isinstance(a, fx.Node)]
            node = next(iter(tensors[1:] if name == "where" else tensors), None)
            continue
        if name not in _CASTS:
            return None, 1.0, None
        node = _argument(node, 0, "input")
    return None, 1.0, None


def _constant_operand(node: fx.Node) -> tuple[fx.Node | None, float]:
    a, b = _argument(node, 0, "input"), _argument(node, 1, "other")
    if node.kwargs.get("rounding_mode") is not None:
        return None, 1.0
    if isinstance(a, fx.Node) and isinstance(b, (int, float)):
        return a, float(b)
    if isinstance(b, fx.Node) and isinstance(a, (int, float)) and "mul" in operation_name(node):
        return b, float(a)
    return None, 1.0


def _scores(node: fx.Node) -> _Product | None:
    """q @ k^T with the axes of both; the key side of the result is written m."""
    if operation_name(node) == "baddbmm":
        return _baddbmm_scores(node)
    operands = _product_operands(node)
    if operands is None:
        return None
    if operation_name(node) == "einsum":
        return _einsum_scores(node, *operands)
    rank = _rank(operands[0])
    batch = {4: "bh", 3: "b"}.get(rank)
    if batch is None or _rank(operands[1]) != rank:
        return None
    return _Product(*operands, batch + "nd", batch + "dn", batch + "nm", 1.0)


def _baddbmm_scores(node: fx.Node) -> _Product | None:
    named: dict[str, Any] = dict(zip(("input", "batch1", "batch2"), node.args, strict=False))
    named |= node.kwargs
    if named.get("beta", 1) != 0:
        return None
    left, right = named["batch1"], named["batch2"]
    alpha = named.get("alpha", 1)
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    if not isinstance(alpha, (int, float)):
        return None
    return _Product(left, right, "bnd", "bdn", "bnm", float(alpha))


def _einsum_scores(node: fx.Node, left: fx.Node, right: fx.Node) -> _Product | None:
    letters = _einsum_letters(node)
    if letters is None:
        return None
    a, b, out = letters
    contracted = [x for x in a if x in b and x not in out]
    rows = [x for x in a if x in out and x not in b]
    columns = [x for x in b if x in out and x not in a]
    shared = [x for x in out if x in a and x in b]
    if not (len(contracted) == len(rows) == len(columns) == 1 and len(shared) in (1, 2)):
        return None
    name = dict(zip(shared, "bh", strict=False))
    if len(shared) == 2 and out.index(shared[0]) > out.index(shared[1]):
        return None
    q_axes = "".join({**name, rows[0]: "n", contracted[0]: "d"}[x] for x in a)
    k_axes = "".join({**name, columns[0]: "n", contracted[0]: "d"}[x] for x in b)
    out_axes = "".join({**name, rows[0]: "n", columns[0]: "m"}[x] for x in out)
    return _Product(left, right, q_axes, k_axes, out_axes, 1.0)


def _final(node: fx.Node) -> tuple[str, str] | None:
    """(axes of v, axes of the output) of weights @ v."""
    operands = _product_operands(node)
    if operands is None:
        return None
    if operation_name(node) != "einsum":
        batch = {4: "bh", 3: "b"}.get(_rank(operands[1]))
        return None if batch is None else (batch + "nd", batch + "nd")
    letters = _einsum_letters(node)
    if letters is None:
        return None
    weights, values, out = letters
    contracted = [x for x in weights if x in values and x not in out]
    rows = [x for x in weights if x in out and x not in values]
    features = [x for x in values if x in out and x not in weights]
    shared = [x for x in weights if x in values and x in out]
    if not (len(contracted) == len(rows) == len(features) == 1 and len(shared) in (1, 2)):
        return None
    if not weights.endswith(rows[0] + contracted[0]):  # summed over the queries
        return None
    name = dict(zip(shared, "bh", strict=False))
    v_axes = "".join({**name, contracted[0]: "n", features[0]: "d"}[x] for x in values)
    out_axes = "".join({**name, rows[0]: "n", features[0]: "d"}[x] for x in out)
    return v_axes, out_axes


def _einsum_letters(node: fx.Node) -> tuple[str, str, str] | None:
    equation = node.args[0]
    if not isinstance(equation, str) or "..." in equation or "->" not in equation:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    sides = inputs.split(",")
    return (sides[0], sides[1], out) if len(sides) == 2 else None


def _over_keys(softmax: fx.Node, axes: str) -> bool:
    dim = softmax.kwargs.get("dim", softmax.args[1] if len(softmax.args) > 1 else None)
    return isinstance(dim, int) and axes[dim] == "m" and axes.endswith("nm")


def _rank(node: fx.Node) -> int:
    value = node.meta.get("example_value")
    return value.dim() if isinstance(value, torch.Tensor) else 0
