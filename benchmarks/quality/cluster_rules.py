"""Semantic permutation: k-means of the queries and of the keys, clusters in place of tiles."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from veda_compile.kernels.call import AttentionCall
from veda_compile.kernels.layout import Layout, Video
from veda_compile.kernels.plan import Plan
from veda_compile.kernels.selection import lists_of

from .rule import TILE_SIZE, Choice, Rule, Site

_UNIT = 16
"""Clusters are padded to multiples of so many tokens, the executor's tiles here."""


class SemanticClusters(Rule):
    """Clusters of q against clusters of k, ranked by centroid score plus log cluster size.

    As many clusters on either side as there would be tiles. They differ in size, so density counts
    the token pairs of kept cluster pairs and no padding. Every row spends the same budget of keys:
    one top-p for all, as published, was worse at equal density.
    The first call of a layer runs `FIRST` rounds of k-means, later ones `LATER` from the centroids
    of the call before, until `start`.
    """

    name = "k-means permutation"
    source = "Sparse-VideoGen 2, arXiv 2505.18875"
    FIRST, LATER = 50, 2

    def __init__(self) -> None:
        self._centroids: dict[int, tuple[Tensor, Tensor]] = {}

    def start(self) -> None:
        """Forget the centroids: another clip begins."""
        self._centroids.clear()

    def choose(self, site: Site, density: float) -> Choice:
        """Cluster, rank the cluster pairs, permute."""
        q, k, v = site.q[0], site.k[0], site.v[0]
        number = -(-site.layout.length // TILE_SIZE)
        warm = self._centroids.get(site.layer)
        rounds = self.FIRST if warm is None else self.LATER
        q_of, q_centres = k_means(q, number, rounds, None if warm is None else warm[0])
        k_of, k_centres = k_means(k, number, rounds, None if warm is None else warm[1])
        self._centroids[site.layer] = (q_centres, k_centres)
        q_sizes, k_sizes = (F.one_hot(x, number).sum(1).float() for x in (q_of, k_of))
        scores = q_centres @ k_centres.transpose(-1, -2) * site.scale + k_sizes.log()[:, None]
        keep = _likeliest(scores, k_sizes, density * q.shape[1])
        return _permuted(site, (q, k, v), (q_of, k_of), (q_sizes, k_sizes), keep)


def k_means(x: Tensor, number: int, rounds: int, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm, head by head.

    x: (H, N, D). start: (H, number, D), or None for rows of x. Returns the cluster of each row
    (H, N) and the centroids (H, number, D); a cluster without rows keeps its centroid.
    """
    centres = start
    if centres is None:
        generator = torch.Generator().manual_seed(0)
        centres = x[:, torch.randperm(x.shape[1], generator=generator)[:number]]
    nearest = _nearest(x, centres)
    for _ in range(rounds):
        sums = torch.zeros_like(centres).scatter_add_(1, nearest[..., None].expand_as(x), x)
        sizes = F.one_hot(nearest, number).sum(1)[..., None]
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
        nearest = _nearest(x, centres)
    return nearest, centres


def _nearest(x: Tensor, centres: Tensor) -> Tensor:
    """(H, N) cluster numbers."""
    half = 0.5 * centres.square().sum(-1)
    return torch.baddbmm(-half[:, None], x, centres.transpose(-1, -2)).argmax(-1)


def _likeliest(scores: Tensor, sizes: Tensor, most: float) -> Tensor:
    """(H, C, C) bool: in each row the highest scores whose clusters hold about `most` keys.

    A cluster is kept if its middle lies within them, so that the excess of some rows makes up for
    what others lack. The best of each row is kept in any case.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    held = sizes[:, None].expand_as(scores).gather(-1, order)
    within = held.cumsum(-1) - held / 2 <= most
    within[..., 0] = True
    return torch.zeros_like(within).scatter_(-1, order, within) & (sizes > 0)[:, None]


def _permuted(
    site: Site,
    tokens: tuple[Tensor, Tensor, Tensor],
    clusters: tuple[Tensor, Tensor],
    sizes: tuple[Tensor, Tensor],
    keep: Tensor,
) -> Choice:
    """Clusters side by side, padded to `_UNIT`. Heads become batch elements: each its own order."""
    q, k, v = tokens
    padded = [(-(-s.long() // _UNIT)) * _UNIT for s in sizes]
    length = int(max(p.sum(-1).max() for p in padded))
    q_place, k_place = (
        _places(of, s.long(), p) for of, s, p in zip(clusters, sizes, padded, strict=True)
    )
    heads, _, width = q.shape

    def moved(x: Tensor, place: Tensor) -> Tensor:
        target = x.new_zeros(heads, length, width)
        return target.scatter_(1, place[..., None].expand_as(x), x)[:, None]

    valid = torch.zeros(heads, length, dtype=torch.bool).scatter_(1, k_place, True)
    layout, shape = Layout.of(Video(1, 1, length)), (1, 1, _UNIT)
    call = AttentionCall(
        moved(q, q_place), moved(k, k_place), moved(v, k_place),
        layout, Plan.uniform(1, shape, 1.0), site.scale, valid,
    )  # fmt: skip
    q_unit, k_unit = (_cluster_of_unit(p, length // _UNIT) for p in padded)
    # units past the last cluster belong to one more, which nobody keeps
    wide = F.pad(keep, (0, 1, 0, 1))
    head = torch.arange(heads)[:, None, None]
    units = wide[head, q_unit[:, :, None], k_unit[:, None]]
    pairs = (keep * sizes[0][..., None] * sizes[1][:, None]).sum((1, 2))

    def finish(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        in_order = out[:, 0].gather(1, q_place[..., None].expand_as(q))
        return in_order[None], lse[:, 0].gather(1, q_place)[None]

    selection = lists_of({shape: units[:, None]}, call)
    return Choice(call, selection, pairs / q.shape[1] ** 2, finish, ordered=False)


def _places(of: Tensor, sizes: Tensor, padded: Tensor) -> Tensor:
    """(H, N): where each token goes; clusters in order, each from a multiple of the unit on."""
    order = of.argsort(dim=-1, stable=True)
    shift = (padded.cumsum(-1) - padded) - (sizes.cumsum(-1) - sizes)
    ranked = torch.arange(of.shape[1]) + shift.gather(1, of.gather(1, order))
    return torch.empty_like(of).scatter_(1, order, ranked)


def _cluster_of_unit(padded: Tensor, units: int) -> Tensor:
    """(H, units): the cluster a unit lies in; the number of clusters past the end."""
    ends = padded.cumsum(-1) // _UNIT
    return torch.searchsorted(
        ends, torch.arange(units).expand(len(ends), -1).contiguous(), right=True
    )
