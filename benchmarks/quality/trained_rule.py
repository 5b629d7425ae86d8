"""The estimator of the Veda paper: linear TripPool projections trained on max-pooled mass.

One tile shape for all heads, the model frozen. The target is the largest probability of each tile
pair, rows divided by their sum; the loss is KL(target || softmax(score)), summed over key tiles and
averaged over query tiles (arXiv 2605.30325, sections on the estimator and on distillation).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from veda_compile.kernels.plan import Plan
from veda_compile.kernels.tiles import tile_table

from .rule import CUBE, Choice, Rule, Site, by_plan, gathered

STEPS = 400
RATE = 6e-4
SPREAD = 1e-4
"""Standard deviation of the initial projections."""


class Trained(Rule):
    """TripPool scores, projections by layer: (2, H, 3 D, D), for q and for k."""

    name = "trained max-pool"
    source = "Veda estimator, arXiv 2605.30325"

    def __init__(self, projections: dict[int, Tensor]) -> None:
        self._projections = projections

    def choose(self, site: Site, density: float) -> Choice:
        """The backend's score "projection"."""
        shapes, densities = (CUBE,) * site.heads, (density,) * site.heads
        plan = Plan(shapes, densities, "projection", self._projections[site.layer])
        return by_plan(site, plan)


def train(sites: Sequence[Site], done: Callable[[], None]) -> dict[int, Tensor]:
    """The projections of every layer, each trained on its own sites; `done` after each of them."""
    examples: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for site in sites:
        example = (trip_pool(site.q, site), trip_pool(site.k, site), max_target(site))
        examples.setdefault(site.layer, []).append(example)
        done()
    return {
        layer: _fit(*map(torch.cat, zip(*made, strict=True))) for layer, made in examples.items()
    }


def trip_pool(x: Tensor, site: Site) -> Tensor:
    """(1, H, n, 3 D): mean, max and min over the real rows of each tile."""
    rows, real = gathered(x, site, CUBE)
    highest = torch.where(real, rows, -torch.inf).amax(3)
    lowest = torch.where(real, rows, torch.inf).amin(3)
    return torch.cat([rows.sum(3) / real.sum(1), highest, lowest], dim=-1)


def max_target(site: Site) -> Tensor:
    """(1, H, n, n): the largest probability of each tile pair, rows adding up to 1.

    Raises ValueError where cubes do not divide the grid.
    """
    table = tile_table(site.layout, CUBE, site.q.device)
    rows = table.rows.long()
    if bool((rows < 0).any()):
        raise ValueError(f"grid {site.grid} does not divide into cubes {CUBE}")
    targets = []
    for head in range(site.heads):
        queries = site.q[0, head] * site.scale
        keys = site.k[0, head, rows.flatten()].T
        # tile by tile: a block of 64 rows stays in cache
        by_tile = [
            (queries[tile] @ keys).softmax(-1).unflatten(1, rows.shape).amax((0, 2))
            for tile in rows
        ]
        targets.append(torch.stack(by_tile))
    target = torch.stack(targets)[None]
    return target / target.sum(-1, keepdim=True)


@torch.enable_grad()
def _fit(q: Tensor, k: Tensor, target: Tensor) -> Tensor:
    """(2, H, 3 D, D) for one layer. q, k: (E, H, n, 3 D); target: (E, H, n, n)."""
    _, heads, _, wide = q.shape
    width = wide // 3
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, heads, wide, width, generator=generator) * SPREAD
    projection = start.requires_grad_()
    optimiser = torch.optim.AdamW([projection], lr=RATE)
    for _ in range(STEPS):
        sides = [x[..., :width] + x @ weight for x, weight in zip((q, k), projection, strict=True)]
        scores = sides[0] @ sides[1].transpose(-1, -2) * width**-0.5
        loss = F.kl_div(scores.log_softmax(-1), target, reduction="none").sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return projection.detach()
