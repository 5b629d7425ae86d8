"""Logits: what happens between the product q @ k^T and the softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import fx

from .compute import is_elementwise
from .logit_mask import LogitMask
from .operations import operation_name
from .products import Product, find_product
from .sizes import equal, expression

CASTS = frozenset(
    "to float half bfloat16 double type type_as contiguous clone detach identity".split()
)
_SCALES = {"mul": 1, "mul_": 1, "imul": 1, "div": -1, "div_": -1, "truediv": -1, "itruediv": -1}
_SUMS = frozenset({"add", "add_", "iadd"})
_DIFFERENCES = frozenset({"sub", "sub_", "isub"})
_RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze"})
_CONSTANTS = {"tensor": 0, "scalar_tensor": 0, "full": 1, "full_like": 1, "new_full": 2}


@dataclass(frozen=True, eq=False)
class Logits:
    """scale: constant factor on the product. masks: roles are not known yet. oddity: what else
    happens, or None. rank: sides of the logits. reshaped: the product had others. shifted: sides,
    counted from the last, along which a maximum was taken and subtracted."""

    product: Product
    rank: int
    scale: float = 1.0
    masks: tuple[LogitMask, ...] = ()
    oddity: str | None = None
    reshaped: bool = False
    shifted: tuple[int, ...] = ()


def argument(node: fx.Node, place: int, name: str, default: object = None) -> object:
    """An argument given by position or by name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def back_to_product(node: object) -> Logits | None:
    """From logits back to the product they come from; None if they come from none."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return None
    product = find_product(node)
    if product is not None:
        masks = () if product.added is None else (LogitMask(product.added, (), None),)
        return Logits(product, len(product.out_axes), masks=masks)
    name = operation_name(node)
    if name in CASTS:
        return _cast(node)
    if name in _SCALES:
        return _scaled(node, _SCALES[name])
    if name in _SUMS:
        return _added(node)
    if name in _DIFFERENCES:
        return _subtracted(node)
    if name in ("masked_fill", "masked_fill_"):
        return _filled(
            argument(node, 0, "input"), argument(node, 1, "mask"), argument(node, 2, "value"), False
        )
    if name == "where":
        condition, *_ = node.args or (node.kwargs.get("condition"),)
        shown, other = argument(node, 1, "input"), argument(node, 2, "other")
        return _filled(shown, condition, other, True) or _filled(other, condition, shown, False)
    if keeps_rows_and_columns(node):
        found = back_to_product(argument(node, 0, "input"))
        if found is None:
            return None
        value = node.meta["example_value"]
        oddity = "masked logits are reshaped" if found.masks else found.oddity
        return replace(found, reshaped=True, rank=value.dim(), oddity=oddity)
    if is_elementwise(name):
        return _odd(argument(node, 0, "input"), f"the logits pass through {name}")
    return None


def _cast(node: fx.Node) -> Logits | None:
    found = back_to_product(argument(node, 0, "input"))
    value = node.meta.get("example_value")
    half = isinstance(value, torch.Tensor) and value.dtype == torch.float16
    if found is not None and half and any(mask.hides != -math.inf for mask in found.masks):
        return replace(found, oddity="masked logits are cast to float16")
    return found


def keeps_rows_and_columns(node: fx.Node) -> bool:
    """Whether a node only reshapes sides before the last two."""
    if operation_name(node) not in _RESHAPES:
        return False
    subject = argument(node, 0, "input")
    before = subject.meta.get("example_value") if isinstance(subject, fx.Node) else None
    after = node.meta.get("example_value")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return (
        min(before.dim(), after.dim()) >= 3
        and equal(expression(before.shape[-1]), expression(after.shape[-1]))
        and equal(expression(before.shape[-2]), expression(after.shape[-2]))
    )


def _odd(node: object, oddity: str) -> Logits | None:
    found = back_to_product(node)
    return None if found is None else replace(found, oddity=oddity)


def _scaled(node: fx.Node, power: int) -> Logits | None:
    a, b = argument(node, 0, "input"), argument(node, 1, "other")
    if node.kwargs.get("rounding_mode") is not None:
        return _odd(a, "the logits are rounded")
    if isinstance(a, (int, float)) and power == 1:
        a, b = b, a
    if not isinstance(b, (int, float)) or not b > 0:
        return _odd(a, "the logits are scaled by a tensor") or (
            _odd(b, "the logits are scaled by a tensor") if power == 1 else None
        )
    factor = float(b) ** power
    found = back_to_product(a)
    if found is None:
        return None
    masks = tuple(
        replace(mask, factor=mask.factor * factor)
        if mask.hides is None
        else replace(mask, hides=mask.hides * factor)
        for mask in found.masks
    )
    return replace(found, scale=found.scale * factor, masks=masks)


def _added(node: fx.Node) -> Logits | None:
    a, b = argument(node, 0, "input"), argument(node, 1, "other")
    found, other = back_to_product(a), b
    if found is None:
        found, other = back_to_product(b), a
    if found is None:
        return None
    if argument(node, 2, "alpha", 1) != 1:
        return replace(found, oddity="the logits are a weighted sum")
    if isinstance(other, (int, float)):
        return found  # one number for all keys changes no weight
    if not isinstance(other, fx.Node):
        return replace(found, oddity="something is added to the logits")
    return replace(found, masks=(*found.masks, LogitMask(other, (), None)))


def _subtracted(node: fx.Node) -> Logits | None:
    """Subtracting a row's maximum, or a number, changes no weight."""
    found = back_to_product(argument(node, 0, "input"))
    other = argument(node, 1, "other")
    if found is None or isinstance(other, (int, float)):
        return found
    side = _side_of_maximum(other)
    if side is None:
        return replace(found, oddity="a tensor is subtracted from the logits")
    return replace(found, shifted=(*found.shifted, side))


def _side_of_maximum(node: object) -> int | None:
    """The side, counted from the last, along which a node holds one number: a largest value."""
    while isinstance(node, fx.Node) and node.op in ("call_function", "call_method"):
        name = operation_name(node)
        if name in ("amax", "max"):
            dim, value = argument(node, 1, "dim"), node.meta.get("example_value")
            if isinstance(dim, (tuple, list)) and len(dim) == 1:
                dim = dim[0]
            largest = value[0] if isinstance(value, (tuple, list)) else value
            if not isinstance(dim, int) or not isinstance(largest, torch.Tensor):
                return None
            keep = argument(node, 2, "keepdim", False) is True
            return dim % largest.dim() - largest.dim() if keep else None
        if name not in CASTS and name not in ("getitem", "getattr"):
            return None
        node = argument(node, 0, "input")
    return None


def _filled(node: object, mask: object, value: object, shown_where: bool) -> Logits | None:
    found = back_to_product(node)
    if found is None or not isinstance(mask, fx.Node):
        return None
    number = _number(value)
    if number is None:
        return replace(found, oddity="masked logits get values that are computed")
    return replace(found, masks=(*found.masks, LogitMask(mask, (), number, shown_where)))


def _number(value: object) -> float | None:
    """A constant, as it is or as a tensor that was made of one."""
    if isinstance(value, fx.Node) and value.op == "call_function":
        place = _CONSTANTS.get(operation_name(value))
        if place is not None:
            value = argument(value, place, "fill_value")
    if isinstance(value, (int, float)) and not math.isnan(value):
        return float(value)
    return None
