"""benchmarks.ablation and benchmarks.unseen_grids: what the variants are, and what is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from small_transformers import Grid, run, wan, wan_inputs

from benchmarks.ablation.learning import load
from benchmarks.ablation.measure import measure, ratio_of, rows, verdict
from benchmarks.ablation.uncounted import by_scores, without_log_sizes
from benchmarks.ablation.variants import (
    CLOSED_FORM,
    EVERYTHING,
    SCORED,
    Variant,
    all_variants,
    ragged_variants,
)
from benchmarks.fields import video_qkv
from benchmarks.quality.rule import Choice, Site, attend, by_plan
from benchmarks.unseen_grids import parsed, rows_of, variants_on
from veda_compile import distill
from veda_compile.distill_state import save_state
from veda_compile.distiller import Distiller
from veda_compile.kernels.layout import Video
from veda_compile.kernels.plan import Plan
from veda_compile.kernels.static_modes import StaticMode

GRID: Grid = (4, 8, 12)
FLIPPED: Grid = (4, 12, 8)
NAME = "WanTransformer3DModel"
DENSITY = 0.4


def site(grid: Grid, layer: int = 0, seed: int = 0, width: int = 16) -> Site:
    q, k, v = video_qkv(Video(*grid), 2, width, torch.float32, "cpu", seed)
    return Site(3.0 * q, k, v, grid, layer)


def learned_on(grid: Grid, out: Path, runs: int = 5) -> Distiller:
    """With the fourth run set apart, and trained on in the fifth."""
    model, find = wan(), {"min_tokens": 0, "inner": "eager"}
    with distill(model, out, DENSITY, share=1.0, options=find, progress=False, train=True) as job:
        for seed in range(runs):
            for step in (1000, 750, 500, 250):
                run(model, wan_inputs(grid, seed) | {"timestep": torch.tensor([step])})
    state = out.with_name("kept.job.veda.safetensors")
    save_state(job.learned, NAME, state)
    return load(state, NAME, DENSITY)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Distiller:
    return learned_on(GRID, tmp_path_factory.mktemp("one") / "wan.veda.safetensors")


def kept(choice: Choice) -> list[list[int]]:
    """Of every query tile the tiles kept."""
    counts, indices = choice.selection.counts.flatten(), choice.selection.indices.flatten(0, 2)
    return [row[:n].tolist() for row, n in zip(indices, counts.tolist(), strict=True)]


def plans(width: int) -> list[Plan]:
    shapes, budgets = ((4, 4, 4), (1, 8, 8)), (0.3, 0.5)
    weights = 0.3 * torch.randn(2, 2, 3 * width, width, generator=torch.Generator().manual_seed(0))
    return [
        Plan(shapes, budgets),
        Plan(shapes, budgets, "projection", weights),
        Plan(shapes, budgets, modes=(None, StaticMode("diagonal", (1, 0)))),
    ]


def test_without_log_sizes_only_ragged_tiles_differ() -> None:
    ragged, full = site((7, 15, 13)), site((8, 8, 16))
    for plan in plans(16):
        assert kept(by_scores(ragged, plan, 1.0)) == kept(by_plan(ragged, plan))
        assert kept(without_log_sizes(ragged, plan)) != kept(by_plan(ragged, plan))
        assert kept(without_log_sizes(full, plan)) == kept(by_plan(full, plan))
        sizes = [without_log_sizes(ragged, plan).density, by_plan(ragged, plan).density]
        assert torch.equal(*sizes)


def test_variants_differ_in_what_they_say(learned: Distiller) -> None:
    made = {each.name: each for each in all_variants(learned, NAME, GRID, DENSITY)}
    assert {each.against for each in made.values()} <= set(made)
    whole = made[EVERYTHING].plans
    choices = learned.choices(GRID)
    assert [plan.tile_shapes for plan in whole] == [each.shapes for each in choices.values()]

    def heads(name: str, what: str) -> set[Any]:
        return {value for plan in made[name].plans for value in getattr(plan, what)}

    assert len(heads(EVERYTHING, "tile_shapes")) > 1
    assert len(heads("one tile shape", "tile_shapes")) == 1
    assert len(heads(CLOSED_FORM, "tile_shapes")) == 1
    assert heads(f"{SCORED}, one density", "density") == {DENSITY}
    assert len(heads(SCORED, "density")) > 1
    assert all(plan.modes is None for plan in made[SCORED].plans)
    assert any(plan.modes is not None for plan in whole)
    assert all(None not in (plan.modes or (None,)) for plan in made["static modes alone"].plans)
    assert {plan.score for plan in made["mean score"].plans} == {"mean"}
    for name, differs in (("factors of rank 8", "factors"), ("projections off", "projection")):
        for mine, theirs in zip(made[name].plans, whole, strict=True):
            for part in ("tile_shapes", "density", "modes"):
                assert getattr(mine, part) == getattr(theirs, part)
            assert (getattr(mine, differs) is None) == (differs == "projection")
    trained = [plan.projection for plan in made["projections in all heads"].plans]
    for weights, name in zip(trained, learned.layers, strict=True):
        assert torch.equal(weights, learned.trainers[name].weights.detach())


def test_variants_spend_the_same(learned: Distiller) -> None:
    """Twenty-four tiles a row are few: a head's least step is 1 / 24."""
    for variant in all_variants(learned, NAME, GRID, DENSITY):
        spent = [variant.choose(site(GRID, layer, width=24)).density for layer in range(3)]
        slack = 0.12 if "static" in variant.name else 0.06
        assert abs(float(torch.stack(spent).mean()) - DENSITY) < slack, variant.name


def test_errors_are_relative_and_compared_clip_by_clip() -> None:
    plan, full = Plan.uniform(2, (4, 4, 4), 0.3), Plan.uniform(2, (4, 4, 4), 1.0)
    variants = [
        Variant(EVERYTHING, "-", 0.3, (plan, plan)),
        Variant("exact", "-", 0.3, (full, full)),
    ]
    clips = [[site((8, 8, 16), layer, seed + layer) for layer in (0, 1)] for seed in (0, 5, 9)]
    done: list[None] = []
    found = measure(variants, clips, lambda: done.append(None))
    assert len(done) == 3
    assert float(found[1].by_layer.max()) < 1e-9
    one = clips[1][0]
    exact = torch.nn.functional.scaled_dot_product_attention(one.q, one.k, one.v)
    wrong = (attend(by_plan(one, plan))[0] - exact).square().sum((0, 2, 3))
    assert torch.allclose(found[0].wrong[1][0], wrong)
    layer = wrong.sum() / exact.square().sum()
    assert 0.0 < float(layer) < 1.0
    rest = found[0].wrong[1][1].sum() / found[0].length[1][1].sum()
    assert float(found[0].by_layer[1]) == pytest.approx(float((layer + rest) / 2))
    (row, _) = rows(found, (8, 8, 16))
    assert (row["ratio"], row["verdict"]) == (1.0, "-")
    assert row["kept"] == pytest.approx(0.3, abs=0.02)
    assert 0.3 < row["retained_mass"] < 1.0


def test_verdicts() -> None:
    base = torch.tensor([0.1, 0.4, 0.2, 0.3])
    ratio, interval = ratio_of(2.0 * base, base)
    assert ratio == pytest.approx(2.0) and interval == pytest.approx((2.0, 2.0))
    assert verdict(interval) == "helps"
    assert verdict(ratio_of(0.5 * base, base)[1]) == "harms"
    assert verdict(ratio_of(base, base)[1]) == "no difference shown"
    assert verdict(ratio_of(base * torch.tensor([1.2, 0.9, 1.1, 0.8]), base)[1]) == (
        "no difference shown"
    )


def test_plans_of_another_grid(learned: Distiller, tmp_path: Path) -> None:
    other = learned_on(FLIPPED, tmp_path / "wan.veda.safetensors", runs=2)
    model = wan()
    made = variants_on(model, {GRID: learned, FLIPPED: other}, FLIPPED, DENSITY)
    assert [each.part for each in made] == ["own", "nearest", "none"]
    own, theirs, _ = (each.plans for each in made)
    assert [p.tile_shapes for p in own] == [c.shapes for c in other.choices(FLIPPED).values()]
    assert [p.tile_shapes for p in theirs] == [c.shapes for c in learned.choices(GRID).values()]
    clips = [[site(FLIPPED, layer, seed, width=24) for layer in range(3)] for seed in (0, 9)]
    found = rows_of(measure(made, clips, lambda: None), FLIPPED)
    assert found[0]["times_own"] == found[2]["times_closed_form"] == 1.0
    by_clip = [row["error_by_clip"] for row in found]
    wanted = [a / b for a, b in zip(by_clip[1], by_clip[0], strict=True)]
    assert found[1]["times_own"] == pytest.approx((wanted[0] * wanted[1]) ** 0.5)
    for text in ("16x16", "16x16xa", "0x16x16", "16x9x16"):
        with pytest.raises(typer.BadParameter, match="TxHxW"):
            parsed(text)
    assert parsed("16x12x20") == (16, 12, 20)


def test_ragged_variants_are_paired(learned: Distiller) -> None:
    made = ragged_variants(learned, NAME, (3, 7, 13), DENSITY)
    for base, other in (made[:2], made[2:]):
        assert base.plans is other.plans and other.against == base.name
        assert base.counts_rows and not other.counts_rows
