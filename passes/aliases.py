"""Aliases: which tensors of a graph share memory, and how a write to one is seen by the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from .codes import Tracked, reduce_dims, reshape_codes
from .indexing import assign
from .memory import memory_of
from .sizes import example


class Aliases:
    """The views of a graph, met in execution order."""

    def __init__(self) -> None:
        self._bases: dict[fx.Node, fx.Node] = {}
        self._families: dict[int, list[fx.Node]] = {}

    def note(self, node: fx.Node) -> None:
        """Enter a node that was just computed."""
        memory = _memory(node)
        if memory is None:
            return
        family = self._families.setdefault(memory, [])
        family.append(node)
        subject = next((arg for arg in _first_nodes(node) if _memory(arg) == memory), None)
        if subject is not None:
            self._bases[node] = subject

    def note_same(self, inner: fx.Node, outer: fx.Node) -> None:
        """Enter a nested graph's input: it is the caller's tensor."""
        family = self.family(outer)
        family.append(inner)
        self._bases[inner] = outer
        memory = _memory(inner)
        if memory is not None:
            self._families[memory] = family

    def family(self, node: fx.Node) -> list[fx.Node]:
        """Every node met so far that holds the same memory, in execution order."""
        memory = _memory(node)
        return [node] if memory is None else self._families.setdefault(memory, [node])

    def base(self, node: fx.Node) -> fx.Node | None:
        """The tensor that a node is a view of, or writes to."""
        return self._bases.get(node)

    def shares(self, node: fx.Node, other: object) -> bool:
        """Whether two nodes hold the same memory."""
        return isinstance(other, fx.Node) and _memory(node) == _memory(other) is not None


def _first_nodes(node: fx.Node) -> list[fx.Node]:
    return [arg for arg in node.args if isinstance(arg, fx.Node)]


def _memory(node: fx.Node) -> int | None:
    """What tells one piece of memory from another while the graph is traced."""
    value = example(node)
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    if not isinstance(value, torch.Tensor):
        return None
    return memory_of(value)


def undo_view(name: str, base: Any, args: Sequence[Any], kwargs: Any, view: Tracked) -> Any:
    """What `base` holds once its view holds `view`.

    name, args, kwargs: how the view was made of the base. Raises NotImplementedError for a view
    that cannot be written through.
    """
    same = name in _SAME or name.endswith("_")
    if same and isinstance(base, Tracked) and base.shape == view.shape:
        return Tracked(view.shape, view.codes)
    rule = _UNDO.get(name)
    if rule is None:
        raise NotImplementedError(f"a write through {name}")
    return rule(base, view, *args, **kwargs)


_SAME = frozenset(
    """contiguous to type detach alias data requires_grad iadd isub imul itruediv ifloordiv imod
    ipow iand ior ixor float double half bfloat16 cpu cuda dropout relu silu gelu""".split()
)
"""Operations that return their operand itself, where they share its memory."""


def _reshape(base: Tracked, view: Tracked, *_: Any, **__: Any) -> Tracked:
    return view.map(base.shape, lambda c: reshape_codes(c, view.shape, base.shape))


def _permute(base: Tracked, view: Tracked, *dims: Any, **kw: Any) -> Tracked:
    order = kw.get("dims", dims[0] if dims and isinstance(dims[0], (tuple, list)) else dims)
    back = [0] * base.rank
    for place, d in enumerate(order):
        back[d % base.rank] = place
    return view.map(base.shape, lambda c: c.permute(back))


def _transpose(base: Tracked, view: Tracked, dim0: int, dim1: int) -> Tracked:
    return view.map(base.shape, lambda c: c.transpose(dim0, dim1))


def _t(base: Tracked, view: Tracked) -> Tracked:
    return view.map(base.shape, lambda c: c.transpose(-1, -2) if c.dim() > 1 else c)


def _movedim(base: Tracked, view: Tracked, source: Any, destination: Any) -> Tracked:
    return view.map(base.shape, lambda c: c.movedim(destination, source))


def _getitem(base: Any, view: Tracked, index: Any) -> Any:
    if isinstance(base, list):
        return [view if place == index % len(base) else part for place, part in enumerate(base)]
    return assign(base, index, view)


def _select(base: Tracked, view: Tracked, dim: int, index: int) -> Tracked:
    return assign(base, (*[slice(None)] * (dim % base.rank), index), view)


def _narrow(base: Tracked, view: Tracked, dim: int, start: int, length: int) -> Tracked:
    start %= base.shape[dim]
    return assign(base, (*[slice(None)] * (dim % base.rank), slice(start, start + length)), view)


def _split(base: Tracked, view: list[Tracked], *args: Any, **kw: Any) -> Tracked:
    dim = kw.get("dim", args[1] if len(args) > 1 else 0) % base.rank
    start = 0
    for part in view:
        base = _narrow(base, part, dim, start, part.shape[dim])
        start += part.shape[dim]
    return base


def _unbind(base: Tracked, view: list[Tracked], dim: int = 0) -> Tracked:
    for place, part in enumerate(view):
        base = _select(base, part, dim, place)
    return base


def _view_as_complex(base: Tracked, view: Tracked) -> Tracked:
    return view.map(base.shape, lambda c: c.unsqueeze(-1))


def _view_as_real(base: Tracked, view: Tracked) -> Tracked:
    return view.map(base.shape, lambda c: reduce_dims(c, [c.dim() - 1]).squeeze(-1))


_UNDO: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(
        """view reshape flatten unflatten squeeze unsqueeze view_as reshape_as ravel""".split(),
        _reshape,
    ),
    "permute": _permute,
    **dict.fromkeys(["transpose", "swapaxes", "swapdims"], _transpose),
    **dict.fromkeys(["t", "T", "mT"], _t),
    **dict.fromkeys(["movedim", "moveaxis"], _movedim),
    "getitem": _getitem,
    "select": _select,
    "narrow": _narrow,
    **dict.fromkeys(["split", "split_with_sizes", "chunk", "tensor_split"], _split),
    "unbind": _unbind,
    "view_as_complex": _view_as_complex,
    "view_as_real": _view_as_real,
}
"""Views by the name of the function or method: the base's codes from the view's."""
