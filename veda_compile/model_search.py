"""Which model a compilation belongs to, read off the calls that are in progress.

Compilation happens inside the first call, so the model's own call stands on Python's stack. Only
frames of `torch.nn.Module.__call__` are looked into; nothing is changed but for one mark on them,
see `pass_of`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from torch import fx, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.symbolic_convert import InstructionTranslator

from .attention_modules import is_model
from .missed import Pass

_CALL = nn.Module._call_impl.__code__
_MARK = "__veda_pass__"
_HOP = re.compile(r"\['([^']+)'\]|\.(\w+)|\[(\d+)\]")


@dataclass(frozen=True, eq=False)
class Search:
    """What was found.

    model: the whole model. compiled: the module torch.compile was asked to compile, where it is on
    the stack. traced: the module whose forward this graph was traced from, from its start.
    whole: that is the model, or a function around it.
    """

    model: nn.Module
    compiled: nn.Module | None
    traced: nn.Module | None
    whole: bool


def find_model(gm: fx.GraphModule) -> Search | None:
    """The model whose compilation is in progress, with `gm` one of its graphs; or None."""
    calls = [module for module, _ in _module_calls()]
    inner = [module for module in calls if not isinstance(module, OptimizedModule)]
    traced = _traced_frame()
    frame = None if traced is None else traced.module()
    if inner:
        model = _choose(inner)
        compiled = next((m for m in calls if _is_compiled(m)), None)
        if isinstance(compiled, OptimizedModule):
            compiled = compiled._orig_mod
        return Search(model, compiled, frame, frame is model)
    if traced is None:
        return None
    owner = _outermost_traced(gm, traced)
    if owner is None:
        return None
    resumed = traced.code.co_name.startswith("torch_dynamo_resume")
    return Search(owner, None, frame, not resumed)


def model_of_this_call() -> nn.Module | None:
    """The model whose call is in progress, for calls of graphs that are compiled already."""
    inner = [m for m, _ in _module_calls() if not isinstance(m, OptimizedModule)]
    return _choose(inner) if inner else None


def modules_in_progress() -> list[nn.Module]:
    """The modules being called now, innermost first."""
    return [module for module, _ in _module_calls()]


def pass_of(model: nn.Module) -> Pass | None:
    """The call of `model` in progress, the same object every time it is asked for in one call.

    It is kept among the locals of the frame that calls the model's forward, and dies with it.
    """
    frames = [frame for module, frame in _module_calls() if module is model]
    if not frames:
        return None
    found: Pass = frames[-1].f_locals.setdefault(_MARK, Pass())
    return found


def _module_calls() -> list[tuple[nn.Module, FrameType]]:
    """Modules being called now with the frames of their calls, innermost first."""
    calls = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL:
            calls.append((frame.f_locals["self"], frame))
        frame = frame.f_back
    return calls


def _choose(inner: list[nn.Module]) -> nn.Module:
    """The innermost model that stands on its own, else the outermost module."""
    return next((module for module in inner if is_model(module)), inner[-1])


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, OptimizedModule) or module._compiled_call_impl is not None


def _forward_code(module: nn.Module) -> CodeType | None:
    code = getattr(getattr(module.forward, "__func__", module.forward), "__code__", None)
    return code if isinstance(code, CodeType) else None


@dataclass(frozen=True, eq=False)
class _Traced:
    """The frame Dynamo is tracing."""

    code: CodeType
    scopes: Mapping[str, Mapping[str, Any]]

    def module(self) -> nn.Module | None:
        """The module whose forward this frame is."""
        module = self.scopes["L"].get("self")
        if isinstance(module, nn.Module) and self.code is _forward_code(module):
            return module
        return None


def _traced_frame() -> _Traced | None:
    try:
        tracer: Any = InstructionTranslator.current_tx()
        return _Traced(tracer.f_code, {"L": tracer.f_locals, "G": tracer.f_globals})
    except AttributeError:  # nothing is being traced: the backend was called by hand
        return None


def _outermost_traced(gm: fx.GraphModule, traced: _Traced) -> nn.Module | None:
    """The outermost module that Dynamo recorded for a node, looked up by its recorded path."""
    for node in gm.graph.nodes:
        for identity, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
            found: Any = traced.scopes.get(str(path)[:1])
            for item, attribute, place in _HOP.findall(str(path)[1:]):
                found = _hop(found, item, attribute, place)
                if isinstance(found, nn.Module) and str(id(found)) == str(identity):
                    return found
    return None


def _hop(value: Any, item: str, attribute: str, place: str) -> Any:
    if attribute:
        return getattr(value, attribute, None)
    if isinstance(value, Mapping):
        return value.get(item or int(place))
    if place and isinstance(value, list | tuple | nn.ModuleList):
        return value[int(place)] if int(place) < len(value) else None
    return None
