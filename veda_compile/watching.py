"""Watching: tells `missed` what every compiled graph holds, and, call by call, whom it serves."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._library.custom_ops import CustomOpDef

from .causes import in_words, missed_layers
from .errors import StrictError
from .missed import WATCH, Break, LayerInGraph, WatchedModel, input_places
from .model_search import find_model, model_of_this_call, modules_in_progress, pass_of
from .passes.analyse import Finding
from .passes.attention_ops import find_op
from .report import GraphRecord, SiteRecord

logger = logging.getLogger(__name__)

_KNOWN_SPACES = frozenset({"aten", "prims", "veda", "_c10d_functional"})
_KEPT_CALLS = 4_096


Observe = Callable[[Sequence[Any]], None]


def watch_graph(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    findings: Sequence[Finding],
    record: GraphRecord,
    strict: bool,
) -> tuple[WatchedModel | None, Observe | None]:
    """Note what a graph holds of the model being compiled.

    gm: Dynamo's graph; inputs: its example inputs; record: its part of the report, whose sites are
    those of `findings` and get the layers they serve. Returns the model's record, None if no
    model's call is in progress, and what to call with the arguments of every run, None if there is
    no need.
    """
    search = find_model(gm)
    if search is None:
        return None, None
    watched = WATCH.model(search.model)
    cut = _graph_break(gm)
    if cut is not None and cut not in watched.breaks:
        watched.breaks.append(cut)
    watched.covered = not watched.breaks and (watched.covered or (search.whole and cut is None))
    watched.by_parts |= search.compiled is not None and search.compiled is not search.model
    watched.settled, watched.news = False, True
    places = {id(value): place for place, value in enumerate(inputs)
              if isinstance(value, torch.Tensor)}  # fmt: skip
    record.model = watched.name
    frame = record.compile_id.partition("/")[0]
    frame_key = None if search.traced is None else str(id(search.traced))
    held = _layers_in_graph(gm, findings, watched, places, frame_key, cut is None)
    for layer, seen in held.items():
        watched.note(layer, seen, frame)
    sites = _sites_by_layer(watched, held, findings, record)
    parts = [_Part(seen, sites[layer]) for layer, seen in held.items() if seen.tensors]
    if parts:
        return watched, Observer(watched, parts, frame, strict)
    return watched, CallerObserver(frame, strict) if findings and not held else None


@dataclass(frozen=True, eq=False)
class _Part:
    """An attention module of a graph, and the report's sites that are its calls."""

    seen: LayerInGraph
    sites: tuple[SiteRecord, ...]


class Observer:
    """Called with the arguments of every run of one graph.

    A graph may serve other blocks, or another model, than those it was compiled with: they bring
    other parameters.
    """

    def __init__(
        self, watched: WatchedModel, parts: Sequence[_Part], frame: str, strict: bool
    ) -> None:
        """watched: the model the graph was compiled for. parts: its layers with tensors here."""
        self._watched = watched
        self._parts = tuple(parts)
        self._frame = frame
        self._strict = strict
        self._seen: dict[int, tuple[weakref.ref[torch.Tensor], WatchedModel]] = {}

    def __call__(self, args: Sequence[Any]) -> None:
        """Raises StrictError, see `_count_pass`."""
        tensor = args[self._parts[0].seen.tensors[0]]
        known = self._seen.get(id(tensor))
        if known is None or known[0]() is not tensor:
            known = (weakref.ref(tensor), self._learn(args))
            if len(self._seen) >= _KEPT_CALLS:
                self._seen.clear()
            self._seen[id(tensor)] = known
        if not known[1].settled:
            _count_pass(known[1], self._strict)

    def _learn(self, args: Sequence[Any]) -> WatchedModel:
        model = model_of_this_call()
        watched = self._watched if model is None else WATCH.model(model)
        owners = watched.owners()
        for part in self._parts:
            layer = owners.get(id(args[part.seen.tensors[0]]))
            if layer is None:
                continue
            watched.note(layer, part.seen, self._frame)
            for site in part.sites:
                if layer not in site.layers and layer != site.layer:
                    site.layers.append(layer)
        return watched


class CallerObserver:
    """`Observer` for a graph of attention alone: whose it is tells only who calls it."""

    def __init__(self, frame: str, strict: bool) -> None:
        self._frame = frame
        self._strict = strict

    def __call__(self, args: Sequence[Any]) -> None:
        """Raises StrictError, see `_count_pass`."""
        model = model_of_this_call()
        if model is None:
            return
        watched = WATCH.model(model)
        calling = {id(module) for module in modules_in_progress()} if watched.missed() else set()
        for layer in watched.layers:
            if id(watched.module(layer)) in calling:
                watched.note(layer, LayerInGraph((), True), self._frame)
        if not watched.settled:
            _count_pass(watched, self._strict)


def _count_pass(watched: WatchedModel, strict: bool) -> None:
    """Called when a graph of a model runs. After a whole pass of the model that showed nothing new,
    what is missing will not come: it is logged once or, under `strict`, raised as StrictError."""
    model = watched.reference()
    if model is None or not watched.missed():
        watched.settled = True
        return
    now = pass_of(model)
    last = None if watched.current is None else watched.current()
    if now is None or last is not None:  # still the same pass, or another thread's
        return
    first, watched.current = watched.current is None, weakref.ref(now)
    if first:
        return
    if watched.news:
        watched.news = False
        return
    missed = missed_layers(watched)
    text = f"attention of {watched.name} never reached the backend: " + "; ".join(in_words(missed))
    if strict:
        raise StrictError(f"strict: {text}")
    watched.settled = True
    logger.warning("veda: %s", text)


def _graph_break(gm: fx.GraphModule) -> Break | None:
    """Why Dynamo ended this graph early, if it did."""
    reason: Any = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    last = reason.user_stack[-1] if reason.user_stack else None
    place = "" if last is None else f"{Path(last.filename).name}:{last.lineno}"
    return Break(str(reason.reason), place)


def _layers_in_graph(
    gm: fx.GraphModule,
    findings: Sequence[Finding],
    watched: WatchedModel,
    places: Mapping[int, int],
    frame_key: str | None,
    unbroken: bool,
) -> dict[str, LayerInGraph]:
    """The attention modules of the model that a graph holds something of.

    frame_key: identity of the module whose forward the graph was traced from; unbroken: to its end.
    """
    frame = set() if frame_key is None else {frame_key}
    called: set[str] = set()
    unplaced = False
    for finding in findings:
        stack = _stack(finding.site.node) | frame
        called |= stack
        # a nested graph may be shared by several layers and names one of them
        unplaced |= not stack or bool(finding.site.calls)
    inside: set[str] = set()
    opaque: dict[str, str] = {}
    for node in _all_nodes(gm):
        stack = _stack(node) | (frame if unbroken else set())
        inside |= stack
        name = _unknown_op(node)
        if name is not None:
            opaque.update(dict.fromkeys(stack, name))
    found = {}
    for layer in watched.layers:
        module = watched.module(layer)
        if module is None:
            continue
        key, tensors = str(id(module)), input_places(module, places)
        # a node inside the module means that its forward was traced to the end: what breaks a graph
        # inside a called function ends the graph before the call
        whole = key in inside and key not in opaque
        if key in inside or tensors:
            reached = key in called or whole or (unplaced and bool(tensors))
            found[layer] = LayerInGraph(tensors, reached, opaque.get(key))
    return found


def _sites_by_layer(
    watched: WatchedModel,
    held: Mapping[str, LayerInGraph],
    findings: Sequence[Finding],
    record: GraphRecord,
) -> dict[str, tuple[SiteRecord, ...]]:
    """The report's sites that are calls of each layer. Where Dynamo recorded no module, the only
    layer of the graph is the one."""
    keys = {layer: str(id(watched.module(layer))) for layer in held}
    sites: dict[str, list[SiteRecord]] = {layer: [] for layer in held}
    for finding, site in zip(findings, record.sites, strict=True):
        stack = _stack(finding.site.node)
        for layer in held:
            if keys[layer] in stack or (not stack and len(held) == 1):
                sites[layer] += [site] if not finding.site.calls else []
    return {layer: tuple(found) for layer, found in sites.items()}


def _stack(node: fx.Node) -> set[str]:
    """Identities of the modules a node was traced in."""
    return {str(key).partition("@")[0] for key in node.meta.get("nn_module_stack") or ()}


def _all_nodes(gm: fx.GraphModule) -> Iterator[fx.Node]:
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            yield from module.graph.nodes


def _unknown_op(node: fx.Node) -> str | None:
    """The name of a custom op or higher-order operator that could be attention unknown to veda."""
    if node.op != "call_function" or find_op(node) is not None:
        return None
    target: Any = node.target
    if isinstance(target, CustomOpDef):
        return target._qualname
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        name = str(getattr(target, "_qualified_op_name", None) or target.name())
        return None if name.partition("::")[0] in _KNOWN_SPACES else name
    return None
