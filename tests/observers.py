"""Observers for tests, and what they watch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from veda_compile.kernels.layout import Layout
from veda_compile.observing import ObservedCall
from veda_compile.sidecar_schema import LayerCard

QUICK: dict[str, Any] = {"min_tokens": 0, "inner": "eager"}


def compiles() -> int:
    return int(counters["stats"]["unique_graphs"])


@dataclass(frozen=True, eq=False)
class Kept:
    """A copy of an observed call, and the dense attention of its operands."""

    layer: LayerCard
    layout: Layout
    scale: float
    timestep: float | None
    q: Tensor
    k: Tensor
    key_valid: Tensor | None


class Notebook:
    """An observer that keeps what it gets."""

    def __init__(self) -> None:
        self.calls: list[Kept] = []

    def __call__(self, call: ObservedCall) -> None:
        valid = None if call.key_valid is None else call.key_valid.clone()
        time = None if call.timestep is None else float(call.timestep)
        assert call.timestep is None or (call.timestep.dim(), call.timestep.dtype) == (
            0,
            torch.float32,
        )
        assert not call.q.requires_grad
        self.calls.append(
            Kept(call.layer, call.layout, call.scale, time, call.q.clone(), call.k.clone(), valid)
        )

    @property
    def names(self) -> list[str]:
        return [call.layer.name for call in self.calls]

    def take(self) -> list[Kept]:
        """What was seen since the last time."""
        calls, self.calls = self.calls, []
        return calls


def regionally(model: Any, backend: Any, **settings: Any) -> Any:
    for kind in ("blocks", "transformer_blocks", "single_transformer_blocks"):
        for block in getattr(model, kind, ()):
            block.compile(backend=backend, **settings)
    return model


def state(model: nn.Module) -> list[tuple[Any, ...]]:
    """What a module is called by, of all modules."""
    return [
        (
            module,
            dict(module.__dict__),
            list(module._forward_pre_hooks.items()),
            list(module._forward_hooks.items()),
        )
        for module in model.modules()
    ]


def wan_layers(count: int) -> list[str]:
    return [f"blocks.{i}.attn1" for i in range(count)]
