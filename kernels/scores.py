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
    centre, spread = _centre(stats, plan, heads, 0), _spread(stats.second, plan, heads, 0)
    return torch.cat([centre * scale, spread * (0.5 * scale * scale)], dim=-1)


def key_features(stats: TileStatistics, plan: Plan, heads: list[int]) -> torch.Tensor:
    """(B, h, n, F) float32 features of key tiles."""
    if plan.score == "mean":
        return stats.mean
    centre, spread = _centre(stats, plan, heads, 1), _spread(stats.variance, plan, heads, 1)
    return torch.cat([centre, spread], dim=-1)


def tile_scores(
    q_features: torch.Tensor, k_features: torch.Tensor, key_rows: torch.Tensor, plan: Plan
) -> torch.Tensor:
    """Scores (B, h, n, n) float32 of query tile i (dim 2) for key tile j (dim 3).

    closed_form: log S_j + mean_i.mean_j * scale + E[q^2]_i.Var(k)_j * scale^2 / 2, the cumulant
    expansion of the log mass (docs/method.md, section 2). projection: the same with projected
    means. mean: the middle term alone. key_rows: (B or 1, 1, n), rows S_j that count. Tiles with
    none, and only those, score -inf: what is NaN becomes the largest finite number, so that such
    tiles are kept and the NaN shows in the output.
    """
    scores = q_features @ k_features.transpose(-1, -2)
    if plan.score != "mean":
        scores = scores + torch.log(key_rows)[..., None, :]  # log 0 = -inf
    most = torch.finfo(scores.dtype).max
    scores = torch.nan_to_num(scores, nan=most, posinf=most, neginf=-most)
    return scores.masked_fill((key_rows == 0)[..., None, :], -torch.inf)


def _centre(stats: TileStatistics, plan: Plan, heads: list[int], side: int) -> torch.Tensor:
    """The mean, or mean + [mean | max | min] P: a residual, so that P = 0 is the mean."""
    if plan.projection is None:
        return stats.mean
    if stats.highest is None or stats.lowest is None:
        raise AssertionError("score 'projection' needs tile extremes")
    pooled = torch.cat([stats.mean, stats.highest, stats.lowest], dim=-1)
    return stats.mean + pooled @ _of_heads(plan.projection[side], plan, heads, pooled.device)


def _spread(second: torch.Tensor, plan: Plan, heads: list[int], side: int) -> torch.Tensor:
    """The second moments (B, h, n, D), through the plan's factors where it has any."""
    if plan.factors is None:
        return second
    return second @ _of_heads(plan.factors[side], plan, heads, second.device)


def _of_heads(
    weights: torch.Tensor, plan: Plan, heads: list[int], device: torch.device
) -> torch.Tensor:
    """weights (H, ...) of `heads`, on `device`. All heads need no index, hence no copy of one."""
    weights = weights.to(device=device, dtype=torch.float32)
    return weights if heads == list(range(plan.heads)) else weights[heads]
