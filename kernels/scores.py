"""Tile scores: an estimate of the log of the attention mass between two tiles.

Every score is  f(q statistics) . f(k statistics),  one batched matrix product, plus log S_j for
all but "mean".
"""

from __future__ import annotations

import torch

from .plan import Plan
from .statistics import TileStatistics


def query_features(
    stats: TileStatistics, plan: Plan, heads: list[int], scale: float
) -> torch.Tensor:
    """(B, h, n, F) float32 features of query tiles; `scale` is folded in here."""
    if plan.score == "mean":
        return stats.mean * scale
    if plan.score == "closed_form":
        return torch.cat([stats.mean * scale, stats.second * (0.5 * scale * scale)], dim=-1)
    return _projected(stats, plan, heads, side=0) * scale


def key_features(stats: TileStatistics, plan: Plan, heads: list[int]) -> torch.Tensor:
    """(B, h, n, F) float32 features of key tiles."""
    if plan.score == "mean":
        return stats.mean
    if plan.score == "closed_form":
        return torch.cat([stats.mean, stats.variance], dim=-1)
    return _projected(stats, plan, heads, side=1)


def tile_scores(
    q_features: torch.Tensor, k_features: torch.Tensor, key_rows: torch.Tensor, plan: Plan
) -> torch.Tensor:
    """Scores (B, h, n, n) float32 of query tile i (dim 2) for key tile j (dim 3).

    closed_form: log S_j + mean_i.mean_j * scale + E[q^2]_i.Var(k)_j * scale^2 / 2, the cumulant
    expansion of the log mass (docs/method.md, section 2). mean: its middle term alone. key_rows:
    (B or 1, 1, n), rows S_j that count. Tiles with none, and only those, score -inf: what is NaN
    becomes the largest finite number, so that such tiles are kept and the NaN shows in the output.
    """
    scores = q_features @ k_features.transpose(-1, -2)
    if plan.score != "mean":
        scores = scores + torch.log(key_rows)[..., None, :]  # log 0 = -inf
    most = torch.finfo(scores.dtype).max
    scores = torch.nan_to_num(scores, nan=most, posinf=most, neginf=-most)
    return scores.masked_fill((key_rows == 0)[..., None, :], -torch.inf)


def _projected(stats: TileStatistics, plan: Plan, heads: list[int], side: int) -> torch.Tensor:
    """mean + [mean | max | min] P: the linear TripPool estimator, residual around the mean."""
    if plan.projection is None or stats.highest is None or stats.lowest is None:
        raise AssertionError("score 'projection' needs projections and tile extremes")
    pooled = torch.cat([stats.mean, stats.highest, stats.lowest], dim=-1)
    weight = plan.projection[side, heads].to(device=pooled.device, dtype=torch.float32)
    return stats.mean + pooled @ weight
