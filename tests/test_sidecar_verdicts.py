"""Verdicts that a sidecar causes: unknown layers, layers that cannot be told, folded heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distinct_sidecars import distinct_plans, refused, save_sidecar
from small_transformers import QUICK, wan, wan_inputs
from torch import nn

import veda_compile
from veda_compile.errors import SidecarError
from veda_compile.kernels.plan import Plan
from veda_compile.sidecar import LayerCard, Sidecar

GRID = (3, 4, 6)
pytestmark = pytest.mark.usefixtures("fresh_compiler")


def _run(model: Any, path: str, how: str = "whole") -> list[Any]:
    options = {**QUICK, "sidecar": path}
    with torch.no_grad():
        if how == "whole":
            torch.compile(model, backend="veda", options=options)(**wan_inputs(GRID))
        else:
            model.compile_repeated_blocks(backend="veda", options=options)
            model(**wan_inputs(GRID))
    return [s for s in veda_compile.report().sites if s.reason != "CROSS_ATTENTION"]


def test_a_layer_the_sidecar_lacks_stays_dense(tmp_path: Path) -> None:
    model = wan(layers=3)
    names = ["blocks.0.attn1", "blocks.1.attn1"]
    path = save_sidecar(tmp_path / "two.veda.safetensors", model, names, distinct_plans(2), [GRID])
    sites = _run(model, path)
    assert [(s.layer, s.reason) for s in sites] == [
        ("blocks.0.attn1", None),
        ("blocks.1.attn1", None),
        ("blocks.2.attn1", "NO_PLAN"),
    ]


def test_layers_without_fingerprints_cannot_be_told_block_by_block(tmp_path: Path) -> None:
    model = wan(layers=2)
    plans = distinct_plans(2)
    whole = Sidecar.load(
        save_sidecar(
            tmp_path / "with.veda.safetensors",
            model,
            ["blocks.0.attn1", "blocks.1.attn1"],
            plans,
            [GRID],
        )
    )
    cards = tuple(LayerCard(c.name, c.heads, c.head_dim) for c in whole.model.layers)
    bare = Sidecar(
        type(whole.model)(whole.model.model_class, cards), whole.plans, whole.score, whole.tile_size
    )
    path = tmp_path / "without.veda.safetensors"
    bare.save(path)
    assert [s.reason for s in _run(wan(layers=2), str(path))] == [None, None]
    veda_compile.reset_report()
    torch._dynamo.reset()
    (site,) = _run(model, str(path), "regional")
    assert site.reason == "LAYER_UNKNOWN"


def test_plans_that_are_alike_need_no_layer(tmp_path: Path) -> None:
    path = tmp_path / "uniform.veda.safetensors"
    cards = [LayerCard(f"blocks.{i}.attn1", 2, 24) for i in range(2)]
    Sidecar.uniform("WanTransformer3DModel", cards, GRID, (1, 8, 8), 0.5).save(path)
    (site,) = _run(wan(layers=2), str(path), "regional")
    assert (site.reason, site.tile_shapes) == (None, [(1, 8, 8)])


def test_plans_that_are_alike_are_still_for_one_model(tmp_path: Path) -> None:
    made_for = wan(layers=2, seed=1)
    path = save_sidecar(
        tmp_path / "alike.veda.safetensors",
        made_for,
        ["blocks.0.attn1", "blocks.1.attn1"],
        [Plan.uniform(2, (1, 8, 8), 0.5)] * 2,
        [GRID],
    )
    with refused(SidecarError, "alike.veda.safetensors", "other weights"):
        _run(wan(layers=2, seed=2), path, "regional")


class _Folded(nn.Module):
    """Heads folded into the batch: which head is which does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv3d(4, 48, (1, 2, 2), (1, 2, 2))
        self.attn1 = nn.Linear(48, 144)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = (
            y.unflatten(2, (2, 24)).transpose(1, 2).flatten(0, 1)
            for y in self.attn1(x).chunk(3, dim=-1)
        )
        return torch.bmm((torch.bmm(q, k.transpose(1, 2)) * 24**-0.5).softmax(-1), v)


def test_folded_heads_take_no_per_head_plan(tmp_path: Path) -> None:
    path = tmp_path / "folded.veda.safetensors"
    Sidecar.uniform("_Folded", [LayerCard("attn1", 2, 24)], GRID, (1, 8, 8), 0.5).save(path)
    x = torch.randn(1, 4, GRID[0], 2 * GRID[1], 2 * GRID[2])
    with torch.no_grad():
        torch.compile(_Folded(), backend="veda", options={**QUICK, "sidecar": str(path)})(x)
        (site,) = veda_compile.report().sites
        assert site.reason == "HEAD_SPLIT_UNPROVEN"
        veda_compile.reset_report()
        torch._dynamo.reset()
        torch.compile(_Folded(), backend="veda", options=QUICK)(x)
    (site,) = veda_compile.report().sites
    assert site.rewritten
