"""Compiled parts: what of a model is compiled, and compiling the same with another backend."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._dynamo import convert_frame
from torch._dynamo.eval_frame import (
    _debug_get_cache_entry_list,
    cached_backends,
    innermost_backend,
)

Backend = Callable[..., Any]
MakeBackend = Callable[[Mapping[str, Any]], Backend]
"""Called with the Inductor settings of the compilation that the backend stands in for."""

_ENTRIES = ("_compiled_call_impl", "forward", "_forward")
"""Attributes that torch.compile, or a user by its hand, puts compiled functions into."""


@dataclass(frozen=True, eq=False)
class _Part:
    """A compiled function in an attribute of a module."""

    module: nn.Module
    attribute: str
    function: Any


@dataclass(frozen=True)
class _Settings:
    """What was asked of torch.compile, of what reaches a backend or Dynamo."""

    dynamic: bool | None = None
    fullgraph: bool = False
    patches: tuple[tuple[str, Any], ...] = ()


@dataclass(eq=False)
class _Contexts:
    """One of Dynamo's contexts for all parts of equal settings: they share their graphs."""

    make: MakeBackend
    backends: list[Backend] = field(default_factory=list)
    _made: list[tuple[_Settings, Any]] = field(default_factory=list)

    def of(self, settings: _Settings) -> Any:
        for known, context in self._made:
            if known == settings:
                return context
        backend = self.make(dict(settings.patches))
        self.backends.append(backend)
        # graphs of its own: another backend's do not count against its recompile limit, or its own
        # against theirs
        known_arguments = inspect.signature(torch.compile).parameters
        apart = {"isolate_recompiles": True} if "isolate_recompiles" in known_arguments else {}
        context = torch._dynamo.optimize(
            backend=backend, nopython=settings.fullgraph, dynamic=settings.dynamic, **apart
        )
        self._made.append((settings, context))
        return context


def whole(model: nn.Module) -> bool:
    """Whether the model's own call is compiled, or nothing of it is."""
    parts = _compiled_parts(model)
    inner = getattr(model, "_orig_mod", model)
    return not parts or any(part.module in (model, inner) for part in parts)


@contextmanager
def recompiled(model: nn.Module, make: MakeBackend) -> Iterator[None]:
    """Meanwhile what of `model` is compiled is so with another backend; all of it if nothing is.

    `dynamic`, `fullgraph` and settings of Inductor stay as they are. Afterwards everything is as
    before, and the graphs of the other backend are gone.
    """
    contexts = _Contexts(make)
    parts = _compiled_parts(model)
    if not parts:
        held = model.__dict__.get("_compiled_call_impl")
        parts = [_Part(model, "_compiled_call_impl", held)]
    before = [(part.module, part.attribute, dict(part.module.__dict__)) for part in parts]
    try:
        for part in parts:
            original = getattr(part.function, "_torchdynamo_orig_callable", model._call_impl)
            compiled = contexts.of(_settings(part.function))(original)
            part.module.__dict__[part.attribute] = compiled
        yield
    finally:
        for module, attribute, held in before:
            if attribute in held:
                module.__dict__[attribute] = held[attribute]
            else:
                module.__dict__.pop(attribute, None)
        _forget(contexts.backends)


def _compiled_parts(model: nn.Module) -> list[_Part]:
    return [
        _Part(module, attribute, module.__dict__[attribute])
        for module in model.modules()
        for attribute in _ENTRIES
        if _is_compiled(module.__dict__.get(attribute))
    ]


def _is_compiled(function: Any) -> bool:
    return hasattr(function, "_torchdynamo_orig_callable") and not getattr(
        function, "_torchdynamo_disable", False
    )


def _settings(function: Any) -> _Settings:
    """What a compiled function was compiled with; its context is in its closure."""
    code = getattr(function, "__code__", None)
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True) if code else ()
    context = next((cell.cell_contents for name, cell in cells if name == "self"), None)
    if context is None:
        return _Settings()
    backend = innermost_backend(context.callback)
    patches = backend.config if isinstance(backend, torch._TorchCompileInductorWrapper) else {}
    return _Settings(
        getattr(context, "_dynamic", None),
        bool(getattr(context, "fullgraph", False)),
        tuple(patches.items()),
    )


def _forget(backends: list[Backend]) -> None:
    """Give back the compiled graphs of backends that nothing uses any more."""
    for reference in list(convert_frame.input_codes.seen):
        code = reference()
        for entry in [] if code is None else _debug_get_cache_entry_list(code):
            manager = entry.guard_manager
            state = getattr(manager, "extra_state", None)
            if state is not None and any(innermost_backend(entry.backend) is b for b in backends):
                gone = torch._dynamo.guards.DeletedGuardManagerWrapper("observing has ended")
                state.invalidate(entry, gone)
    for backend in backends:
        cached_backends.pop(id(backend), None)
