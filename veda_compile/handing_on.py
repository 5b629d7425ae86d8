"""Handing on: the tensors that one graph hands to the next are tagged with what they hold."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from .model_search import find_model
from .passes.attention_ops import provenance_rules
from .passes.origins import (
    Origins,
    Pattern,
    outputs_with_tokens,
    tensor_inputs,
    written_inputs,
)
from .passes.owned_graph import own_copy
from .passes.provenance import Provenance
from .passes.sites import find_sites
from .passes.sizes import example, hint, supposing
from .tags import TAGS, Relation, Tag, Untold

logger = logging.getLogger(__name__)

_CACHED_CALLS = 64

_UNFOLLOWED = (
    NotImplementedError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
)
"""What following an unusual graph may raise. The graph itself is none the worse for it."""

_ONE_GRAPH = (
    "keep projections and attention in one graph (TORCH_LOGS=graph_breaks shows where it breaks)"
)
_COUNTS_NO_WRITES = Untold(
    "an earlier graph returned a tensor of torch.inference_mode, which counts no writes",
    "use torch.no_grad() instead of torch.inference_mode()",
)


class CallSizes:
    """The size symbols of a graph, read from the arguments of a call."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._places: dict[sympy.Symbol, tuple[int, int | None]] = {}
        for place, node in enumerate(gm.graph.find_nodes(op="placeholder")):
            value = example(node)
            if isinstance(value, torch.SymInt):
                self._note(value, place, None)
            elif isinstance(value, torch.Tensor):
                for dim, side in enumerate(value.shape):
                    self._note(side, place, dim)

    def _note(self, size: object, place: int, dim: int | None) -> None:
        if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
            self._places.setdefault(size.node.expr, (place, dim))

    def __call__(self, args: Sequence[Any]) -> tuple[int, ...]:
        """The sizes of a call, in the order of `symbols`."""
        return tuple(
            [
                hint(args[place] if dim is None else args[place].shape[dim])
                for place, dim in self._places.values()
            ]
        )

    @property
    def symbols(self) -> tuple[sympy.Symbol, ...]:
        """The symbols, in a fixed order."""
        return tuple(self._places)


@dataclass(frozen=True, eq=False)
class _Handed:
    """What an output of a call holds: its pattern, and the numbers of its roots."""

    pattern: Pattern
    roots: tuple[int, ...]


class Tagger:
    """Tags the outputs of one graph, call by call."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        """gm: an owned copy that nobody changes. inputs: the example inputs."""
        self._gm = gm
        self._sizes = CallSizes(gm)
        self._nodes = gm.graph.find_nodes(op="placeholder")
        self._rules = provenance_rules(site.node for site in find_sites(gm))
        self._places = tensor_inputs(gm, inputs)
        self._known: OrderedDict[object, dict[int, _Handed]] = OrderedDict()
        self._why: Untold | None = None
        self._warned = False
        relation, sizes = self._state(inputs)
        origins = self._origins(relation)
        provenance = self._provenance(inputs, origins, sizes)
        self._note_unfollowed(provenance)
        self._written = written_inputs(gm, provenance)
        self._may_write_more = bool(provenance.unknown)
        reached = {n for out in outputs_with_tokens(gm, provenance, origins) for n in out.roots}
        self._places = [
            place
            for place, known in zip(self._places, relation.key, strict=True)
            if known is not None and reached.intersection(known[1])
        ]

    @property
    def hands_on(self) -> bool:
        """Whether any output holds tokens, or there is something to say of why none does."""
        return bool(self._places) or self._why is not None

    def wrap(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """`compiled` with its outputs tagged."""

        def run(*args: Any) -> Any:
            relation, sizes = self._state(args)
            handed = self._known.get((relation.key, sizes))
            if handed is None:
                handed = self._learn(args, relation, sizes)
            results = self._call(compiled, args)
            self._count_writes(args)
            for place, result in enumerate(results):
                output = handed.get(place)
                if output is None or result.shape != output.pattern.shape:
                    if isinstance(result, torch.Tensor):  # it may be an older one, in use again
                        TAGS.drop(result, self._why)
                elif result.is_inference():
                    TAGS.drop(result, _COUNTS_NO_WRITES)
                else:
                    roots = tuple([relation.roots[number] for number in output.roots])
                    TAGS.tag(result, Tag(output.pattern, roots, True))
            return results

        return run

    def _call(self, compiled: Callable[..., Any], args: Sequence[Any]) -> Any:
        """Run the graph so that what it computes counts writes, as tensors of inference mode do
        not; but those can be written to in that mode alone."""
        if not torch.is_inference_mode_enabled() or (
            any(isinstance(args[place], torch.Tensor) and args[place].is_inference()
                for place in (range(len(args)) if self._may_write_more else self._written))
        ):  # fmt: skip
            return compiled(*args)
        with torch.inference_mode(False), torch.no_grad():
            return compiled(*args)

    def _note_unfollowed(self, provenance: Provenance) -> None:
        if provenance.unknown and self._why is None:
            names = ", ".join(sorted(provenance.unknown)[:5])
            self._why = Untold(
                f"an earlier graph was not followed: {names}",
                f"write it with plain torch operations, or {_ONE_GRAPH}",
            )

    def _note_failure(self, error: Exception) -> None:
        self._why = _failed(error)
        if not self._warned:
            _warn(self._why)
        self._warned = True

    def _state(self, args: Sequence[Any]) -> tuple[Relation, tuple[int, ...]]:
        return TAGS.relation([args[place] for place in self._places], True), self._sizes(args)

    def _origins(self, relation: Relation) -> Origins:
        nodes = (self._nodes[place] for place in self._places)
        return Origins(
            {node: known for node, known in zip(nodes, relation.key, strict=True) if known}
        )

    def _provenance(
        self, args: Sequence[Any], origins: Origins, sizes: tuple[int, ...]
    ) -> Provenance:
        values = dict(zip(self._sizes.symbols, sizes, strict=True))
        with torch.device("cpu"), supposing(values):
            return Provenance(self._gm, args, self._rules, origins)

    def _learn(
        self, args: Sequence[Any], relation: Relation, sizes: tuple[int, ...]
    ) -> dict[int, _Handed]:
        handed: dict[int, _Handed] = {}
        try:
            origins = self._origins(relation)
            provenance = self._provenance(args, origins, sizes)
            for out in outputs_with_tokens(self._gm, provenance, origins):
                pattern = TAGS.pattern(out.shape, out.parts)
                handed[out.place] = _Handed(pattern, out.roots)
            self._note_unfollowed(provenance)
        except _UNFOLLOWED as error:
            self._note_failure(error)
        self._known[relation.key, sizes] = handed
        while len(self._known) > _CACHED_CALLS:
            self._known.popitem(last=False)
        return handed

    def _count_writes(self, args: Sequence[Any]) -> None:
        """Compiled code may write to an input without counting it, and the tags rest on counts."""
        for place in self._written:
            if isinstance(args[place], torch.Tensor) and not args[place].is_inference():
                torch.autograd.graph.increment_version(args[place])


def tagger(gm: fx.GraphModule, inputs: Sequence[Any]) -> Tagger | Untagger | None:
    """What tags the outputs of a graph; None where nothing is handed on.

    A graph has a next one if Dynamo cut it off, if it was handed something itself, or if it is a
    part of a model that was to be compiled as a whole.
    """
    if not all(_is_real(value) for value in inputs):
        return None
    if not (_is_cut(gm) or is_handed_to(inputs) or _is_part(gm)):
        return None
    try:
        made = Tagger(own_copy(gm), inputs)
    except _UNFOLLOWED as error:
        why = _failed(error)
        _warn(why)
        return Untagger(why)
    return made if made.hands_on else None


@dataclass(frozen=True)
class Untagger:
    """In a tagger's place for a graph that could not be followed: says so of its outputs."""

    why: Untold

    def wrap(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """`compiled`, with the cause left on its outputs."""

        def run(*args: Any) -> Any:
            results = compiled(*args)
            for result in results:
                if isinstance(result, torch.Tensor):
                    TAGS.drop(result, self.why)
            return results

        return run


def _failed(error: Exception) -> Untold:
    return Untold(
        f"an earlier graph could not be followed: {type(error).__name__}: {error}",
        f"{_ONE_GRAPH}; the failure is one of veda-compile, please report it",
    )


def _warn(why: Untold) -> None:
    logger.warning(
        "veda: %s. Attention that another graph computes from what it returns may stay dense. "
        "Remedy: %s",
        why.cause, why.remedy,
    )  # fmt: skip


def _is_cut(gm: fx.GraphModule) -> bool:
    reason: Any = getattr(gm, "compile_subgraph_reason", None)
    return reason is not None and bool(reason.graph_break)


def _is_part(gm: fx.GraphModule) -> bool:
    search = find_model(gm)
    return search is not None and search.compiled is search.model and not search.whole


def is_handed_to(inputs: Sequence[Any]) -> bool:
    """Whether earlier graphs tell something of these inputs."""
    return any(
        isinstance(value, torch.Tensor)
        and not torch._subclasses.fake_tensor.is_fake(value)
        and (tag := TAGS.of(value)) is not None
        and tag.handed_on
        for value in inputs
    )


def _is_real(value: object) -> bool:
    return not isinstance(value, torch.Tensor) or not torch._subclasses.fake_tensor.is_fake(value)
