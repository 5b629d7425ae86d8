"""Sidecars in memory: round trips, what cannot be made, plans, and checks against a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sidecar_samples import FIRST, GRID, WIDE, layer_cards, small_sidecar

from veda_compile.errors import SidecarError, VedaError
from veda_compile.sidecar import GridPlan, LayerCard, ModelCard, Sidecar

NAME = "model.veda.safetensors"


@pytest.mark.parametrize("score", ["closed_form", "mean", "projection"])
def test_round_trip_is_exact(tmp_path: Path, score: str) -> None:
    made = small_sidecar(score)
    made.save(tmp_path / NAME)
    read = Sidecar.load(tmp_path / NAME)
    assert read.model == made.model and read.plans == made.plans
    assert (read.score, read.tile_size) == (made.score, made.tile_size)
    assert read.provenance == made.provenance
    assert read.source == str(tmp_path / NAME)
    assert len(read.projections) == len(made.projections)
    assert all(map(torch.equal, read.projections, made.projections))
    assert read.grids == (GRID, WIDE)


def test_projections_may_be_views_of_one_tensor(tmp_path: Path) -> None:
    made = small_sidecar("projection")
    stacked = torch.stack(made.projections).unbind(0)
    dataclasses.replace(made, projections=stacked).save(tmp_path / NAME)
    assert all(map(torch.equal, Sidecar.load(tmp_path / NAME).projections, stacked))


def test_provenance_is_copied_and_plain() -> None:
    grids = [(5, 16, 24)]
    made = dataclasses.replace(small_sidecar(), provenance={"grids": grids})
    grids.clear()
    assert made.provenance == {"grids": [[5, 16, 24]]}


def test_save_refuses_what_was_broken_in_place(tmp_path: Path) -> None:
    made = small_sidecar("projection")
    made.projections[1][0, 0, 0, 0] = float("nan")
    with pytest.raises(SidecarError, match=r"blocks\.1\.attn1 holds NaN"):
        made.save(tmp_path / NAME)
    assert list(tmp_path.iterdir()) == []


def remake(**changes: Any) -> Sidecar:
    return dataclasses.replace(small_sidecar(), **changes)


def replan(**changes: Any) -> Sidecar:
    return remake(plans=(dataclasses.replace(small_sidecar().plans[0], **changes),))


SHAPES = small_sidecar().plans[0].tile_shapes
DENSITY = small_sidecar().plans[0].density
CARDS = layer_cards()

INVALID = {
    "heads-0": (lambda: LayerCard("a", 0, 8), "heads of layer a is 0"),
    "heads-4097": (lambda: LayerCard("a", 4097, 8), "4097: must be an int from 1 to 4096"),
    "heads-bool": (lambda: LayerCard("a", True, 8), "True"),
    "heads-numpy": (lambda: LayerCard("a", np.int64(3), 8), "3"),  # type: ignore[arg-type]
    "head_dim-1025": (lambda: LayerCard("a", 3, 1025), "head_dim of layer a is 1025"),
    "head_dim-float": (lambda: LayerCard("a", 3, 8.0), "8.0"),  # type: ignore[arg-type]
    "name-empty": (lambda: LayerCard("", 3, 8), "''"),
    "name-slash": (lambda: LayerCard("a/b", 3, 8), "'a/b'"),
    "name-control": (lambda: LayerCard("a\x1b[0m", 3, 8), r"\x1b"),
    "name-long": (lambda: LayerCard("a" * 513, 3, 8), "512"),
    "fingerprint": (lambda: LayerCard("a", 3, 8, "XYZ"), "'XYZ'"),
    "class": (lambda: ModelCard("", CARDS), "model class is ''"),
    "no-layers": (lambda: ModelCard("Wan", ()), "0 layers"),
    "10001-layers": (lambda: ModelCard("Wan", CARDS[:1] * 10_001), "10001 layers"),
    "layer-twice": (lambda: ModelCard("Wan", (CARDS[0], CARDS[0])), "blocks.0.attn1 appears twice"),
    "layer-type": (lambda: ModelCard("Wan", ("a",)), "'a'"),  # type: ignore[arg-type]
    "side-0": (lambda: replan(grid=(5, 0, 24)), "(5, 0, 24)"),
    "side-65537": (lambda: replan(grid=(5, 65_537, 24)), "65537"),
    "grid-two": (lambda: replan(grid=(5, 16)), "(5, 16)"),
    "no-plans": (lambda: remake(plans=()), "plans is ()"),
    "grid-twice": (
        lambda: remake(plans=small_sidecar().plans[:1] * 2),
        "(5, 16, 24) appears twice",
    ),
    "layers-few": (lambda: replan(tile_shapes=SHAPES[:1], density=DENSITY[:1]), "1 layers"),
    "layers-differ": (lambda: replan(tile_shapes=SHAPES[:1]), "1 layers and densities for 2"),
    "heads-few": (lambda: replan(density=(DENSITY[0], (0.1,))), "3 tile shapes and 1 densities"),
    "nested-wrongly": (lambda: replan(tile_shapes=((1, 2), (3, 4))), "per layer and head"),
    "product": (lambda: replan(tile_shapes=(SHAPES[0], ((2, 4, 8),) * 3)), "(2, 4, 8)"),
    "side-negative": (lambda: replan(tile_shapes=(SHAPES[0], ((-2, -8, 8),) * 3)), "(-2, -8, 8)"),
    "density-0": (lambda: replan(density=(DENSITY[0], (0.1, 0.0, 0.1))), "0.0"),
    "density-1.5": (lambda: replan(density=(DENSITY[0], (0.1, 1.5, 0.1))), "1.5"),
    "density-nan": (lambda: replan(density=(DENSITY[0], (0.1, float("nan"), 0.1))), "nan"),
    "density-text": (lambda: replan(density=(DENSITY[0], ("all", 0.1, 0.1))), "'all'"),
    "tile_size-100": (lambda: remake(tile_size=100), "tile_size is 100"),
    "tile_size-64": (lambda: remake(tile_size=64), "tile size, 64"),
    "tile_size-float": (lambda: remake(tile_size=128.0), "128.0"),
    "score": (lambda: remake(score="best"), "'best'"),
    "projection-none": (lambda: remake(score="projection"), "0 projections"),
    "projection-extra": (lambda: remake(projections=(torch.ones(1),)), "1 projections"),
    "provenance-list": (lambda: remake(provenance=[1]), "[1]"),
    "provenance-nan": (lambda: remake(provenance={"a": [float("nan")]}), "provenance.a[0] is nan"),
    "provenance-key": (lambda: remake(provenance={"a": {1: 2}}), "provenance.a has the key 1"),
    "provenance-type": (lambda: remake(provenance={"a": {1}}), "{1}"),
    "provenance-tensor": (lambda: remake(provenance={"a": torch.ones(2)}), "shape (2,)"),
    "provenance-int": (lambda: remake(provenance={"a": 2**63}), str(2**63)),
    "model": (lambda: remake(model="Wan"), "'Wan'"),
}


@pytest.mark.parametrize(("make", "named"), INVALID.values(), ids=INVALID)
def test_invalid_sidecars_cannot_be_made(make: Any, named: str) -> None:
    with pytest.raises(SidecarError) as caught:
        make()
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, VedaError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("tensor", "named"),
    [
        (torch.zeros(2, 3, 24, 8, dtype=torch.bfloat16), "torch.bfloat16"),
        (torch.zeros(2, 4, 24, 8), "(2, 4, 24, 8)"),
        (torch.full((2, 3, 24, 8), float("inf")), "infinity"),
        (torch.zeros(2, 3, 24, 8, device="meta"), "meta"),
        ("weights", "'weights'"),
    ],
)
def test_invalid_projections_cannot_be_made(tensor: Any, named: str) -> None:
    made = small_sidecar("projection")
    with pytest.raises(SidecarError) as caught:
        dataclasses.replace(made, projections=(made.projections[0], tensor))
    assert named in str(caught.value) and "blocks.1.attn1" in str(caught.value)


def test_absurd_totals_are_refused() -> None:
    cards = layer_cards(2000, heads=1000)
    with pytest.raises(SidecarError, match="2000000 head plans"):
        Sidecar.uniform("Wan", cards, GRID, (2, 8, 8))
    cards = layer_cards(100, heads=40, head_dim=1024)
    with pytest.raises(SidecarError, match="25165824000 values"):
        Sidecar.uniform("Wan", cards, GRID, (2, 8, 8), score="projection")


def test_uniform() -> None:
    made = Sidecar.uniform("Wan", CARDS, GRID, (4, 4, 4), 0.3, "mean", {"seed": 1})
    plan, match = made.plan_for(FIRST, GRID)
    assert match.exact and plan.tile_shapes == ((4, 4, 4),) * 3 and plan.density == (0.3,) * 3
    assert (made.tile_size, plan.score, made.provenance) == (64, "mean", {"seed": 1})
    assert made.layer_independent
    shapes = ((4, 4, 4), (1, 4, 16), (1, 8, 8))
    per_head = Sidecar.uniform("Wan", CARDS, GRID, shapes, [0.1, 0.2, 0.3])
    plan, _ = per_head.plan_for(CARDS[1].name, GRID)
    assert plan.tile_shapes == shapes and plan.density == (0.1, 0.2, 0.3)
    with pytest.raises(SidecarError, match="2 tile shapes"):
        Sidecar.uniform("Wan", CARDS, GRID, shapes[:2])


def test_fingerprints() -> None:
    made = small_sidecar()
    assert made.fingerprints_unique()
    assert made.layer_by_fingerprint(f"{2:032x}") == CARDS[1]
    assert made.layer_by_fingerprint("0" * 32) is None
    for mark in (None, CARDS[0].fingerprint):
        second = dataclasses.replace(CARDS[1], fingerprint=mark)
        same = remake(model=ModelCard("Wan", (CARDS[0], second)))
        assert not same.fingerprints_unique()
    assert same.layer_by_fingerprint(CARDS[0].fingerprint or "") is None


def test_layer_independent() -> None:
    assert not small_sidecar().layer_independent
    shapes, density = (SHAPES[0],) * 2, (DENSITY[0],) * 2
    assert replan(tile_shapes=shapes, density=density).layer_independent
    assert not replan(tile_shapes=shapes).layer_independent
    assert not replan(density=density).layer_independent
    plans = (GridPlan(GRID, shapes, density),)
    made = dataclasses.replace(small_sidecar("projection"), plans=plans)
    assert not made.layer_independent
    tied = dataclasses.replace(made, projections=(made.projections[0],) * 2)
    assert tied.layer_independent


def test_check_model_accepts_its_model() -> None:
    made = small_sidecar()
    made.check_model(CARDS, model_class="WanTransformer3DModel")
    made.check_model([dataclasses.replace(card, fingerprint=None) for card in CARDS])
    made.check_model(CARDS[1:], complete=False)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"heads": 12, "head_dim": 128},
            "with 3 heads of 8; the compiled model has 12 heads of 128",
        ),
        ({"head_dim": 4}, "3 heads of 4"),
        ({"name": "blocks.7.attn1"}, "blocks.7.attn1"),
        ({"fingerprint": "f" * 32}, "f" * 32),
    ],
)
def test_check_model_names_the_first_mismatch(change: dict[str, Any], named: str) -> None:
    other = [CARDS[0], dataclasses.replace(CARDS[1], **change)]
    with pytest.raises(SidecarError) as caught:
        small_sidecar().check_model(other)
    assert "was made for WanTransformer3DModel" in str(caught.value)
    assert named in str(caught.value) and "use a sidecar made for this model" in str(caught.value)


def test_check_model_wants_the_class_and_all_layers() -> None:
    with pytest.raises(SidecarError, match="compiled model is LTXVideoTransformer3DModel"):
        small_sidecar().check_model(CARDS, model_class="LTXVideoTransformer3DModel")
    with pytest.raises(
        SidecarError, match=r"whose layer blocks\.1\.attn1 the compiled model lacks"
    ):
        small_sidecar().check_model(CARDS[:1])
