"""Matrix products of two tensors, and what their sides are: matmul, bmm, baddbmm, einsum, `@`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .operations import operation_name

_MATMULS = frozenset({"matmul", "bmm", "__matmul__"})


@dataclass(frozen=True, eq=False)
class Product:
    """A product of two tensors. Sides: "b" batch, "h" heads, "n" rows, "m" columns, "d" summed.

    scale: a constant factor. added: a tensor that is added to the product, or None.
    """

    left: fx.Node
    right: fx.Node
    left_axes: str
    right_axes: str
    out_axes: str
    scale: float = 1.0
    added: fx.Node | None = None


def find_product(node: fx.Node) -> Product | None:
    """`node` as a batched product of matrices of one batch, or None if it is something else."""
    if node.op not in ("call_function", "call_method"):
        return None
    name = operation_name(node)
    if name == "einsum":
        return _einsum(node)
    if name == "baddbmm":
        return _baddbmm(node)
    if name not in _MATMULS:
        return None
    operands = _nodes(_given(node, ("input", "other" if name != "bmm" else "mat2")))
    if operands is None:
        return None
    rank = _rank(operands[0])
    batch = {4: "bh", 3: "b"}.get(rank)
    if batch is None or _rank(operands[1]) != rank:
        return None
    return Product(*operands, batch + "nd", batch + "dm", batch + "nm")


def _given(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def _nodes(given: dict[str, Any]) -> tuple[fx.Node, fx.Node] | None:
    found = [x for x in given.values() if isinstance(x, fx.Node)]
    return (found[0], found[1]) if len(found) == 2 else None


def _baddbmm(node: fx.Node) -> Product | None:
    given = _given(node, ("input", "batch1", "batch2"))
    left, right, added = given["batch1"], given["batch2"], given["input"]
    alpha, beta = given.get("alpha", 1), given.get("beta", 1)
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    if not isinstance(alpha, (int, float)) or beta not in (0, 1):
        return None
    bias = added if beta and isinstance(added, fx.Node) else None
    return Product(left, right, "bnd", "bdm", "bnm", float(alpha), bias)


def _einsum(node: fx.Node) -> Product | None:
    """Letters that both operands and the result share are the batch, then the heads."""
    operands = node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if len(operands) != 2:
        return None
    left, right = operands
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    letters = _letters(node.args[0], _rank(left), _rank(right))
    if letters is None:
        return None
    a, b, out = letters
    summed = [x for x in a if x in b and x not in out]
    rows = [x for x in a if x in out and x not in b]
    columns = [x for x in b if x in out and x not in a]
    shared = [x for x in out if x in a and x in b]
    if not (len(summed) == len(rows) == len(columns) == 1 and len(shared) in (1, 2)):
        return None
    if not len(set(a)) == len(a) == len(shared) + 2 or not len(set(b)) == len(b) == len(a):
        return None
    name = dict(zip(shared, "bh", strict=False))
    name |= {rows[0]: "n", columns[0]: "m", summed[0]: "d"}
    left_axes, right_axes, out_axes = ("".join(name[x] for x in side) for side in (a, b, out))
    return Product(left, right, left_axes, right_axes, out_axes)


def _letters(equation: object, left: int, right: int) -> tuple[str, str, str] | None:
    """The letters of both operands and of the result, "..." written out."""
    if not isinstance(equation, str) or "->" not in equation:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    sides = inputs.split(",")
    if len(sides) != 2:
        return None
    a, b = sides
    if "..." in equation:
        extra = "XYZ"[: max(left - len(a.replace("...", "")), 0)]
        if len(extra) != max(right - len(b.replace("...", "")), 0) or set(extra) & set(equation):
            return None
        a, b, out = (side.replace("...", extra) for side in (a, b, out))
    return (a, b, out) if len(a) == left and len(b) == right else None


def _rank(node: fx.Node) -> int:
    value = node.meta.get("example_value")
    return value.dim() if isinstance(value, torch.Tensor) else 0
