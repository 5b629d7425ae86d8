"""In-place writes: what changes a tensor between two nodes of a graph.

Tensors that share memory are told by the storage of the values recorded in tracing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from .memory import memory_of
from .operations import is_in_place, operation_name, written_operands
from .sizes import example_tensor


@dataclass(frozen=True, eq=False)
class Write:
    """A node that changes one of its arguments. `order`: its place in the graph."""

    node: fx.Node
    order: int


class Writes:
    """The in-place writes of one graph, by the memory they change."""

    def __init__(self, graph: fx.Graph) -> None:
        self.order = {node: place for place, node in enumerate(graph.nodes)}
        self._by_storage: dict[int, list[Write]] = {}
        for node, place in self.order.items():
            for target in _written(node):
                tensor = example_tensor(target)
                if tensor is not None:
                    key = _storage(tensor)
                    self._by_storage.setdefault(key, []).append(Write(node, place))

    def between(self, node: fx.Node, first: int, last: int) -> list[Write]:
        """The writes to the memory of `node` whose order is in [first, last), in order."""
        tensor = example_tensor(node)
        if tensor is None:
            return []
        found = self._by_storage.get(_storage(tensor), [])
        return [write for write in found if first <= write.order < last]


def shares_memory(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes hold views of one tensor, or the very same one."""
    x, y = example_tensor(a), example_tensor(b)
    return x is not None and y is not None and _storage(x) == _storage(y)


def _written(node: fx.Node) -> list[fx.Node]:
    """The operands a node writes to."""
    if node.op not in ("call_function", "call_method"):
        return []
    name = operation_name(node)
    found = list(written_operands(node))
    if name == "setitem" or is_in_place(name) or node.kwargs.get("inplace"):
        found += [arg for arg in node.args[:1] if isinstance(arg, fx.Node)]
    return list(dict.fromkeys(found))


def _storage(tensor: torch.Tensor) -> int:
    memory = memory_of(tensor)
    return id(tensor) if memory is None else memory
