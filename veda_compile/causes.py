"""Likely causes of attention that never reached the backend, and what to do about each.

Everything here reads state that is already there: the model, Dynamo's records, diffusers' registry.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from .grouping import joint_name, joint_text, pattern
from .missed import WATCH, Break, WatchedModel

_FLAGS = (
    "set torch._dynamo.config.capture_dynamic_output_shape_ops = True and "
    "torch._dynamo.config.capture_scalar_outputs = True before compiling"
)
_FIND_OUT = (
    "compile with fullgraph=True, or run with TORCH_LOGS=graph_breaks, to see what stays outside"
)


@dataclass(frozen=True)
class Missed:
    """Attention that was never judged: it ran dense if it ran. layer None: all of the model;
    model None: all models."""

    model: str | None
    layer: str | None
    cause: str
    remedy: str

    def to_dict(self) -> dict[str, str | None]:
        """Plain data, as `Report.to_dict` shows it."""
        return {
            "model": self.model,
            "layer": self.layer,
            "cause": self.cause,
            "remedy": self.remedy,
        }


def in_words(missed: Sequence[Missed]) -> list[str]:
    """One sentence for each kind of layer, naming all of its layers."""
    kinds: dict[tuple[str, str, str], list[Missed]] = {}
    for one in missed:
        key = (pattern(one.layer or one.model or "all"), pattern(one.cause), one.remedy)
        kinds.setdefault(key, []).append(one)
    return [
        f"{joint_name([one.layer or one.model or 'all' for one in members])}: "
        f"{joint_text([one.cause for one in members])}. Remedy: {members[0].remedy}"
        for members in kinds.values()
    ]


def all_missed() -> list[Missed]:
    """What is missing in all watched models, and what keeps compiled code from running at all."""
    found = list(_switched_off())
    for watched in WATCH.models():
        found += missed_layers(watched)
        found += _limit_reached(watched)
    return found


def missed_layers(watched: WatchedModel) -> list[Missed]:
    """The attention modules of a model that no graph has shown."""
    return [
        Missed(watched.name, layer or "(the model itself)", *_cause(watched, layer))
        for layer in watched.missed()
    ]


def _cause(watched: WatchedModel, layer: str) -> tuple[str, str]:
    model, module = watched.reference(), watched.module(layer)
    if layer in watched.opaque:
        return (
            f"its graph calls {watched.opaque[layer]}, which may be attention that veda does not "
            "know",
            "name it with veda_compile.passes.attention_ops.register_attention_op, or choose an "
            "attention backend that calls scaled_dot_product_attention",
        )
    backend = None if module is None else _other_backend(module)
    if backend is not None:
        return (
            f"diffusers computes attention with its backend {backend!r} and no graph shows it",
            "model.set_attention_backend('native')",
        )
    disabled = None if model is None else _disabled(model, layer)
    if disabled is not None:
        return (
            f"{disabled} is excluded from compilation (torch.compiler.disable)",
            "take the exclusion off",
        )
    if layer in watched.partly:
        cut = _named(watched.breaks)
        return (
            "graphs hold its projections but not its attention call: a graph break lies between"
            + (f" ({cut.title} at {cut.place})" if cut else ""),
            _remedy(cut),
        )
    if model is not None and watched.by_parts and not _compiled_above(model, layer):
        block = _block(model, layer)
        return (
            f"never seen by the backend: the model is compiled in parts, and "
            f"{type(block[1]).__name__} ({block[0]}) is none of them",
            "compile those blocks too (block.compile(backend='veda', ...)), or the whole model "
            "with torch.compile",
        )
    if watched.breaks:
        cut = _named(watched.breaks)
        assert cut is not None
        return (
            "never seen by the backend: it ran outside the compiled graphs, if it ran; likely "
            f"after a graph break ({cut.title} at {cut.place})",
            _remedy(cut),
        )
    if not watched.reached and not watched.partly:
        return (
            "no graph of this model reached the backend",
            "compile it with backend='veda' and call it once before asking",
        )
    return (
        "never seen by the backend: if it ran, it ran dense",
        _FIND_OUT,
    )


def _named(breaks: list[Break]) -> Break | None:
    """The break to name: one with a known remedy if there is any."""
    if not breaks:
        return None
    return next((cut for cut in breaks if _wants_flags(cut)), breaks[0])


def _wants_flags(cut: Break) -> bool:
    return "capture_dynamic_output_shape_ops" in cut.reason or "capture_scalar" in cut.reason


def _remedy(cut: Break | None) -> str:
    return _FLAGS if cut is not None and _wants_flags(cut) else _FIND_OUT


def _ancestors(model: nn.Module, layer: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules on the way to a layer with their paths, from the model to the layer."""
    module, path = model, ""
    yield path, module
    for part in layer.split(".") if layer else ():
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module):
            return
        path, module = (f"{path}.{part}" if path else part), child
        yield path, module


def _compiled_above(model: nn.Module, layer: str) -> bool:
    """Whether the layer, or a module around it, was handed to torch.compile."""
    return any(
        module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
        for _, module in _ancestors(model, layer)
    )


def _block(model: nn.Module, layer: str) -> tuple[str, nn.Module]:
    """The member of a list of modules that a layer belongs to, or the layer itself."""
    way = list(_ancestors(model, layer))
    for (_, outer), block in pairwise(way):
        if isinstance(outer, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            return block
    return way[-1]


def _disabled(model: nn.Module, layer: str) -> str | None:
    """The name of a module around the layer whose forward Dynamo was told to skip."""
    for path, module in _ancestors(model, layer):
        processor = type(getattr(module, "processor", None))
        for owner, function in (
            (path, module.forward),
            (f"{path}.processor", vars(processor).get("__call__")),
        ):
            if getattr(function, "_torchdynamo_disable", False):
                return owner or "the model's forward"
    return None


def _other_backend(module: nn.Module) -> str | None:
    """diffusers' attention backend for this module where it is not torch's own attention."""
    dispatch: Any = sys.modules.get("diffusers.models.attention_dispatch")
    processor: Any = getattr(module, "processor", None)
    if dispatch is None or not hasattr(processor, "_attention_backend"):
        return None
    chosen = processor._attention_backend or dispatch._AttentionBackendRegistry._active_backend
    name = str(getattr(chosen, "value", chosen))
    return None if name.lstrip("_").startswith("native") else name


def _switched_off() -> Iterator[Missed]:
    """Settings of torch that keep compiled code from running; their effect is on every model."""
    stance = getattr(_dynamo("eval_frame"), "_stance", None)
    name = getattr(stance, "stance", "default")
    if name in ("force_eager", "eager_on_recompile"):
        what = (
            "compiled models run eager"
            if name == "force_eager"
            else "calls that would need a new compilation run eager"
        )
        yield Missed(
            None,
            None,
            f"torch.compiler.set_stance({name!r}) is in force: {what}, so their attention is dense",
            "torch.compiler.set_stance('default')",
        )
    if getattr(_dynamo("config"), "disable", False):
        yield Missed(
            None,
            None,
            "torch._dynamo.config.disable is on: compiled models run eager, so their attention is "
            "dense",
            "set it to False, and unset TORCH_COMPILE_DISABLE and TORCHDYNAMO_DISABLE",
        )


def _limit_reached(watched: WatchedModel) -> Iterator[Missed]:
    """Layers whose graphs Dynamo has stopped to recompile."""
    frames = {
        str(record.compile_id).partition("/")[0]
        for record in _compilations()
        if str(record.fail_reason).startswith("Dynamo recompile limit exceeded")
        and (record.start_time or 0.0) >= watched.since
    }
    for layer, seen_in in watched.reached.items():
        if frames & seen_in:
            yield Missed(
                watched.name,
                layer,
                "the recompile limit was reached: calls that fit none of its compiled graphs run "
                "dense",
                "compile with dynamic=True, or raise torch._dynamo.config.recompile_limit; "
                "TORCH_LOGS=recompiles says what changes",
            )


def _compilations() -> list[Any]:
    records: list[Any] = _dynamo("utils").get_compilation_metrics() if _dynamo("utils") else []
    return records


def _dynamo(name: str) -> Any:
    """A module of Dynamo if it is in use; asking for a report must not load it."""
    return sys.modules.get(f"torch._dynamo.{name}")
