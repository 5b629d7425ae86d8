"""Attention that never reached the backend: what each watched model has, less what graphs showed.

A model is watched from its first compiled graph on. Its attention modules are known by structure;
which of them a graph holds is told by Dynamo's record of modules and, where one graph serves many
blocks, by the parameters that come with each call.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from .attention_modules import attention_modules, nested_models, owned_tensors

_KEPT_MODELS = 64


@dataclass(frozen=True)
class Break:
    """A graph break: Dynamo's reason in full, and "file:line" of the model's code."""

    reason: str
    place: str

    @property
    def title(self) -> str:
        """The reason's first line."""
        return self.reason.strip().partition("\n")[0]


@dataclass(frozen=True)
class LayerInGraph:
    """What one graph holds of one attention module.

    tensors: positions of the module's parameters and buffers among the graph's inputs.
    reached: its attention call is there for the passes to judge, or its whole forward is and calls
    no softmax attention. opaque: an operation in its forward that nothing is known of.
    """

    tensors: tuple[int, ...]
    reached: bool
    opaque: str | None = None


@dataclass(frozen=True, eq=False)
class Pass:
    """One call of a model. Lives as long as the call does."""


@dataclass(eq=False)
class WatchedModel:
    """One model and what the backend saw of it. Layers are paths of attention modules.

    nested: paths of models within it. reached: layer -> Dynamo frames whose graphs hold it.
    partly: layers of which graphs hold parameters, but not the attention call.
    opaque: layer -> an unknown operation in it. breaks: graph breaks in the model.
    covered: the model's whole forward is one graph. by_parts: modules inside the model were
    compiled, not the model. said: reasons that were logged. since: seconds since epoch.
    current: the pass in progress; news: it, or the one before, showed something new; settled:
    nothing is to be expected any more.
    """

    reference: weakref.ref[nn.Module]
    name: str
    layers: dict[str, weakref.ref[nn.Module]]
    nested: list[str] = field(default_factory=list)
    reached: dict[str, set[str]] = field(default_factory=dict)
    partly: set[str] = field(default_factory=set)
    opaque: dict[str, str] = field(default_factory=dict)
    breaks: list[Break] = field(default_factory=list)
    covered: bool = False
    by_parts: bool = False
    said: set[str] = field(default_factory=set)
    since: float = field(default_factory=time.time)
    current: weakref.ref[Pass] | None = None
    news: bool = True
    settled: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> WatchedModel:
        """Start to watch a model; it is not kept alive."""
        found = attention_modules(model)
        return cls(
            weakref.ref(model),
            type(model).__name__,
            {path: weakref.ref(module) for path, module in found.items()},
            nested_models(model),
        )

    def module(self, layer: str) -> nn.Module | None:
        """The module of a layer, while the model lives."""
        return self.layers[layer]()

    def pending(self) -> list[str]:
        """Layers no graph has shown so far."""
        return [layer for layer in self.layers if layer not in self.reached]

    def missed(self) -> list[str]:
        """Layers that ran dense unnoticed, if they ran: none in a model that is one graph.

        A model within this one counts if any of it was seen: the rest may not be for compiling.
        """
        if self.covered:
            return []
        seen = [*self.reached, *self.partly]
        idle = [
            f"{path}."
            for path in self.nested
            if not any(layer.startswith(f"{path}.") for layer in seen)
        ]
        return [layer for layer in self.pending() if not layer.startswith(tuple(idle))]

    def note(self, layer: str, seen: LayerInGraph, frame: str) -> None:
        """Add what a graph of a Dynamo frame holds of a layer."""
        before = (len(self.reached), len(self.partly))
        if seen.reached:
            self.reached.setdefault(layer, set()).add(frame)
        elif seen.tensors:
            self.partly.add(layer)
            if seen.opaque is not None:
                self.opaque[layer] = seen.opaque
        self.news |= (len(self.reached), len(self.partly)) != before

    def owners(self) -> dict[int, str]:
        """The layer of every parameter and buffer, by the tensor's id."""
        modules = ((layer, reference()) for layer, reference in self.layers.items())
        return {
            id(tensor): layer
            for layer, module in modules
            if module is not None
            for tensor in owned_tensors(module).values()
        }


class Watch:
    """The watched models of this process; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: dict[int, WatchedModel] = {}

    def model(self, model: nn.Module) -> WatchedModel:
        """The record of a model; watched from now on if it was not before."""
        with self._lock:
            held = self._models.get(id(model))
            if held is None or held.reference() is not model:
                held = WatchedModel.of(model)
                self._models.pop(id(model), None)
                self._models[id(model)] = held
                while len(self._models) > _KEPT_MODELS:
                    del self._models[next(iter(self._models))]
            return held

    def models(self) -> list[WatchedModel]:
        """All watched models, oldest first."""
        with self._lock:
            return list(self._models.values())

    def clear(self) -> None:
        """Forget all models."""
        with self._lock:
            self._models.clear()


WATCH = Watch()
"""What `veda_compile.report()` asks about attention that never came."""


def input_places(layer: nn.Module, inputs: Mapping[int, int]) -> tuple[int, ...]:
    """Where a module's tensors stand among a graph's inputs. inputs: id of a tensor -> position."""
    tensors = owned_tensors(layer).values()
    return tuple(inputs[id(tensor)] for tensor in tensors if id(tensor) in inputs)
