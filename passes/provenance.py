"""Provenance: run a graph on token codes to learn which tokens every tensor holds.

The graph is interpreted once, all sources at a time, on integers. Equal operations on equal codes
are computed once, so that forty identical layers cost little more than one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._library.custom_ops import CustomOpDef

from . import compute, indexing, movement
from .codes import Source, SourceKind, Tracked
from .sizes import example, hint, shape_hints
from .subgraphs import output_value, subgraph_call

_CREATED = frozenset({"arange", "linspace"})

_UNFOLLOWED = (NotImplementedError, ValueError, TypeError, IndexError, RuntimeError)
"""What a rule raises on a call form it does not know: the tensor then counts as unknown."""

Interpret = Callable[..., "Tracked | list[Tracked]"]


class Provenance:
    """Token codes of every tensor of a graph module, nested graphs included.

    values: the codes of each node that holds a tensor (or a list of them for several).
    unknown: names of operations that were not followed; what they return has no codes.
    """

    def __init__(
        self, gm: fx.GraphModule, inputs: Sequence[object], rules: dict[str, movement.Rule]
    ) -> None:
        """Interpret `gm`. inputs: example inputs, one per placeholder; rules: attention ops of
        the caller's registry by name, on top of the built-in ones."""
        self.values: dict[fx.Node, Any] = {}
        self.sources: dict[Source, fx.Node] = {}
        self.unknown: set[str] = set()
        self._rules: dict[str, movement.Rule] = {**movement.RULES, **compute.RULES, **rules}
        self._memo: dict[object, Any] = {}
        self._kept: list[Any] = []  # keeps ids in memo keys from being reused
        placeholders = gm.graph.find_nodes(op="placeholder")
        for node, value in zip(placeholders, inputs, strict=True):
            self._enter(node, value)
        self._run(gm)

    def codes_of(self, node: object) -> Tracked | None:
        """The tracked tensor a node holds, or None if it holds no single tensor."""
        value = self.values.get(node) if isinstance(node, fx.Node) else None
        return value if isinstance(value, Tracked) else None

    def _enter(self, node: fx.Node, value: object) -> None:
        if not isinstance(value, torch.Tensor):
            return
        recorded = example(node)
        shape = shape_hints(recorded if isinstance(recorded, torch.Tensor) else value)
        if isinstance(value, torch.nn.Parameter) or not shape:
            self.values[node] = Tracked(shape)
            return
        kind = SourceKind.BUFFER if "_buffers_" in node.name else SourceKind.INPUT
        self.values[node] = self._source(node, kind, shape)

    def _source(self, node: fx.Node, kind: SourceKind, shape: tuple[int, ...]) -> Tracked:
        source = Source(node.name, kind, shape)
        self.sources[source] = node
        return Tracked(shape, {source: source.codes()})

    def _run(self, gm: fx.GraphModule) -> None:
        for node in gm.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node.op == "get_attr":
                self._enter_attribute(gm, node)
                continue
            call = subgraph_call(gm, node)
            if call is not None:
                inner = call.module.graph.find_nodes(op="placeholder")
                for placeholder, operand in zip(inner, call.operands, strict=True):
                    if isinstance(operand, fx.Node) and operand in self.values:
                        self.values[placeholder] = self.values[operand]
                self._run(call.module)
                self.values[node] = self._resolve(output_value(call.module.graph))
                continue
            self._step(node)

    def _enter_attribute(self, gm: fx.GraphModule, node: fx.Node) -> None:
        value: Any = gm
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, torch.nn.Parameter):
            self.values[node] = Tracked(tuple(value.shape))
        elif isinstance(value, torch.Tensor) and value.dim():
            self.values[node] = self._source(node, SourceKind.BUFFER, tuple(value.shape))

    def _step(self, node: fx.Node) -> None:
        name = operation_name(node)
        out = _shapes(example(node))
        if name == "setitem":
            self._assign(node)
            return
        if out is None:
            return
        if name == "getattr":
            subject, attribute = self._resolve(node.args)
            name = str(attribute)
            node_args: Any = (subject,)
            kwargs: dict[str, Any] = {}
        else:
            node_args, kwargs = self._resolve(node.args), self._resolve(node.kwargs)
            for first in ("input", "tensors"):  # the subject of the operation, given by keyword
                if first in kwargs and not node_args:
                    node_args = (kwargs.pop(first),)
        if name in _CREATED and len(out) == 1:
            self.values[node] = self._source(node, SourceKind.CREATED, out)
            return
        if name == "getitem" and isinstance(node_args[0], (list, tuple)):
            self.values[node] = node_args[0][node_args[1]]
            return
        key = (name, _freeze(out), _freeze(node_args), _freeze(kwargs))
        if key not in self._memo:
            self._memo[key] = self._apply(name, out, node_args, kwargs)
            self._kept.append((node_args, kwargs))
        self.values[node] = self._memo[key]
        if name.endswith("_") and not name.endswith("__") and node.args:
            self._write_back(node)

    def _apply(self, name: str, out: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tracked = compute.tracked_in([args, kwargs])
        if not any(x.codes for x in tracked) or any(0 in x.shape for x in tracked):
            return compute.nothing(out)
        rule = self._rules.get(name)
        if rule is None and compute.keeps_places(name.rstrip("_")):
            rule = movement.same
        if rule is None and compute.is_elementwise(name):
            rule = compute.elementwise
        if rule is None:
            self.unknown.add(name)
            return compute.nothing(out)
        try:
            return rule(out, *args, **kwargs)
        except _UNFOLLOWED as refusal:
            self.unknown.add(f"{name} ({refusal})")
            return compute.nothing(out)

    def _assign(self, node: fx.Node) -> None:
        target, index, value = node.args[0], self._resolve(node.args[1]), node.args[2]
        base = self.codes_of(target)
        if base is None or not isinstance(target, fx.Node):
            return
        written = self._resolve(value)
        key = ("setitem", _freeze(base), _freeze(index), _freeze(written))
        if key not in self._memo:
            try:
                self._memo[key] = indexing.assign(base, index, written)
            except _UNFOLLOWED as refusal:
                self.unknown.add(f"setitem ({refusal})")
                self._memo[key] = Tracked(base.shape)
            self._kept.append((base, index, written))
        self.values[target] = self._memo[key]

    def _write_back(self, node: fx.Node) -> None:
        """An in-place method changes its first argument; on a view, the viewed tensor too."""
        target = node.args[0]
        result = self.codes_of(node)
        if result is None or not isinstance(target, fx.Node):
            return
        if operation_name(node) == "copy_":
            written = self.codes_of(node.args[1])
            if written is not None:
                result = Tracked(result.shape, written.codes)
        self.values[node] = self.values[target] = result
        if target.op == "call_function" and operation_name(target) == "getitem":
            base = self.codes_of(target.args[0])
            if base is not None and isinstance(target.args[0], fx.Node):
                index = self._resolve(target.args[1])
                try:
                    self.values[target.args[0]] = indexing.assign(base, index, result)
                except _UNFOLLOWED as refusal:
                    self.unknown.add(f"in-place write ({refusal})")
                    self.values[target.args[0]] = Tracked(base.shape)

    def _resolve(self, arg: Any) -> Any:
        """Arguments with nodes replaced by tracked tensors, or by their value or its hint."""
        if isinstance(arg, fx.Node):
            if arg in self.values:
                return self.values[arg]
            value = example(arg)
            if isinstance(value, torch.SymInt):
                return hint(value)
            if isinstance(value, torch.Tensor):
                return Tracked(shape_hints(value))
            if isinstance(value, (tuple, list)):
                return [
                    Tracked(shape_hints(v)) if isinstance(v, torch.Tensor) else v for v in value
                ]
            return value
        if isinstance(arg, tuple):
            return tuple(self._resolve(a) for a in arg)
        if isinstance(arg, list):
            return [self._resolve(a) for a in arg]
        if isinstance(arg, dict):
            return {name: self._resolve(a) for name, a in arg.items()}
        if isinstance(arg, slice):
            return slice(*(self._resolve(a) for a in (arg.start, arg.stop, arg.step)))
        return arg


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
    return str(getattr(target, "__name__", target))


def _plain_name(qualified: str) -> str:
    """torch's own operators without their namespace, others with it."""
    space, _, name = qualified.partition("::")
    return name if space in ("aten", "prims") else qualified


def _shapes(value: object) -> Any:
    """The shape of a recorded tensor, or of each of several; None for anything else."""
    if isinstance(value, torch.Tensor):
        return shape_hints(value)
    if isinstance(value, (tuple, list)) and value and isinstance(value[0], torch.Tensor):
        return [shape_hints(v) for v in value if isinstance(v, torch.Tensor)]
    return None


def _freeze(arg: Any) -> object:
    """A hashable stand-in for an argument; tracked tensors by the identity of their codes."""
    if isinstance(arg, Tracked):
        return arg.key()
    if isinstance(arg, (tuple, list)):
        return tuple(_freeze(a) for a in arg)
    if isinstance(arg, dict):
        return tuple((name, _freeze(a)) for name, a in arg.items())
    if isinstance(arg, slice):
        return ("slice", arg.start, arg.stop, arg.step)
    return (type(arg), str(arg))
