"""Values of a mask, proven from the operations that compute it.

From the mask back through elementwise operations and broadcasting to boolean tensors that vary
along the queries or along the keys only. In-place writes are followed in their order. What the
tensors hold is never looked at: it may change from call to call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from .compute import is_elementwise
from .mask_roles import (
    Roles,
    before_broadcast,
    before_index,
    before_permute,
    before_reshape,
    same_view,
)
from .operations import operation_name
from .sizes import example_tensor
from .truth import Leaf, Table, Unproven, combine, constant, leaf_table
from .writes import Write, Writes, shares_memory

_CASTS = frozenset(
    """to bool float half bfloat16 double int long type type_as contiguous clone detach cpu
    cuda""".split()
)
_CREATED: dict[str, object] = {
    "zeros": 0, "zeros_like": 0, "new_zeros": 0, "ones": 1, "ones_like": 1, "new_ones": 1,
}  # fmt: skip
_FILLED = {"full": 1, "full_like": 1, "new_full": 2}
"""Where the value stands among the arguments."""
_RESHAPES = frozenset(
    """view reshape unsqueeze squeeze flatten unflatten view_as reshape_as expand_dims""".split()
)
_BROADCASTS = frozenset({"expand", "expand_as", "broadcast_to", "repeat", "tile"})
_IN_PLACE: dict[str, Callable[..., torch.Tensor]] = {
    "iadd": operator.add, "isub": operator.sub, "imul": operator.mul, "itruediv": operator.truediv,
    "iand": operator.and_, "ior": operator.or_, "ixor": operator.xor,
}  # fmt: skip


class MaskValues:
    """Tables of the tensors of one graph as they are when `site` runs."""

    def __init__(self, site: fx.Node, writes: Writes) -> None:
        """writes: those of the site's graph."""
        self._writes = writes
        self._end = self._writes.order[site]

    def table(self, mask: fx.Node, roles: Roles) -> Table:
        """The values of `mask`. roles: what its sides are, see `Leaf`; "h" for heads.

        Raises Unproven.
        """
        return self._at(mask, roles, self._end)

    def _at(self, node: fx.Node, roles: Roles, moment: int) -> Table:
        """The values of `node` when `moment` is reached."""
        tensor = example_tensor(node)
        if tensor is None:
            raise Unproven(f"{node.name} is not one tensor")
        leaf = Leaf(node, roles)
        usable = (
            tensor.dtype == torch.bool
            and "h" not in roles
            and not {"q", "k"} <= set(roles)
            and not self._writes.between(node, moment, self._end)
        )
        try:
            found = self._followed(node, tensor, roles, moment)
        except Unproven:
            if usable:
                return leaf_table(leaf, tensor.dim())
            raise
        return leaf_table(leaf, tensor.dim()) if usable and found.leaves else found

    def _followed(self, node: fx.Node, tensor: torch.Tensor, roles: Roles, moment: int) -> Table:
        """The values by the operation that made the node and the writes since."""
        if node.op not in ("call_function", "call_method"):
            differs = ", and differ from head to head" if "h" in roles else ""
            raise Unproven(f"its values come from outside the graph ({node.name}){differs}")
        made = self._writes.order[node]
        subject = node.args[0] if node.args else None
        if isinstance(subject, fx.Node) and shares_memory(node, subject):
            # a view, or the result of an in-place operation: it follows what it looks at
            return self._moved(node, subject, roles, moment)
        found = self._made(node, tensor, roles, made)
        for write in self._writes.between(node, made, moment):
            found = self._written(found, node, tensor, roles, write)
        return found

    def _made(self, node: fx.Node, tensor: torch.Tensor, roles: Roles, made: int) -> Table:
        """The values an operation gives that returns new memory."""
        name = operation_name(node)
        if name in _CREATED:
            return constant(_CREATED[name], tensor.dtype, tensor.dim())
        if name in _FILLED or name in ("tensor", "scalar_tensor"):
            place = _FILLED.get(name, 0)
            value = node.args[place] if len(node.args) > place else node.kwargs.get("fill_value")
            if not isinstance(value, (bool, int, float)):
                raise Unproven(f"{name} with a value that is no constant")
            return constant(value, tensor.dtype, tensor.dim())
        if name in _CASTS:
            (source,) = self._operands(node.args[:1], tensor, roles, made)
            return combine([source], tensor.dtype, lambda x: x.to(tensor.dtype))
        if is_elementwise(name) and name not in _IN_PLACE:
            return self._elementwise(node, tensor, roles, made)
        subject = node.args[0] if node.args else None
        if isinstance(subject, fx.Node) and example_tensor(subject) is not None:
            return self._moved(node, subject, roles, made)
        raise Unproven(f"{name} is not followed")

    def _elementwise(self, node: fx.Node, tensor: torch.Tensor, roles: Roles, at: int) -> Table:
        flat: list[fx.Node] = []

        def visit(arg: Any) -> Any:
            if not isinstance(arg, fx.Node):
                return lambda values: arg
            if example_tensor(arg) is None:
                raise Unproven(f"{arg.name} is a number that is computed")
            if arg not in flat:
                flat.append(arg)
            place = flat.index(arg)
            return lambda values: values[place]

        args = [visit(arg) for arg in node.args]
        kwargs = {name: visit(arg) for name, arg in node.kwargs.items()}
        target = node.target

        def apply(*values: torch.Tensor) -> torch.Tensor:
            given = [arg(values) for arg in args]
            named = {name: arg(values) for name, arg in kwargs.items()}
            if node.op == "call_method":
                result = getattr(given[0], str(target))(*given[1:], **named)
            else:
                assert callable(target)
                result = target(*given, **named)
            if not isinstance(result, torch.Tensor):
                raise Unproven(f"{operation_name(node)} is not followed")
            return result

        return combine(self._operands(flat, tensor, roles, at), tensor.dtype, apply)

    def _operands(
        self, nodes: Sequence[Any], out: torch.Tensor, roles: Roles, at: int
    ) -> list[Table]:
        """Tables of tensors that broadcast to `out`."""
        return [self._at(node, before_broadcast(node, out, roles), at) for node in nodes]

    def _moved(self, node: fx.Node, subject: fx.Node, roles: Roles, moment: int) -> Table:
        """The values of an operation that only rearranges `subject`."""
        source = example_tensor(subject)
        out = example_tensor(node)
        assert source is not None and out is not None
        name = operation_name(node)
        if name == "getattr":
            name = str(node.args[1])
        if name == "getitem":
            inner = before_index(node.args[1], source, roles)
        elif name in _RESHAPES:
            inner = before_reshape(source, out, roles)
        elif name in _BROADCASTS:
            inner = before_broadcast(subject, out, roles)
        elif name in ("permute", "transpose", "swapaxes", "mT", "T", "t"):
            inner = before_permute(name, node.args[1:], node.kwargs, roles)
        elif source.shape == out.shape and (name in _CASTS or name.endswith("_") or
                                            name in _IN_PLACE):  # fmt: skip
            inner = roles
        else:
            raise Unproven(f"{name} is not followed")
        return self._at(subject, inner, moment)

    def _written(
        self, held: Table, node: fx.Node, tensor: torch.Tensor, roles: Roles, write: Write
    ) -> Table:
        """`held`, the values of `node`, after a write."""
        target, *rest = write.node.args
        if not isinstance(target, fx.Node) or write.node.kwargs or not same_view(target, node):
            raise Unproven(f"an in-place write through a view, {write.node.name}")
        name = operation_name(write.node)
        if name == "setitem":
            index, value = rest
            if isinstance(index, fx.Node):
                if isinstance(value, fx.Node) or not _is_mask_of(index, tensor):
                    raise Unproven(f"an indexed write, {write.node.name}")
                (where,) = self._operands([index], tensor, roles, write.order)
                return combine([held, where], tensor.dtype, lambda x, m: x.masked_fill(m, value))
            if not _whole(index):
                raise Unproven(f"a write to a part of the mask, {write.node.name}")
            name, rest = "copy_", [value]
        nodes = [arg for arg in rest if isinstance(arg, fx.Node)]
        tables = self._operands(nodes, tensor, roles, write.order)

        def apply(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
            given = iter(values)
            operands = [next(given) if isinstance(arg, fx.Node) else arg for arg in rest]
            if name in ("copy_", "fill_"):
                return torch.as_tensor(operands[0]).to(x.dtype).expand_as(x)
            if name == "zero_":
                return torch.zeros_like(x)
            result = (
                _IN_PLACE[name](x, *operands)
                if name in _IN_PLACE
                else getattr(x, name.removesuffix("_"))(*operands)
            )
            return result.to(x.dtype)

        if not (name in _IN_PLACE or name in ("copy_", "fill_", "zero_") or is_elementwise(name)):
            raise Unproven(f"{name} is not followed")
        return combine([held, *tables], tensor.dtype, apply)


def _is_mask_of(index: fx.Node, tensor: torch.Tensor) -> bool:
    mask = example_tensor(index)
    return mask is not None and mask.dtype == torch.bool and mask.dim() == tensor.dim()


def _whole(index: object) -> bool:
    items = index if isinstance(index, (tuple, list)) else [index]
    return all(item is Ellipsis or item == slice(None) for item in items)
