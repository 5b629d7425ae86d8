"""Provenance: run a graph on token codes to learn which tokens every tensor holds.

The graph is interpreted once, all sources at a time, on integers. Equal operations on equal codes
are computed once, so that forty identical layers cost little more than one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import fx

from . import compute, indexing, movement, scatter
from .aliases import Aliases
from .arguments import resolved
from .batched import ENTER, LEAVE, Batched, cross, each, undo
from .codes import Source, SourceKind, Tracked
from .known import known_assignment, known_input, known_result, with_values
from .operations import freeze, is_in_place, operation_name, result_shapes, written_operands
from .sizes import example, expressions, shape_hints
from .subgraphs import output_value, subgraph_call

_CREATED = frozenset({"arange", "linspace"})

_UNFOLLOWED = (NotImplementedError, ValueError, TypeError, IndexError, RuntimeError)
"""What a rule raises on a call form it does not know: the tensor then counts as unknown."""


class Entering(Protocol):
    """What is known of a graph's inputs before it runs; see `origins.Origins`."""

    def codes(self, node: fx.Node) -> dict[Source, torch.Tensor] | None:
        """The codes of a placeholder; None where its elements are told apart by itself."""
        ...

    def holder(self, node: fx.Node) -> Source | None:
        """The source whose elements, all and in order, a placeholder holds."""
        ...


class Provenance:
    """Token codes of every tensor of a graph module, nested graphs included.

    values: the codes of each node that holds a tensor (or a list of them for several).
    unknown: names of operations that were not followed; what they return has no codes.
    written: tensors that operations wrote to, and all that share their memory.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[object],
        rules: dict[str, movement.Rule],
        origins: Entering | None = None,
    ) -> None:
        """Interpret `gm`. inputs: example inputs, one per placeholder; rules: attention ops of
        the caller's registry by name, on top of the built-in ones; origins: what earlier graphs
        tell of the inputs."""
        self.values: dict[fx.Node, Any] = {}
        self.sources: dict[Source, fx.Node] = {}
        self.unknown: set[str] = set()
        self.written: set[fx.Node] = set()
        self._origins = origins
        self._rules: dict[str, movement.Rule] = {
            **movement.RULES, **scatter.RULES, **compute.RULES, **rules,
        }  # fmt: skip
        self._aliases = Aliases()
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
        if isinstance(value, torch.nn.Parameter):
            self.values[node] = Tracked(shape)
            return
        kind = SourceKind.BUFFER if "_buffers_" in node.name else SourceKind.INPUT
        codes = None if self._origins is None else self._origins.codes(node)
        if codes is None or self._origins is None:
            codes = self._source(node, kind, shape) if shape else {}
        elif (source := self._origins.holder(node)) is not None:
            self.sources.setdefault(source, node)
        known = known_input(node, value)
        reads = frozenset() if known is None else frozenset([node])
        self.values[node] = Tracked(shape, codes, known, reads)
        self._aliases.note(node)

    def _source(
        self, node: fx.Node, kind: SourceKind, shape: tuple[int, ...]
    ) -> dict[Source, torch.Tensor]:
        source = Source(node.name, kind, shape, expressions(node, shape))
        self.sources[source] = node
        return {source: source.codes()}

    def _run(self, gm: fx.GraphModule) -> None:
        for node in gm.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node.op == "get_attr":
                self._enter_attribute(gm, node)
                continue
            call = subgraph_call(gm, node)
            if call is None:
                self._step(node)
                continue
            inner = call.module.graph.find_nodes(op="placeholder")
            for placeholder, operand in zip(inner, call.operands, strict=True):
                if isinstance(operand, fx.Node) and operand in self.values:
                    self.values[placeholder] = self.values[operand]
                    self._aliases.note_same(placeholder, operand)
            self._run(call.module)
            self.values[node] = self._resolve(output_value(call.module.graph))

    def _enter_attribute(self, gm: fx.GraphModule, node: fx.Node) -> None:
        value: Any = gm
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, torch.nn.Parameter):
            self.values[node] = Tracked(tuple(value.shape))
        elif isinstance(value, torch.Tensor) and value.dim():
            codes = self._source(node, SourceKind.BUFFER, tuple(value.shape))
            self.values[node] = Tracked(tuple(value.shape), codes, known_input(node, value))

    def _step(self, node: fx.Node) -> None:
        name = operation_name(node)
        if name == "setitem":
            self._set_item(node)
            return
        out = result_shapes(example(node))
        if out is not None:
            self.values[node] = self._computed(node, name, out)
            self._aliases.note(node)
        target = node.args[0] if node.args else None
        writes = is_in_place(name) or (
            compute.is_elementwise(name) and self._aliases.shares(node, target)
        )
        if writes and isinstance(target, fx.Node):
            self._write(target, self.values.get(node))
        for other in written_operands(node):
            if other is node.kwargs.get("out"):
                self._write(other, self.values.get(node))
            elif other is not target or not writes:
                self._forget(other, name)

    def _computed(self, node: fx.Node, name: str, out: Any) -> Any:
        """The codes of a node from those of its arguments."""
        if name == "getattr":
            subject, attribute = self._resolve(node.args)
            name, kwargs = str(attribute), {}
            args: Any = (subject,)
        else:
            args, kwargs = self._resolve(node.args), self._resolve(node.kwargs)
            for first in ("input", "tensors"):  # the subject of the operation, given by keyword
                if first in kwargs and not args:
                    args = (kwargs.pop(first),)
        if name == "getitem" and isinstance(args[0], (list, tuple)):
            return args[0][args[1]]
        if name in _CREATED and len(out) == 1:
            known = known_result(node, name, args, kwargs)
            return Tracked(out, self._source(node, SourceKind.CREATED, out), known)
        if name in (ENTER, LEAVE):
            return self._crossed(name, out, args)
        try:
            return each((args, kwargs), lambda given: self._of_one(node, name, out, *given))
        except _UNFOLLOWED as refusal:
            self.unknown.add(f"{name} ({refusal})")
            return compute.nothing(out)

    def _crossed(self, name: str, out: Any, args: Any) -> Any:
        """What stands at either edge of a torch.vmap."""
        try:
            return self._once(name, (out, args), lambda: cross(out, name, *args))
        except _UNFOLLOWED as refusal:
            self.unknown.add(f"torch.vmap ({refusal})")
            return compute.nothing(out)

    def _of_one(self, node: fx.Node, name: str, out: Any, args: Any, kwargs: Any) -> Any:
        """The codes of a node, or of one slice of it where it is inside torch.vmap."""

        def make() -> Any:
            given = compute.tracked_in([args, kwargs])
            result = self._apply(name, out, args, kwargs)
            return with_values(result, known_result(node, name, args, kwargs), given)

        return self._once(name, (out, args, kwargs), make)

    def _once(self, name: str, given: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What `make` returns, made once for equal arguments of one operation."""
        key = (name, *(freeze(arg) for arg in given))
        if key not in self._memo:
            self._memo[key] = make()
            self._kept.append(given)
        return self._memo[key]

    def _apply(self, name: str, out: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tracked = compute.tracked_in([args, kwargs])
        if not any(x.codes for x in tracked) or 0 in out:
            return compute.nothing(out)
        plain = name.rstrip("_") if is_in_place(name) else name
        rule = self._rules.get(name) or self._rules.get(plain)
        if rule is None and compute.keeps_places(plain):
            rule = movement.same
        if rule is None and compute.is_elementwise(name):
            rule = compute.elementwise
        if rule is None:
            self.unknown.add(name)
            return compute.nothing(out)
        given = {key: value for key, value in kwargs.items() if key != "out"}
        try:
            return compute.checked(out, rule(out, *args, **given))
        except _UNFOLLOWED as refusal:
            self.unknown.add(f"{name} ({refusal})")
            return compute.nothing(out)

    def _set_item(self, node: fx.Node) -> None:
        target, index, value = node.args[0], self._resolve(node.args[1]), node.args[2]
        base, written = self._resolve(target), self._resolve(value)
        if not isinstance(base, (Tracked, Batched)) or not isinstance(target, fx.Node):
            return
        try:
            self._write(target, each((base, index, written), lambda given: self._assigned(*given)))
        except _UNFOLLOWED as refusal:
            self._forget(target, f"setitem ({refusal})")

    def _assigned(self, base: Tracked, index: Any, written: Any) -> Any:
        def make() -> Tracked:
            coded = any(isinstance(x, Tracked) and x.codes for x in (base, written))
            try:
                codes = indexing.assign(base, index, written).codes if coded else {}
                return Tracked(base.shape, codes, *known_assignment(base, index, written))
            except _UNFOLLOWED as refusal:
                self.unknown.add(f"setitem ({refusal})")
                return Tracked(base.shape)

        return self._once("setitem", (base, index, written), make)

    def _write(self, target: fx.Node, value: Any) -> None:
        """`target` now holds `value`; so do the tensors that share its memory, each in its way."""
        self.written.update(self._aliases.family(target))
        if not isinstance(value, (Tracked, Batched)):
            self._forget(target, "an in-place operation")
            return
        self.values[target] = value
        path, child = {target}, target
        while (base := self._aliases.base(child)) is not None:
            try:
                self.values[base] = self._undone(child, base)
            except _UNFOLLOWED as refusal:
                self._forget(target, str(refusal))
                return
            path.add(base)
            child = base
        for member in self._aliases.family(target):
            base = self._aliases.base(member)
            if member in path:
                continue
            if base is None:  # two inputs that share memory in a way the graph does not show
                self.unknown.add("a write to an input that another input is a view of")
                self.values[member] = compute.nothing(result_shapes(example(member)) or ())
                continue
            name = operation_name(member)
            if member.op == "placeholder" or is_in_place(name) or compute.is_elementwise(name):
                self.values[member] = self.values[base]
            else:
                self.values[member] = self._computed(member, name, result_shapes(example(member)))

    def _undone(self, view: fx.Node, base: fx.Node) -> Any:
        """What `base` holds once its view `view` holds what it does."""
        held, seen = self.values[base], self.values[view]
        if view.op == "placeholder":
            return seen
        name = operation_name(view)
        args, kwargs = self._resolve(view.args[1:]), self._resolve(view.kwargs)
        given = (held, args, kwargs, seen)
        return self._once(f"undo {name}", given, lambda: undo(name, *given))

    def _forget(self, node: fx.Node, name: str) -> None:
        """What a tensor and all that share its memory hold is no longer known."""
        self.unknown.add(f"{name}, which writes to a tensor")
        self.written.update(self._aliases.family(node))
        for member in self._aliases.family(node):
            self.values[member] = compute.nothing(result_shapes(example(member)) or ())

    def _resolve(self, arg: Any) -> Any:
        """Arguments with tracked tensors in place of nodes."""
        return resolved(arg, self.values)
