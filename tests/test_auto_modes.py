"""Option sidecar="auto": heads that look by position alone are found and become static."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from auto_runs import apart, compiled, compiles, forget, states
from small_transformers import EXACT, QUICK, distance
from torch import Tensor, nn

import veda_compile
from veda_compile import Sidecar
from veda_compile.calibration_cache import cached_files
from veda_compile.kernels.layout import Layout, Video
from veda_compile.kernels.plan import factorisations, padding
from veda_compile.kernels.static_modes import StaticMode, mode_density, static_lists
from veda_compile.searched_modes import searched_modes
from veda_compile.static_candidates import stripe_of

__all__ = ["apart"]

GRID, LONGER = (8, 8, 8), (12, 8, 8)
FRAMES, WIDTH, HEADS = 16, 64, 2


class Planted(nn.Module):
    """Head 0 looks at the frames beside each token's own, head 1 at frames 2 and 5."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.to_q, self.to_k = nn.Linear(WIDTH, WIDTH, False), nn.Linear(WIDTH, WIDTH, False)
        self.to_v, self.to_out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        frames = torch.arange(FRAMES)
        looks = torch.zeros(HEADS, FRAMES, FRAMES)
        looks[0] = (frames[:, None] - frames).abs() <= 1
        looks[1, [2, 5]] = 1.0
        dim = WIDTH // HEADS
        for layer in (self.to_q, self.to_k):
            nn.init.zeros_(layer.weight)
        for head in range(HEADS):
            self.to_q.weight.data[head * dim : head * dim + FRAMES, :FRAMES] = 300.0 * looks[head]
            self.to_k.weight.data[head * dim : head * dim + FRAMES, :FRAMES] = torch.eye(FRAMES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Looking(nn.Module):
    """Tokens that know their frame, and one attention layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, WIDTH - FRAMES)
        self.attn = Planted()

    def forward(self, x: Tensor) -> Tensor:
        frames = torch.eye(FRAMES)[: x.shape[2]].repeat_interleave(x.shape[3] * x.shape[4], 0)
        tokens = self.embed(x.flatten(2).transpose(1, 2))
        return self.attn(torch.cat([frames.expand(len(x), -1, -1), tokens], -1))


def looking() -> Any:
    torch.manual_seed(0)
    return Looking().eval().requires_grad_(False)


def latents(seed: int, grid: tuple[int, int, int] = GRID) -> Tensor:
    return torch.randn(1, 4, *grid, generator=torch.Generator().manual_seed(seed))


def settle(model: Any) -> None:
    for seed in range(8):
        model(latents(seed))
    assert states() == {"sparse (calibrated now)"}


@pytest.mark.usefixtures("fresh_compiler", "apart")
def test_planted_windows_and_stripes_are_found_and_run(caplog: pytest.LogCaptureFixture) -> None:
    plain = looking()
    dense = plain(latents(20))
    model = compiled(looking(), density=0.5)
    model(latents(0))
    graphs = compiles()
    settle(model)
    (path,) = cached_files()
    (plan,) = Sidecar.load(path).plans
    assert plan.modes is not None and plan.modes[0] is not None
    window, stripe = plan.modes[0]
    assert set(plan.tile_shapes[0]) == {(1, 8, 8)}
    assert window == StaticMode("diagonal", (1, 0))
    assert stripe is not None and [int(8 * t) for t, _, _ in stripe.columns] == [2, 5]
    found = model(latents(20))
    assert compiles() == graphs == len(veda_compile.report().graphs)
    assert distance(found, dense) <= 1e-4  # they keep all that matters
    with caplog.at_level(logging.WARNING, "veda_compile"):
        other = model(latents(20, LONGER))  # which the modes keep less of than the budget is
    assert "using the nearest" in caplog.text and bool(other.isfinite().all())
    forget()
    again = compiled(looking(), density=0.5)
    assert distance(again(latents(20)), found) <= EXACT
    assert states() == {f"sparse (from cache {path})"}
    forget()
    given = torch.compile(looking(), backend="veda", options={**QUICK, "sidecar": str(path)})
    assert distance(given(latents(20)), found) <= EXACT


@pytest.mark.usefixtures("fresh_compiler", "apart")
def test_all_is_kept_where_all_is_wanted() -> None:
    """Nothing is calibrated for it."""
    model = compiled(looking(), density=1.0)
    assert distance(model(latents(20)), looking()(latents(20))) <= EXACT
    assert states() == {None} and not [*cached_files()]


@pytest.mark.usefixtures("fresh_compiler", "apart")
def test_a_file_with_more_columns_than_graphs_have_room_for_is_replaced(
    caplog: pytest.LogCaptureFixture,
) -> None:
    settle(compiled(looking(), density=0.5))
    (path,) = cached_files()
    found = Sidecar.load(path)
    places = tuple((t / 64, 0.0, 0.0) for t in range(40))
    wide = StaticMode("stripe", columns=places)
    (plan,) = found.plans
    changed = type(plan)(plan.grid, plan.tile_shapes, plan.density, ((wide, wide),))
    Sidecar(
        found.model, (changed,), found.score, found.tile_size, dict(found.provenance)
    ).save(path)  # fmt: skip
    forget()
    with caplog.at_level(logging.WARNING, "veda_compile"):
        settle(compiled(looking(), density=0.5))
    assert "will be replaced" in caplog.text
    assert Sidecar.load(path).columns == 2


GRIDS = [(4, 8, 12), (1, 16, 20), (7, 1, 1), (5, 9, 13)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_modes_tried_cost_and_keep_what_executors_make_of_them(
    grid: tuple[int, int, int],
) -> None:
    layout = Layout.of(Video(*grid))
    tried = 0
    for shape in factorisations(64):
        padded = padding(layout, shape) ** 2
        modes = searched_modes(grid, shape, 0.3)
        rows = torch.arange(modes.tiles).flip(0)
        generator = torch.Generator().manual_seed(0)
        mass = torch.rand(2, modes.tiles, generator=generator, dtype=torch.float64)
        costs = iter(modes.costs)
        for mode, keep in zip(modes.windows, modes.kept_by_windows(rows), strict=True):
            assert torch.equal(keep, static_lists(layout, shape, mode).map(rows))
            assert next(costs) == pytest.approx(mode_density(layout, shape, mode) * padded)
            tried += 1
        for count in modes.stripes:
            one = type(modes)(modes.tiles, modes.frame, (), (count,), ())
            keep = one.kept_by_stripes(mass, rows % 2, rows)[0]
            stripes = [stripe_of(each, layout, shape, count) for each in mass]
            assert stripes[0] is not None and stripes[1] is not None
            maps = [static_lists(layout, shape, mode).map(rows) for mode in stripes if mode]
            wanted = torch.where((rows % 2 == 0)[:, None], *maps)
            assert torch.equal(keep, wanted)
            cost = next(costs)
            assert cost == pytest.approx(mode_density(layout, shape, stripes[0]) * padded)
            assert cost <= 0.9
            tried += 1
        assert next(costs, None) is None
    assert tried
