"""Layer names: whose attention a compiled graph computes in this call, as the model names it.

A graph names its layers from where tracing began. Where that is one of forty equal blocks, only
the call tells which: by the very parameters it brings, else by their contents, else by the modules
that are being called.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from .errors import VedaError
from .fingerprint import fingerprint, module_tensors
from .model_search import modules_in_progress
from .passes.layers import parameter_path

_KEPT_CALLS = 4_096


def graph_parameters(gm: fx.GraphModule) -> list[tuple[str, int]]:
    """(path from where tracing began, position among the inputs) of a graph's parameters."""
    found = []
    for place, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        path = parameter_path(node)
        if path is not None:
            found.append((path, place))
    return found


class ModelNames:
    """The names of a model's modules and parameters, without what torch.compile puts in between."""

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)
        self._owners: dict[int, tuple[weakref.ref[torch.Tensor], list[str]]] = {}

    def of_tensor(self, tensor: torch.Tensor) -> list[str]:
        """The names of a parameter; more than one where it is shared, none where it is no part."""
        held = self._owners.get(id(tensor))
        if held is None or held[0]() is not tensor:
            self._read()
            held = self._owners.get(id(tensor))
        return [] if held is None else held[1]

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Every module with its name; a wrapper has the name of what it wraps."""
        model = self.model()
        if model is not None:
            for name, module in model.named_modules():
                yield _plain(name), module

    def _read(self) -> None:
        model = self.model()
        self._owners.clear()
        for name, tensor in [] if model is None else model.named_parameters(remove_duplicate=False):
            held = self._owners.setdefault(id(tensor), (weakref.ref(tensor), []))
            held[1].append(_plain(name))


class SiteName:
    """Tells the layer of one attention call of a graph, run by run."""

    def __init__(
        self, names: ModelNames, layer: str | None, parameters: Sequence[tuple[str, int]]
    ) -> None:
        """layer: its name in the graph. parameters: `graph_parameters` of the graph."""
        self._names = names
        self._layer = layer or ""
        self._parameters = _nearest(self._layer, parameters)
        self._known: dict[tuple[int, ...], tuple[list[weakref.ref[torch.Tensor]], str]] = {}

    def __call__(self, args: Sequence[Any], mark: str | None) -> str:
        """args: of the run; mark: the layer's fingerprint. Raises VedaError where it is unclear."""
        if not self._parameters:
            return self._by_contents(mark) or self._by_callers()
        tensors = [args[place] for _, place in self._parameters]
        key = tuple(map(id, tensors))
        known = self._known.get(key)
        if known is None or not all(r() is t for r, t in zip(known[0], tensors, strict=True)):
            name = self._by_identity(tensors) or self._by_contents(mark) or self._by_callers()
            if len(self._known) >= _KEPT_CALLS:
                self._known.clear()
            known = self._known[key] = ([weakref.ref(tensor) for tensor in tensors], name)
        return known[1]

    def _by_identity(self, tensors: Sequence[torch.Tensor]) -> str | None:
        """The layer whose parameters these are. All of one layer may be those of another too: the
        first is as good as the others then."""
        roots: list[str] | None = None
        for (path, _), tensor in zip(self._parameters, tensors, strict=True):
            names = [name for name in self._names.of_tensor(tensor) if _ends(name, path)]
            here = [name[: len(name) - len(path)] for name in names]
            if here:
                roots = here if roots is None else [root for root in roots if root in here]
        return (roots[0] + self._layer).removesuffix(".") if roots else None

    def _by_contents(self, mark: str | None) -> str | None:
        """The layer with this fingerprint; None if there is none, or it has none."""
        if mark is None:
            return None
        alike = {
            name: module
            for name, module in self._names.modules()
            if _ends(name, self._layer) and fingerprint(module_tensors(module)) == mark
        }
        if len(alike) > 1 and not _all_equal(list(alike.values())):
            raise VedaError(
                f"the layers {', '.join(alike)} have equal small parameters and cannot be told "
                "apart where they run: compile the whole model, not its blocks, to observe it"
            )
        return next(iter(alike), None)

    def _by_callers(self) -> str:
        """The layer inside the innermost module that is being called."""
        paths: dict[int, str] = {}
        for name, module in self._names.modules():
            paths.setdefault(id(module), name)
        existing = set(paths.values())
        for module in modules_in_progress():
            path = paths.get(id(module))
            if path is not None:
                inside = ".".join(part for part in (path, self._layer) if part)
                found = inside if inside in existing else path
                if found:
                    return found
        raise VedaError(
            f"attention call {self._layer or 'without a name'} belongs to no layer of "
            "the observed model: compile the model itself, not a function around it"
        )


def _nearest(layer: str, parameters: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """The parameters of the innermost module around `layer` that has any."""
    prefix = layer
    while prefix:
        inside = [(path, place) for path, place in parameters if path.startswith(prefix + ".")]
        if inside:
            return inside
        prefix = prefix.rpartition(".")[0]
    return list(parameters)


def _ends(name: str, path: str) -> bool:
    return not path or name == path or name.endswith("." + path)


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _all_equal(modules: Sequence[nn.Module]) -> bool:
    """Whether modules hold the same parameters, value by value."""
    first, *others = [module.state_dict() for module in modules]
    return all(
        first.keys() == other.keys() and all(torch.equal(first[key], other[key]) for key in first)
        for other in others
    )
