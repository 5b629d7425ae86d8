"""What the sides of a tensor are in a mask, followed back through views and broadcasting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .sizes import Size, equal, example_tensor, expression
from .truth import Unproven

Roles = tuple[str, ...]
"""Per side "b" batch, "h" heads, "q" queries, "k" keys, or "" where the side has size 1."""


def _unit(size: Size) -> bool:
    return isinstance(size, int) and size == 1


def _same(a: Size, b: Size) -> bool:
    return equal(expression(a), expression(b))


def before_broadcast(node: object, out: torch.Tensor, roles: Roles) -> Roles:
    """The roles of a tensor's sides where it is broadcast to `out`."""
    tensor = example_tensor(node)
    if tensor is None:
        raise Unproven("a number that is computed")
    inner = []
    for place in range(tensor.dim()):
        side = place + out.dim() - tensor.dim()
        if side < 0:
            raise Unproven("a tensor of more sides than its result")
        if _unit(tensor.shape[place]):
            inner.append("")
        elif _same(tensor.shape[place], out.shape[side]):
            inner.append(roles[side])
        else:
            raise Unproven("a repeated tensor")
    return tuple(inner)


def before_reshape(source: torch.Tensor, out: torch.Tensor, roles: Roles) -> Roles:
    """The roles before a reshape that only adds and removes sides of size 1."""
    wide = [(size, role) for size, role in zip(out.shape, roles, strict=True) if not _unit(size)]
    before = [size for size in source.shape if not _unit(size)]
    if len(wide) != len(before) or not all(
        _same(a, b) for a, (b, _) in zip(before, wide, strict=True)
    ):
        raise Unproven("a reshaped tensor")
    left = iter(role for _, role in wide)
    return tuple("" if _unit(size) else next(left) for size in source.shape)


def before_index(index: object, source: torch.Tensor, roles: Roles) -> Roles:
    """The roles before indexing that keeps every element."""
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    if Ellipsis in items:
        at = items.index(Ellipsis)
        used = sum(1 for item in items if item is not None and item is not Ellipsis)
        items[at : at + 1] = [slice(None)] * (source.dim() - used)
    inner: list[str] = []
    places = iter(roles)
    for item in items:
        if item is None:
            next(places)
        elif item == slice(None):
            inner.append(next(places))
        elif type(item) is int and item == 0 and _unit(source.shape[len(inner)]):
            inner.append("")
        else:
            raise Unproven("a part of a tensor")
    return (*inner, *places)


def before_permute(name: str, args: Sequence[Any], kwargs: Any, roles: Roles) -> Roles:
    """The roles before permute, transpose, .mT, .T and .t()."""
    count = len(roles)
    order = list(range(count))
    if name == "permute":
        dims = kwargs.get("dims", args[0] if args and isinstance(args[0], (tuple, list)) else args)
        order = [dim % count for dim in dims]
    else:
        given = [*args, *kwargs.values()] if name in ("transpose", "swapaxes") else [-1, -2]
        if count < 2 or (name == "T" and count != 2):
            raise Unproven(f"{name} is not followed")
        a, b = (int(dim) % count for dim in given)
        order[a], order[b] = b, a
    inner = [""] * count
    for place, dim in enumerate(order):
        inner[dim] = roles[place]
    return tuple(inner)


def same_view(target: fx.Node, node: fx.Node) -> bool:
    """Whether two nodes that share memory show it alike."""
    x, y = example_tensor(target), example_tensor(node)
    return (
        x is not None
        and y is not None
        and x.dtype == y.dtype
        and x.dim() == y.dim()
        and all(_same(a, b) for a, b in zip(x.shape, y.shape, strict=True))
        and all(_same(a, b) for a, b in zip(x.stride(), y.stride(), strict=True))
        and _same(x.storage_offset(), y.storage_offset())
    )
