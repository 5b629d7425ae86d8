"""Small integer tensors as expressions: offsets of segments, computed in the graph.

An element is a polynomial of the graph's sizes and of counts, sums over a tensor whose values are
never looked at. A tensor is kept as places in a list of expressions, so that whatever rearranges
elements is carried out on the places. In-place writes are followed in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from .integers import count_of, flat_numbers, is_unit, node_of, number, plain, small_shape
from .operations import is_in_place, operation_name
from .sizes import Length, SizeOf, example, example_tensor
from .truth import Unproven
from .writes import Write, Writes, shares_memory

_CASTS = frozenset("to int long type type_as contiguous clone detach cpu cuda alias".split())
_CREATED = {"zeros": 0, "zeros_like": 0, "new_zeros": 0, "ones": 1, "ones_like": 1, "new_ones": 1}
_FILLED = {"full": 1, "full_like": 1, "new_full": 2}
_GIVEN = frozenset({"tensor", "as_tensor", "scalar_tensor"})
_MOVES = frozenset(
    """getitem view reshape flatten unflatten squeeze unsqueeze expand broadcast_to repeat
    repeat_interleave cat concat stack hstack vstack flip roll t transpose permute select narrow
    unbind split chunk ravel""".split()
)
_ARITHMETIC: dict[str, Callable[..., sympy.Expr]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "rsub": lambda a, b: b - a, "neg": lambda a: -a, "negative": lambda a: -a,
}  # fmt: skip
_IN_PLACE = {"iadd": "add", "isub": "sub", "imul": "mul"}


@dataclass(frozen=True, eq=False)
class Count:
    """One element of a sum over a tensor.

    symbol: what stands for it. most: how many elements were summed. sure: they are all 0 or 1;
    otherwise the sum may be anything.
    """

    symbol: sympy.Symbol
    most: Length
    sure: bool


class Offsets:
    """The small integer tensors of one graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self.counts: dict[sympy.Symbol, Count] = {}
        self._graph = graph
        self._pool: list[sympy.Expr] = []
        self._sums: dict[object, torch.Tensor] = {}
        self._known: dict[tuple[fx.Node, int], torch.Tensor] = {}

    @cached_property
    def writes(self) -> Writes:
        """The in-place writes of the graph."""
        return Writes(self._graph)

    def values(self, node: fx.Node, reader: fx.Node) -> list[sympy.Expr]:
        """The elements of a vector when `reader` runs. Raises Unproven."""
        places = self._at(node, self.writes.order[reader])
        if places.dim() != 1:
            raise Unproven(f"{node.name} is not a vector")
        return [self._pool[place] for place in places.tolist()]

    def _at(self, node: fx.Node, moment: int) -> torch.Tensor:
        key = (node, moment)
        if key not in self._known:
            try:
                self._known[key] = self._followed(node, moment)
            except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
                raise Unproven(f"{operation_name(node)} is not followed") from error
        return self._known[key]

    def _followed(self, node: fx.Node, moment: int) -> torch.Tensor:
        """Places of the elements of `node` when `moment` is reached."""
        found: torch.Tensor
        shape = small_shape(node)
        if node.op not in ("call_function", "call_method"):
            raise Unproven(f"they come from outside the graph ({node.name})")
        made = self.writes.order[node]
        subject = node.args[0] if node.args else None
        if isinstance(subject, fx.Node) and shares_memory(node, subject):
            # a view, or the result of an in-place operation: it shows what its subject holds by now
            in_place = is_in_place(operation_name(node))
            found = self._at(subject, moment) if in_place else self._made(node, moment)
        else:
            found = self._made(node, made)
            for write in self.writes.between(node, made, moment):
                found = self._written(found, node, write)
        if tuple(found.shape) != shape:
            raise Unproven(f"{operation_name(node)} is not followed")
        return found

    def _made(self, node: fx.Node, moment: int) -> Any:
        """Places of the elements an operation returns, or a list of such tensors."""
        name = operation_name(node)
        if name in _MOVES:
            return self._moved(node, name, moment)
        shape = small_shape(node)
        if name in _CREATED:
            return self._filled(shape, sympy.Integer(_CREATED[name]))
        if name in _FILLED:
            place = _FILLED[name]
            value = node.args[place] if len(node.args) > place else node.kwargs.get("fill_value")
            return self._filled(shape, number(value))
        if name in _GIVEN:
            return self._noted(flat_numbers(node.args[0]), shape)
        if name == "arange":
            return self._counted(node, shape)
        if name in ("sum", "count_nonzero"):
            return self._summed(node, name, shape)
        if name in _CASTS:
            return self._operand(node.args[0], moment)
        if name == "cumsum":
            return self._cumulated(node, moment)
        if name in _ARITHMETIC or name in _IN_PLACE:
            if node.kwargs:
                raise Unproven(f"{name} with {', '.join(node.kwargs)}")
            return self._computed(_IN_PLACE.get(name, name), node.args, moment)
        if name == "pad":
            return self._padded(node, moment)
        raise Unproven(f"{name} is not followed")

    def _operand(self, arg: object, moment: int) -> torch.Tensor:
        """Places of a tensor or of a number."""
        if isinstance(arg, fx.Node) and not isinstance(example(arg), (int, torch.SymInt)):
            return self._at(arg, moment)
        return self._filled((), number(arg))

    def _moved(self, node: fx.Node, name: str, moment: int) -> Any:
        """Places after an operation that rearranges its first operand, a tensor or several."""
        subject = self._subject(node.args[0], moment)
        args = [plain(arg) for arg in node.args[1:]]
        kwargs = {key: plain(arg) for key, arg in node.kwargs.items()}
        if node.op == "call_method":
            return getattr(subject, name)(*args, **kwargs)
        assert callable(node.target)
        return node.target(subject, *args, **kwargs)

    def _subject(self, arg: object, moment: int) -> Any:
        if isinstance(arg, (tuple, list)):
            return [self._subject(part, moment) for part in arg]
        node = node_of(arg)
        if isinstance(example(node), (tuple, list)):
            return self._made(node, moment)
        return self._at(node, moment)

    def _written(self, held: torch.Tensor, node: fx.Node, write: Write) -> torch.Tensor:
        """`held`, the elements of `node`, after a write to it by that name."""
        target, *rest = write.node.args
        name = operation_name(write.node)
        if target is not node or write.node.kwargs:
            raise Unproven(f"a write through a view, {write.node.name}")
        if name == "setitem":
            held = held.clone()
            held[plain(rest[0])] = self._operand(rest[1], write.order)
            return held
        if name in ("copy_", "fill_", "zero_"):
            value = self._operand(rest[0] if rest else 0, write.order)
            return value.expand_as(held).clone()
        bare = _IN_PLACE.get(name, name.removesuffix("_"))
        if bare not in _ARITHMETIC:
            raise Unproven(f"{name} is not followed")
        operands = [held, *(self._operand(x, write.order) for x in rest)]
        return self._each(bare, operands)

    def _computed(self, name: str, args: Sequence[Any], moment: int) -> torch.Tensor:
        return self._each(name, [self._operand(arg, moment) for arg in args])

    def _each(self, name: str, operands: Sequence[torch.Tensor]) -> torch.Tensor:
        wide = torch.broadcast_tensors(*operands)
        rows = zip(*(x.flatten().tolist() for x in wide), strict=True)
        apply = _ARITHMETIC[name]
        results = [sympy.expand(apply(*(self._pool[i] for i in row))) for row in rows]
        return self._noted(results, tuple(wide[0].shape))

    def _cumulated(self, node: fx.Node, moment: int) -> torch.Tensor:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        source = self._at(node_of(node.args[0]), moment)
        if dim not in (0, -1) or source.dim() != 1:
            raise Unproven("cumsum over a tensor of several sides")
        total, results = sympy.Integer(0), []
        for place in source.tolist():
            total = sympy.expand(total + self._pool[place])
            results.append(total)
        return self._noted(results, tuple(source.shape))

    def _padded(self, node: fx.Node, moment: int) -> torch.Tensor:
        widths, mode, value = (*node.args[1:], *[None] * 3)[:3]
        widths = node.kwargs.get("pad", widths)
        mode, value = node.kwargs.get("mode", mode), node.kwargs.get("value", value)
        if mode not in (None, "constant"):
            raise Unproven(f"padding by {mode}")
        fill = self._filled((), number(0 if value is None else value))
        source = self._at(node_of(node.args[0]), moment)
        return F.pad(source, plain(widths), value=int(fill))

    def _counted(self, node: fx.Node, shape: tuple[int, ...]) -> torch.Tensor:
        bounds = [number(arg) for arg in node.args]
        if {"start", "end", "step"} & set(node.kwargs) or not bounds:
            raise Unproven("arange by keywords")
        start = bounds[0] if len(bounds) > 1 else sympy.Integer(0)
        step = bounds[2] if len(bounds) > 2 else sympy.Integer(1)
        return self._noted([start + i * step for i in range(shape[0])], shape)

    def _summed(self, node: fx.Node, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Counts, the same ones for every sum over the same sides of the same values."""
        subject = node_of(node.args[0] if node.args else node.kwargs.get("input"))
        source = example_tensor(subject)
        if source is None:
            raise Unproven(f"{name} of several tensors")
        named: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if named is None or isinstance(named, torch.dtype):
            named = range(source.dim())
        listed = [named] if isinstance(named, int) else named
        dims = tuple(int(d) % source.dim() for d in listed)
        order = self.writes.order
        written = len(self.writes.between(subject, 0, order[node]))
        key = (name, subject, dims, written)
        if key not in self._sums:
            wide = [d for d in dims if not is_unit(source.shape[d])]
            if len(wide) > 1:
                raise Unproven(f"{name} over several sides")
            most: Length = 1
            if wide:
                size = source.shape[wide[0]]
                most = SizeOf(subject, wide[0], size) if isinstance(size, torch.SymInt) else size
            sure = name == "count_nonzero" or self._is_boolean(subject, order[node])
            symbols = [sympy.Dummy("count", integer=True) for _ in range(count_of(shape))]
            self.counts |= {symbol: Count(symbol, most, sure) for symbol in symbols}
            self._sums[key] = self._noted(symbols, (len(symbols),))
        return self._sums[key].reshape(shape)

    def _is_boolean(self, node: fx.Node, moment: int) -> bool:
        """Whether a tensor holds nothing but 0 and 1."""
        tensor = example_tensor(node)
        if tensor is not None and tensor.dtype == torch.bool:
            return True
        if node.op not in ("call_function", "call_method") or operation_name(node) not in _CASTS:
            return False
        unwritten = not self.writes.between(node, self.writes.order[node], moment)
        return unwritten and self._is_boolean(node_of(node.args[0]), moment)

    def _filled(self, shape: tuple[int, ...], value: sympy.Expr) -> torch.Tensor:
        return self._noted([value], (1,)).reshape(()).expand(shape).clone()

    def _noted(self, values: Sequence[sympy.Expr], shape: tuple[int, ...]) -> torch.Tensor:
        first = len(self._pool)
        self._pool += values
        return torch.arange(first, len(self._pool)).reshape(shape)
