"""Training the residual projections of a layer's scores on the mass that dense attention shows.

Start: zero, where the score is the closed form (kernels/scores.py). Top-k does not change under a
positive affine map of a row, so a loss that does is minimised by flattening or sharpening scores
for nothing. The loss here standardises every row, puts a soft threshold at its k-th score, and is
the share of the oracle's mass that falls outside: docs/method.md, section 6. The paper's own loss,
KL against the row-normalised maximum, is there to compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEARNING_RATE = 1e-4
"""Of Adam, which moves every weight by about as much a step: the residual stays small."""

_SOFTNESS = 0.15
"""Width of the soft threshold in standard deviations of a row's scores."""

_NOTHING = -1e30


@dataclass(frozen=True, eq=False)
class Lesson:
    """Sampled query tiles of the h heads of one layer against all n key tiles; float32.

    q: (h, m, 3D) pooled query tiles [mean | max | min]; k: (h, n, 3D). Where heads have fewer tiles
    than others, rows of zeros fill up. base: (h, m, n) the terms of the score that are not trained,
    -inf for tiles that cannot be chosen (no keys, and the query's own, which always is). mass:
    (h, m, n), highest: (h, m, n) targets. keep: (h, m) tiles to choose; 0 where there is no row.
    """

    q: Tensor
    k: Tensor
    base: Tensor
    mass: Tensor
    highest: Tensor
    keep: Tensor

    @property
    def bytes(self) -> int:
        """Memory it takes."""
        return sum(x.numel() * x.element_size() for x in vars(self).values())


class ScoreTrainer:
    """Projections of one layer and their optimiser.

    weights: (2, H, 3D, D) float32, [0] for queries, as `Plan.projection`. scale: of the logits.
    """

    def __init__(
        self, heads: int, head_dim: int, scale: float, device: torch.device, loss: str = "mass"
    ) -> None:
        """loss: "mass", or "kl" for the paper's."""
        self.weights = torch.zeros(
            (2, heads, 3 * head_dim, head_dim), device=device, requires_grad=True
        )
        self.steps = 0
        self.scale = scale
        self._loss = loss
        self._adam = torch.optim.Adam([self.weights], lr=LEARNING_RATE)

    def on(self, device: torch.device) -> ScoreTrainer:
        """This trainer, or one with its weights and a fresh optimiser where `device` is another."""
        if self.weights.device == device:
            return self
        _, heads, _, head_dim = self.weights.shape
        moved = ScoreTrainer(heads, head_dim, self.scale, device, self._loss)
        with torch.no_grad():
            moved.weights.copy_(self.weights)
        return moved

    def step(self, lessons: Sequence[Lesson]) -> float:
        """One step on a few lessons; returns the loss before it."""
        with torch.enable_grad():
            of = {"mass": lost_mass, "kl": maximum_kl}[self._loss]
            losses = [of(self.scores(lesson), lesson) for lesson in lessons]
            loss = torch.stack(losses).mean()
            self._adam.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
        self._adam.step()
        self.steps += 1
        return float(loss.detach())

    def scores(self, lesson: Lesson) -> Tensor:
        """(h, m, n) scores under the present weights."""
        dim = self.weights.shape[-1]
        q = lesson.q[..., :dim] + lesson.q @ self.weights[0]
        k = lesson.k[..., :dim] + lesson.k @ self.weights[1]
        return q @ k.transpose(-1, -2) * self.scale + lesson.base


def lost_mass(scores: Tensor, lesson: Lesson) -> Tensor:
    """Mean share of the best choice's mass that a soft choice by `scores` leaves out."""
    open_tiles = lesson.base > -torch.inf
    count = open_tiles.sum(-1, keepdim=True).clamp(min=1)
    level = scores.masked_fill(~open_tiles, 0.0)
    mean = level.sum(-1, keepdim=True) / count
    centred = (scores - mean).masked_fill(~open_tiles, 0.0)
    deviation = (centred.square().sum(-1, keepdim=True) / count).sqrt().clamp(min=1e-6)
    standard = (centred / deviation).masked_fill(~open_tiles, _NOTHING)
    sorted_scores = standard.detach().sort(-1, descending=True).values
    last = (lesson.keep - 1).clamp(min=0)[..., None]
    after = lesson.keep.clamp(max=scores.shape[-1] - 1)[..., None]
    edge = (sorted_scores.gather(-1, last) + sorted_scores.gather(-1, after)) / 2
    chosen = torch.sigmoid((standard - edge) / _SOFTNESS)
    best = lesson.mass.masked_fill(~open_tiles, 0.0).sort(-1, descending=True).values
    ranks = torch.arange(best.shape[-1], device=best.device)
    most = (best * (ranks < lesson.keep[..., None])).sum(-1)
    kept = (chosen * lesson.mass * open_tiles).sum(-1)
    counts = (lesson.keep > 0) & (lesson.keep < count[..., 0]) & (most > 0)
    share = torch.where(counts, kept / most.clamp(min=1e-12), 0.0)
    return 1.0 - share.sum() / counts.sum().clamp(min=1)


def maximum_kl(scores: Tensor, lesson: Lesson) -> Tensor:
    """The paper's loss: KL(row-normalised largest probabilities || softmax of the scores)."""
    open_tiles = lesson.base > -torch.inf
    target = lesson.highest.masked_fill(~open_tiles, 0.0)
    target = target / target.sum(-1, keepdim=True).clamp(min=1e-12)
    guess = torch.log_softmax(scores.masked_fill(~open_tiles, _NOTHING), -1)
    each = torch.where(target > 0, target * (target.clamp(min=1e-12).log() - guess), 0.0).sum(-1)
    counts = lesson.keep > 0
    return (each * counts).sum() / counts.sum().clamp(min=1)
