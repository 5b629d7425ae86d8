"""Sizes of a traced graph: plain integers or symbols, read without adding guards."""

from __future__ import annotations

from typing import TypeAlias

import sympy
import torch
from torch import fx

Size: TypeAlias = int | torch.SymInt

UNBACKED_HINT = 8
"""Assumed for a number that only the data will tell; never used as the size itself."""


def hint(size: Size) -> int:
    """The value `size` has for this trace. Asking it directly would add a guard."""
    if isinstance(size, torch.SymInt):
        value = size.node.hint
        return _assumed(size) if value is None else int(value)
    return int(size)


def _assumed(size: torch.SymInt) -> int:
    """The value of a size with `UNBACKED_HINT` for what is unknown, so that products agree."""
    env = size.node.shape_env
    known = getattr(env, "backed_var_to_val", None)  # named var_to_val before torch 2.12
    known = env.var_to_val if known is None else known
    symbols = size.node.expr.free_symbols
    return int(size.node.expr.xreplace({s: known.get(s, UNBACKED_HINT) for s in symbols}))


def expression(size: Size) -> sympy.Expr:
    """`size` as a sympy expression."""
    if isinstance(size, torch.SymInt):
        return size.node.expr
    return sympy.Integer(size)


def equal(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether two size expressions are provably the same."""
    return bool(sympy.simplify(a - b) == 0)


def example(node: fx.Node) -> object:
    """What tracing recorded as the node's value: a fake tensor, a size, or a tuple of them."""
    return node.meta.get("example_value")


def example_tensor(node: object) -> torch.Tensor | None:
    """The fake tensor of a node that holds one tensor, else None."""
    if isinstance(node, fx.Node):
        value = example(node)
        if isinstance(value, torch.Tensor):
            return value
    return None


def shape_hints(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape with symbols replaced by their hints."""
    return tuple(hint(side) for side in tensor.shape)
