"""Rules whose rows keep different numbers of tiles: a threshold on a normalised score.

The published thresholds are constants that leave the density to chance. Here they are set on the
call itself, head by head, so that every head keeps the budget exactly: a threshold over a head is
a top-k over all its tile pairs. One threshold for all heads was worse for each of them at equal
density: it takes tiles from the heads that look at few places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veda_compile.kernels.tiles import tile_table

from .rule import CUBE, TILE_SIZE, Choice, Rule, Site, budget, gathered, means, tiled


def best_of_head(values: Tensor, kept: int, always: Tensor | None = None) -> Tensor:
    """(1, H, n, n) bool: the `kept` highest values of each head, and those of `always` first.

    The best of each row is kept in any case: a row without keys has no output.
    """
    values = values.scatter(-1, values.argmax(-1, keepdim=True), torch.inf)
    if always is not None:
        values = values.masked_fill(always, torch.inf)
    flat = values.flatten(-2)
    keep = torch.zeros_like(flat, dtype=torch.bool)
    return keep.scatter_(-1, flat.topk(kept).indices, True).view_as(values)


def mass_before(scores: Tensor) -> Tensor:
    """(..., m): the softmax mass of the entries of a row that score higher than each entry.

    Keeping what has less than p before it is top-p: the smallest set with mass p.
    """
    shares, order = scores.softmax(-1).sort(dim=-1, descending=True, stable=True)
    return torch.empty_like(shares).scatter_(-1, order, shares.cumsum(-1) - shares)


def whole_budget(site: Site, density: float) -> int:
    """Tile pairs a head may keep, in cubes."""
    return int(budget(site, CUBE, density).sum())


class Sol(Rule):
    """Tiles whose pooled score exceeds the row's mean by tau standard deviations.

    With `corrected`, what is dropped is put back as one token per tile: its mean key and mean
    value, weighted by its number of tokens. That is one further key per tile for every query: it
    counts, so that at equal density as many keys are attended to as under other rules.
    """

    source = "Sol-Attn, arXiv 2607.24027"

    def __init__(self, corrected: bool) -> None:
        self.corrected = corrected
        self.name = "mean+tau*sigma, corrected" if corrected else "mean+tau*sigma"

    def choose(self, site: Site, density: float) -> Choice:
        """One tau per head."""
        keys = means(site.k, site, CUBE)
        scores = means(site.q, site, CUBE) @ keys.transpose(-1, -2)
        normal = (scores - scores.mean(-1, keepdim=True)) / scores.std(-1, keepdim=True)
        means_kept = 1.0 / TILE_SIZE if self.corrected and density < 1.0 else 0.0
        keep = best_of_head(normal, whole_budget(site, max(density - means_kept, 0.0)))
        choice = tiled(site, {CUBE: keep}, (CUBE,) * site.heads)
        if not self.corrected:
            return choice
        return Choice(
            choice.call,
            choice.selection,
            choice.density + means_kept,
            _Correction(site, keys, keep),
        )


class _Correction:
    """Adds the dropped tiles, one token each, to the attention over the kept ones."""

    def __init__(self, site: Site, keys: Tensor, keep: Tensor) -> None:
        self._site, self._keys, self._keep = site, keys, keep

    def __call__(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """out (1, H, N, D), lse (1, H, N) of the kept tiles; lse stays theirs."""
        site = self._site
        rows, real = gathered(site.q, site, CUBE)
        logits = torch.einsum("zhisd,zhjd->zhisj", rows, self._keys) * site.scale
        logits = logits + real.sum((1, 2)).log()
        logits = logits.masked_fill(self._keep[:, :, :, None], -torch.inf)
        dropped = logits.logsumexp(-1)
        values = logits.softmax(-1).nan_to_num(0.0) @ means(site.v, site, CUBE)[:, :, None]
        dropped, values = self._in_order(dropped[..., None]), self._in_order(values)
        share = torch.sigmoid(dropped - lse[..., None])
        return out + share * (values - out), lse

    def _in_order(self, tiles: Tensor) -> Tensor:
        """(1, H, n, S, x) by tiles to (1, H, N, x) by tokens."""
        table = tile_table(self._site.layout, CUBE, tiles.device)
        flat = tiles.flatten(2, 3)
        place = torch.empty(self._site.layout.length, dtype=torch.long)
        listed = table.rows.flatten().long()
        place[listed[listed >= 0]] = torch.arange(len(listed))[listed >= 0]
        return flat[:, :, place]


class Sparge(Rule):
    """Top-p over pooled scores, where tiles that are not alike inside are always kept.

    A tile is alike inside when the mean cosine similarity of its rows exceeds a threshold; others
    cannot be told by their mean: as query they keep everything, as key everyone keeps them. Keys
    have their mean over the video subtracted first. `alike` is the threshold per layer and head,
    fitted as published (least error); -1 trusts every tile.
    """

    source = "SpargeAttention, arXiv 2502.18137"
    name = "self-similar top-p"

    def __init__(self, alike: dict[int, Tensor] | None = None) -> None:
        self._alike = alike or {}

    def choose(self, site: Site, density: float) -> Choice:
        """One p per head."""
        smooth = site.k - site.k.mean(2, keepdim=True)
        q, k = means(site.q, site, CUBE), means(smooth, site, CUBE)
        least = self._alike.get(site.layer, torch.full((site.heads,), -1.0))[None, :, None]
        odd_q = likeness(site.q, site) < least
        odd_k = likeness(smooth, site) < least
        scores = (q @ k.transpose(-1, -2) * site.scale).masked_fill(odd_k[:, :, None], -torch.inf)
        always = odd_q[..., None] | odd_k[:, :, None]
        ahead = mass_before(scores).nan_to_num(1.0)
        keep = best_of_head(-ahead, whole_budget(site, density), always)
        return tiled(site, {CUBE: keep}, (CUBE,) * site.heads)


def likeness(x: Tensor, site: Site) -> Tensor:
    """(1, H, n): mean cosine similarity over all row pairs of each tile."""
    rows, real = gathered(torch.nn.functional.normalize(x, dim=-1), site, CUBE)
    # the mean of all pairwise products is the square of the mean's length
    return (rows.sum(3) / real.sum(1)).square().sum(-1)
