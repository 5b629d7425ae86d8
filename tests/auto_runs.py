"""Models under option sidecar="auto": a cache of their own, calls until they are sparse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_transformers import (
    QUICK,
    Grid,
    run,
    run_by_hand,
    wan_inputs,
)
from torch._dynamo.utils import counters

import veda_compile
from veda_compile import Sidecar, time_account
from veda_compile.calibration import CALIBRATIONS
from veda_compile.calibration_cache import cached_files
from veda_compile.kernels.layout import Layout, Video
from veda_compile.kernels.observe_op import waiting

GRID, LARGER = (4, 8, 12), (5, 6, 16)
AUTO: dict[str, Any] = {**QUICK, "sidecar": "auto", "density": 0.3}
LAYERS = [f"blocks.{i}.attn1" for i in range(3)]


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of its own, nothing calibrated, and as much time as measuring takes."""
    monkeypatch.setenv("VEDA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(time_account, "SHARE", 1e9)
    monkeypatch.setattr(time_account, "CALL_SHARE", 1e9)
    forget()
    yield
    assert waiting() == 0
    forget()


def forget() -> None:
    """As in a new process."""
    CALIBRATIONS.clear()
    torch.compiler.reset()
    veda_compile.reset_report()
    counters.clear()


def compiles() -> int:
    return int(counters["stats"]["unique_graphs"])


def regionally(model: Any, **options: Any) -> Any:
    for kind in ("blocks", "transformer_blocks", "single_transformer_blocks"):
        for block in getattr(model, kind, ()):
            block.compile(backend="veda", options={**AUTO, **options})
    return model


def compiled(model: Any, regional: bool = False, **options: Any) -> Any:
    if regional:
        return regionally(model, **options)
    return torch.compile(model, backend="veda", options={**AUTO, **options})


def call(model: Any, seed: int, grid: Grid = GRID) -> torch.Tensor:
    return run(model, wan_inputs(grid, seed))


def states() -> set[str | None]:
    graphs = veda_compile.report().to_dict()["graphs"]
    return {site["calibration"] for graph in graphs for site in graph["sites"]
            if site["verdict"] == "rewritten"}  # fmt: skip


def settle(model: Any, calls: int = 12, grid: Grid = GRID) -> int:
    """Call until it is sparse; after how many calls."""
    for number in range(calls):
        call(model, number, grid)
        if states() == {"sparse (calibrated now)"}:
            return number
    raise AssertionError(f"still {states()} after {calls} calls")


def planned(model: Any, seed: int, grid: Grid = GRID, used: Grid | None = None) -> torch.Tensor:
    """What the cached plans of the last calibration must make of a call."""
    sidecar = Sidecar.load(list(cached_files())[-1])
    plans = {card.name: sidecar.plan_for(card.name, grid)[0]
             for card in sidecar.model.layers}  # fmt: skip
    return run_by_hand(model, wan_inputs(grid, seed), Layout.of(Video(*grid)), plans)
