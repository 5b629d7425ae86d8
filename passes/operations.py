"""Operations of a graph: their bare names, the shapes of their results, and what they write to."""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import fx
from torch._library.custom_ops import CustomOpDef

from .batched import Batched
from .codes import Tracked
from .known import IN_PLACE
from .sizes import shape_hints

_KERNELS = "triton_kernel_wrapper_mutation"


def operation_name(node: fx.Node) -> str:
    """The bare name of the function or method a node calls; of a custom op, "namespace::op"."""
    if node.op == "call_method":
        return str(node.target)
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return _plain_name(target._schema.name)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return _plain_name(target._qualified_op_name)
    if isinstance(target, CustomOpDef):
        return target._qualname
    name = str(getattr(target, "__name__", target))
    home = target.__module__ if isinstance(target, FunctionType) else "torch"
    # what a library's own function does, its name does not tell
    return name if home.partition(".")[0] == "torch" else f"{home}::{name}"


def _plain_name(qualified: str) -> str:
    """torch's own operators without their namespace, others with it."""
    space, _, name = qualified.partition("::")
    return name if space in ("aten", "prims") else qualified


def result_shapes(value: object) -> Any:
    """The shape of a recorded tensor, or of each of several; None for anything else."""
    if isinstance(value, torch.Tensor):
        return shape_hints(value)
    if isinstance(value, (tuple, list)) and value and isinstance(value[0], torch.Tensor):
        return [shape_hints(v) for v in value if isinstance(v, torch.Tensor)]
    return None


def is_in_place(name: str) -> bool:
    """Whether an operation of this name writes to its first operand."""
    if name in ("and_", "or_", "not_"):  # Python's operators, named around its keywords
        return False
    return name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def written_operands(node: fx.Node) -> Iterator[fx.Node]:
    """The operands that an operation's schema, or its `out`, says it writes to."""
    out = node.kwargs.get("out")
    yield from (x for x in _flat(out) if isinstance(x, fx.Node))
    name, first = operation_name(node), node.args[0] if node.args else None
    if is_in_place(name) and isinstance(first, (tuple, list)):  # many tensors at once
        yield from (x for x in _flat(first) if isinstance(x, fx.Node))
    if name == _KERNELS:
        yield from (x for x in _flat(node.kwargs) if isinstance(x, fx.Node))
    for schema in _schemas(node.target):
        for place, argument in enumerate(schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = node.kwargs.get(argument.name)
            if place < len(node.args):
                given = node.args[place]
            yield from (x for x in _flat(given) if isinstance(x, fx.Node))


def _schemas(target: object) -> list[Any]:
    if isinstance(target, CustomOpDef):
        target = target._opoverload
    if isinstance(target, torch._ops.OpOverload):
        return [target._schema]
    if isinstance(target, torch._ops.OpOverloadPacket):
        first = target.overloads()[:1]  # the others differ in their `out`, which is named
        return [getattr(target, name)._schema for name in first]
    return []


def _flat(arg: Any) -> Iterator[Any]:
    if isinstance(arg, (tuple, list)):
        for part in arg:
            yield from _flat(part)
    elif isinstance(arg, dict):
        for part in arg.values():
            yield from _flat(part)
    else:
        yield arg


def freeze(arg: Any) -> object:
    """A hashable stand-in for an argument; tracked tensors by the identity of their codes."""
    if isinstance(arg, (Tracked, Batched)):
        return arg.key()
    if isinstance(arg, (tuple, list)):
        return tuple(freeze(a) for a in arg)
    if isinstance(arg, dict):
        return tuple((name, freeze(a)) for name, a in arg.items())
    if isinstance(arg, slice):
        return ("slice", arg.start, arg.stop, arg.step)
    return (type(arg), str(arg))
