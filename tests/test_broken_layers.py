"""Per-layer plans in models that Dynamo cuts inside every block: the right one, or none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distinct_sidecars import distinct_plans, save_sidecar
from small_transformers import EXACT, QUICK, Grid, distance, run, run_by_hand, wan, wan_inputs

import veda_compile
from veda_compile.kernels.layout import Layout, Video

GRID: Grid = (4, 8, 12)
NAMES = [f"blocks.{place}.attn1" for place in range(3)]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    veda_compile.reset_report()
    yield
    torch.compiler.reset()


def cut_before(model: Any, child: str) -> None:
    """Break the graph where every block calls one of its modules."""
    for block in model.blocks:
        block.get_submodule(child).register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())


def test_a_shuffled_sidecar_shows_behind_graph_breaks(tmp_path: Path) -> None:
    plans = distinct_plans(3)
    shuffled = [plans[2], plans[0], plans[1]]
    model = wan(layers=3)
    layout = Layout.of(Video(*GRID))
    wanted = run_by_hand(model, wan_inputs(GRID), layout, dict(zip(NAMES, plans, strict=True)))
    cut_before(model, "attn2")
    for given, right in ((plans, True), (shuffled, False)):
        torch.compiler.reset()
        veda_compile.reset_report()
        path = save_sidecar(tmp_path / f"{right}.veda.safetensors", model, NAMES, given, [GRID])
        call = torch.compile(model, backend="veda", options={**QUICK, "sidecar": path})
        for _ in range(2):
            found = distance(run(call, wan_inputs(GRID)), wanted)
            assert found <= EXACT if right else found > 100 * EXACT
        report = veda_compile.report()
        assert len(report.graphs) > 1
        served = [layer for s in report.sites if s.rewritten for layer in s.layers]
        assert sorted(served) == NAMES


def test_a_break_within_the_layer_stays_dense_and_its_remedy_works(tmp_path: Path) -> None:
    model = wan(layers=3)
    path = save_sidecar(tmp_path / "a.veda.safetensors", model, NAMES, distinct_plans(3), [GRID])
    cut = [block.attn1.norm_k.register_forward_hook(lambda *_: torch._dynamo.graph_break())
           for block in model.blocks]  # fmt: skip
    dense = run(model, wan_inputs(GRID))
    options = {**QUICK, "sidecar": path}
    out = run(torch.compile(model, backend="veda", options=options), wan_inputs(GRID))
    sites = [s for s in veda_compile.report().sites if s.reason != "CROSS_ATTENTION"]
    assert torch.equal(out, dense)
    assert sites and {s.reason for s in sites} <= {"LAYER_UNKNOWN", "NO_PROVENANCE", "NO_GRID"}
    assert all("keep projections and attention in one graph" in str(s.remedy) for s in sites)
    for handle in cut:
        handle.remove()
    torch.compiler.reset()
    veda_compile.reset_report()
    run(torch.compile(model, backend="veda", options=options), wan_inputs(GRID))
    assert [s.layer for s in veda_compile.report().sites if s.rewritten] == NAMES
