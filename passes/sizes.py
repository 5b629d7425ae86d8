"""Sizes of a traced graph: plain integers or symbols, read without adding guards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeAlias

import sympy
import torch
from torch import fx

Size: TypeAlias = int | torch.SymInt


@dataclass(frozen=True, eq=False)
class SizeOf:
    """One side of a tensor of the graph. size: its recorded value, symbolic where dynamic."""

    node: fx.Node
    dim: int
    size: Size


Length = SizeOf | int
"""A size to be put into the graph: a side of a tensor, or a constant."""

UNBACKED_HINT = 8
"""Assumed for a number that only the data will tell; never used as the size itself."""


_supposed: ContextVar[Mapping[sympy.Symbol, int] | None] = ContextVar("supposed", default=None)


@contextmanager
def supposing(values: Mapping[sympy.Symbol, int]) -> Iterator[None]:
    """Sizes as they are in another call of the graph than the one it was traced with."""
    token = _supposed.set(values)
    try:
        yield
    finally:
        _supposed.reset(token)


def hint(size: Size) -> int:
    """The value `size` has for this trace. Asking it directly would add a guard."""
    if isinstance(size, torch.SymInt):
        supposed = _supposed.get()
        if supposed is not None:
            return _assumed(size, supposed)
        value = size.node.hint
        return _assumed(size) if value is None else int(value)
    return int(size)


def _assumed(size: torch.SymInt, supposed: Mapping[sympy.Symbol, int] | None = None) -> int:
    """The value of a size with `UNBACKED_HINT` for what is unknown, so that products agree."""
    env = size.node.shape_env
    known = getattr(env, "backed_var_to_val", None)  # named var_to_val before torch 2.12
    known = env.var_to_val if known is None else known
    told = {} if supposed is None else supposed
    symbols = size.node.expr.free_symbols
    values = {s: told.get(s, known.get(s, UNBACKED_HINT)) for s in symbols}
    return int(size.node.expr.xreplace(values))


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


def expressions(node: fx.Node, shape: tuple[int, ...]) -> tuple[sympy.Expr, ...]:
    """The sides of the tensor a node holds; those of `shape` where tracing recorded none."""
    tensor = example_tensor(node)
    return tuple(expression(side) for side in (shape if tensor is None else tensor.shape))
