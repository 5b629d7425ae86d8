"""Dense attention of a sample of query tiles, kept apart by key tile.

From it the output error of *any* choice of key tiles follows by adding up what it keeps, so that
one pass over the keys measures every score and every density at once. Never N x N: only the
sampled rows meet all keys, and the parts of one head at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from .kernels.layout import Layout
from .kernels.tiles import TileTable, tile_table

_PART_BYTES = 32 << 20
"""Memory for the partial outputs of the query tiles held at once."""


@dataclass(frozen=True, eq=False)
class TileSample:
    """m query tiles of one head of one batch element against all n key tiles; float32.

    tiles: (m,) numbers of the query tiles. real: (m, S) bool, rows that exist.
    weight: (m, n, S) share of each row's probability that lies in each key tile.
    highest: (m, n) largest single probability of each pair of tiles, the paper's target.
    part: (m, n, S, D) what each key tile adds to each row's output.
    rest_weight, rest_part: (m, S), (m, S, D) the same for the keys in no tile, which always stay.
    """

    tiles: Tensor
    real: Tensor
    weight: Tensor
    highest: Tensor
    part: Tensor
    rest_weight: Tensor
    rest_part: Tensor

    @property
    def mass(self) -> Tensor:
        """(m, n) mean probability that the rows of a query tile put on each key tile."""
        rows = self.real.sum(-1).clamp(min=1)
        return (self.weight * self.real[:, None]).sum(-1) / rows[:, None]

    @property
    def energy(self) -> Tensor:
        """() squared norm of the dense output."""
        return (self._full() * self.real[..., None]).square().sum()

    def errors(self, keep: Tensor) -> Tensor:
        """(K,) squared output error of K choices: keep (K, m, n) bool, the key tiles kept."""
        kept = keep.to(self.weight.dtype).transpose(0, 1)  # (m, K, n)
        m, n, size, dim = self.part.shape
        weight = kept @ self.weight + self.rest_weight[:, None]
        total = (kept @ self.part.view(m, n, size * dim)).view(m, -1, size, dim)
        total = total + self.rest_part[:, None]
        # a row whose kept keys have no weight at all gives 0, as in the op
        out = torch.where(weight[..., None] > 0, total / weight[..., None], 0.0)
        wrong = (out - self._full()[:, None]) * self.real[:, None, :, None]
        return wrong.square().sum((0, 2, 3))

    def _full(self) -> Tensor:
        return self.part.sum(1) + self.rest_part


@torch.no_grad()
def tile_samples(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    shape: tuple[int, int, int],
    tokens: Tensor,
    scale: float,
    key_valid: Tensor | None = None,
    heads: Sequence[int] | None = None,
) -> Iterator[tuple[int, int, TileSample]]:
    """Yield (batch element, head, sample), in chunks of query tiles.

    q: (B, H, Nq, D); k, v: (B, Hkv, Nk, D). tokens: (t,) queries of the video; the tiles under
    `shape` that hold them are sampled, so samples under different shapes are paired. A tile is
    taken once. key_valid: (B, Nk) bool or None. heads: of q, ascending; None is all.
    """
    table = tile_table(layout, shape, q.device)
    tiles = table.tile_of_query[tokens.to(q.device)].unique().long()
    repeat = q.shape[1] // k.shape[1]
    wanted = range(q.shape[1]) if heads is None else heads
    size = table.rows.shape[1]
    step = max(1, _PART_BYTES // (table.tiles * size * q.shape[-1] * 4))
    for batch in range(q.shape[0]):
        valid = None if key_valid is None else key_valid[batch]
        # query heads that share a KV head share its keys in the order of tiles
        for kv_head, sharing in groupby(wanted, lambda head: head // repeat):
            keys = _Keys.of(k[batch, kv_head], v[batch, kv_head], table, valid)
            for head in sharing:
                for first in range(0, len(tiles), step):
                    chosen = tiles[first : first + step]
                    yield batch, head, _sample(q[batch, head], keys, table, chosen, scale)


@dataclass(frozen=True, eq=False)
class _Keys:
    """Keys and values of one head in the order of tiles, those in no tile last."""

    k: Tensor
    v: Tensor
    hidden: Tensor
    tiles: int

    @classmethod
    def of(cls, k: Tensor, v: Tensor, table: TileTable, valid: Tensor | None) -> _Keys:
        rows = torch.cat([table.rows.flatten(), table.extra]).long()
        safe = rows.clamp(min=0)
        hidden = rows < 0
        if valid is not None:
            hidden = hidden | ~valid[safe]
        # values of hidden keys may be NaN, and 0 * NaN is NaN
        value = v[safe].float().masked_fill(hidden[:, None], 0.0)
        return cls(k[safe].float(), value, hidden, table.tiles)


def _sample(q: Tensor, keys: _Keys, table: TileTable, tiles: Tensor, scale: float) -> TileSample:
    rows = table.query_rows[tiles]
    m, size = rows.shape
    queries = q[rows.clamp(min=0).long().flatten()].float()
    logits = (queries @ keys.k.T) * scale
    # a row that does not exist reads another's query: `real` leaves it out of every sum
    chances = torch.softmax(logits.masked_fill_(keys.hidden, -torch.inf), dim=-1).nan_to_num_(0.0)
    there = keys.tiles * size
    split = chances[:, :there].view(m, size, keys.tiles, size).transpose(1, 2)  # (m, n, S, Sk)
    split = split.masked_fill((rows < 0)[:, None, :, None], 0.0)
    values = keys.v[:there].view(keys.tiles, size, -1)
    rest = chances[:, there:].view(m, size, -1)
    return TileSample(
        tiles,
        rows >= 0,
        split.sum(-1),
        split.amax((-1, -2)),
        split @ values,
        rest.sum(-1),
        rest @ keys.v[there:],
    )
