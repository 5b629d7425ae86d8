"""Integers among the arguments of a graph's operations: numbers, sizes, small integer tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from .sizes import Size, example, example_tensor, expression
from .truth import Unproven

_MOST = 1 << 9
"""Elements of the largest tensor that is followed."""


def node_of(arg: object) -> fx.Node:
    """An argument that is a node. Raises Unproven."""
    if not isinstance(arg, fx.Node):
        raise Unproven("an operation of an unknown form")
    return arg


def is_unit(size: object) -> bool:
    """Whether a side has one element in every call of the graph."""
    return isinstance(size, (int, torch.SymInt)) and _fixed(size) == 1


def count_of(shape: Sequence[int]) -> int:
    """The number of elements of a tensor."""
    return int(torch.Size(shape).numel())


def plain(arg: Any) -> Any:
    """An argument without tensors, as it is in every call of the graph. Raises Unproven."""
    if isinstance(arg, fx.Node):
        value = example(arg)
        fixed = _fixed(value) if isinstance(value, (int, torch.SymInt)) else None
        if fixed is None:
            raise Unproven("a size that changes, or a place that is computed")
        return fixed
    if isinstance(arg, (tuple, list)):
        return type(arg)(plain(x) for x in arg)
    if isinstance(arg, slice):
        return slice(plain(arg.start), plain(arg.stop), plain(arg.step))
    return arg


def small_shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of a small integer tensor. Raises Unproven for any other."""
    tensor = example_tensor(node)
    if tensor is None or tensor.dtype not in (torch.int32, torch.int64):
        raise Unproven(f"{node.name} is not an integer tensor")
    shape = tuple(side for side in map(_fixed, tensor.shape) if side is not None)
    if len(shape) != tensor.dim() or count_of(shape) > _MOST:
        raise Unproven(f"{node.name} has no fixed number of elements, or many")
    return shape


def _fixed(size: Size) -> int | None:
    """A size that is the same in every call: guards may have fixed what was a symbol."""
    value = expression(size)
    return int(value) if value.is_Integer else None


def number(value: object) -> sympy.Expr:
    """An integer or a size of the graph as an expression. Raises Unproven."""
    if isinstance(value, fx.Node):
        value = example(value)
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise Unproven("a number that is not an integer")
    return expression(value)


def flat_numbers(value: object) -> list[sympy.Expr]:
    """The integers of nested lists, in order. Raises Unproven."""
    if isinstance(value, (tuple, list)):
        return [number for part in value for number in flat_numbers(part)]
    return [number(value)]
