"""Sidecars whose layers all differ, so that a plan in the wrong layer shows in the output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small_transformers import Grid
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from veda_compile.errors import VedaError
from veda_compile.fingerprint import fingerprint, module_tensors
from veda_compile.kernels.plan import Plan
from veda_compile.sidecar import GridPlan, LayerCard, ModelCard, Sidecar

HEADS = 2
_SHAPES = ((4, 4, 4), (1, 8, 8), (2, 4, 8), (4, 2, 8), (1, 16, 4))
_DENSITY = (0.17, 0.5, 0.34, 0.67, 0.25)


def distinct_plans(count: int, turn: int = 0, score: str = "closed_form") -> list[Plan]:
    """A plan per layer, no two alike; `turn` hands every layer the plan of a later one."""
    plans = []
    for index in (place + turn for place in range(count)):
        shapes = tuple(_SHAPES[(index + head) % len(_SHAPES)] for head in range(HEADS))
        density = tuple(_DENSITY[(index + 2 * head) % len(_DENSITY)] for head in range(HEADS))
        plans.append(Plan(shapes, density, score))
    return plans


def layer_card(model: nn.Module, name: str, head_dim: int) -> LayerCard:
    return LayerCard(name, HEADS, head_dim, fingerprint(module_tensors(model.get_submodule(name))))


def save_sidecar(
    path: Path,
    model: nn.Module,
    layers: Sequence[str],
    plans: Sequence[Plan],
    grids: Sequence[Grid],
    head_dim: int = 24,
) -> str:
    """Write a sidecar for the model as it is, with the same plans on every grid."""
    cards = tuple(layer_card(model, name, head_dim) for name in layers)
    table = [
        GridPlan(grid, tuple(p.tile_shapes for p in plans), tuple(p.density for p in plans))
        for grid in grids
    ]
    made = Sidecar(
        ModelCard(type(model).__name__, cards),
        tuple(table),
        plans[0].score,
        plans[0].tile_size,
        projections=tuple(p.projection for p in plans if p.projection is not None),
    )
    made.save(path)
    return str(path)


@contextmanager
def refused(error: type[VedaError], *named: str) -> Iterator[None]:
    """Our error and all of `named` in its message, bare or inside torch's one wrapper around it."""
    with pytest.raises((error, BackendCompilerFailed)) as caught:
        yield
    found: Any = caught.value
    if isinstance(found, BackendCompilerFailed):
        found = found.inner_exception
    assert isinstance(found, error), repr(found)
    for text in named:
        assert text in str(found), f"{text!r} is not in {str(found)!r}"


def swap_contents(a: nn.Module, b: nn.Module) -> None:
    """Exchange the values of two layers' one-dimensional parameters, in place."""
    with torch.no_grad():
        for x, y in zip(module_tensors(a), module_tensors(b), strict=True):
            held = x.clone()
            x.copy_(y)
            y.copy_(held)
