"""Output error of tile choices on a sample of single queries: a fast estimate for many tile shapes.

`tile_sample` takes whole query tiles, so every tile shape has logits of its own. Here the sample is
rows: their probabilities over all keys are computed once and serve all shapes, and each row stands
for the query tile that it lies in. The estimate is the same on average, and each row costs a
tile's share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .keep_maps import keep_maps
from .kernels.plan import Plan, TileShape
from .kernels.scores import key_features, query_features, tile_scores
from .kernels.statistics import TileStatistics, tile_statistics
from .kernels.tiles import TileTable, tile_table
from .observed_call import ObservedCall
from .searched_modes import SearchedModes

_SLICE_BYTES = 128 << 20
"""Memory for what is made of queries, keys and values at a time: of some heads, at least of one."""


@dataclass(frozen=True, eq=False)
class RowErrors:
    """What one tile shape shows on a sample, float32 on the call's device.

    scored: (H, K) squared output error at each density. static: (H, M) that of the windows, then
    of the stripes, of the modes that were asked for. energy: (H,) squared norm of the dense output.
    columns: (H, n) probability that the rows put on each key tile, added up.
    """

    scored: Tensor
    static: Tensor
    energy: Tensor
    columns: Tensor

    @classmethod
    def joined(cls, parts: Iterable[RowErrors]) -> RowErrors:
        """Of more heads."""
        every = list(parts)
        return cls(*(torch.cat([getattr(x, field.name) for x in every]) for field in fields(cls)))


@dataclass(frozen=True, eq=False)
class RowSample:
    """Dense attention of some queries of one batch element of an observed call.

    tokens: (R,) int64, queries of the video. chances: (Hkv, Nk, gR) float32, of every key its
    probability for each of the R queries of the g heads that share it. That is all it holds beside
    the call: keys and values are made float32 a few heads at a time.
    """

    call: ObservedCall
    batch: int
    tokens: Tensor
    chances: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, call: ObservedCall, batch: int, tokens: Tensor) -> RowSample:
        """tokens: (R,) on any device."""
        tokens = tokens.to(call.q.device)
        kv_heads, count, dim = call.k.shape[1:]
        # index_select would make strided queries of all heads contiguous on CPU
        rows = call.q[batch][:, tokens].float().view(kv_heads, -1, dim)
        # (Nk, gR): a key's row is what tiles are gathered from
        chances = rows.new_empty((kv_heads, count, rows.shape[1]))
        for kv in head_slices(kv_heads, 4 * count * (dim + 2 * rows.shape[1]), _SLICE_BYTES):
            logits = call.k[batch, kv].float() @ rows[kv].transpose(1, 2)
            logits *= call.scale
            if call.key_valid is not None:
                logits.masked_fill_(~call.key_valid[batch][:, None], -torch.inf)
            chances[kv] = logits.softmax(1).nan_to_num_(0.0)
        return cls(call, batch, tokens, chances)

    @torch.no_grad()
    def errors(
        self,
        shape: TileShape,
        densities: Sequence[float],
        score: str,
        modes: SearchedModes | None = None,
        columns: Tensor | None = None,
    ) -> RowErrors:
        """The errors of choices under a tile shape.

        score: "closed_form" or "mean". modes: static modes to measure, where the layout has one
        video segment. columns: (H, n) probability on each key tile in earlier samples, None where
        there are none. A row's stripe never runs by what the row itself looks at: it is chosen by
        `columns` and by every other row of the sample, as a plan is by what other calls show.
        """
        table = tile_table(self.call.layout, shape, self.call.q.device)
        tiles = table.tile_of_query[self.tokens].long()
        if columns is None:
            columns = tiles.new_zeros((self.call.q.shape[1], table.tiles))
        columns = columns.to(self.chances)
        windows = None
        if modes is not None and modes.windows:
            windows = modes.kept_by_windows(tiles)
        choices = len(densities)
        choices += 0 if modes is None else len(modes.windows) + len(modes.stripes)
        each = self._bytes_of_a_head(table, choices)
        return RowErrors.joined(
            self._errors(table, tiles, shape, densities, score, modes, windows, columns, kv)
            for kv in head_slices(len(self.chances), each, _SLICE_BYTES)
        )

    def _bytes_of_a_head(self, table: TileTable, choices: int) -> int:
        """About the most that `_errors` takes at a time for one KV head.

        choices: densities and modes.
        """
        dim, rows = self.call.q.shape[3], self.chances.shape[2]
        tiles, size = table.rows.shape
        queries = 3 * rows * size * dim
        # a tile is gathered in the call's dtype first
        keys = tiles * (size * (2 * dim + rows) + 2 * rows * dim)
        kept = tiles * rows * dim + rows * choices * (4 * dim + 2 * tiles)
        return 4 * max(queries, keys, kept)

    def _errors(
        self,
        table: TileTable,
        tiles: Tensor,
        shape: TileShape,
        densities: Sequence[float],
        score: str,
        modes: SearchedModes | None,
        windows: Tensor | None,
        columns: Tensor,
        kv: slice,
    ) -> RowErrors:
        """`errors` of the query heads that share the KV heads `kv`. tiles: (R,) of the rows."""
        heads, rows = self._heads(kv), len(self.tokens)
        count = len(heads)
        scores = self._scores(table, tiles, shape, score, kv)
        keep = keep_maps(
            scores.flatten(0, 1), tiles.repeat(count), self.call.layout, shape, densities
        )
        part, weight, rest_part, rest_weight = self._parts(table, kv)

        mass = weight.view(count, rows, -1)
        maps = [keep]
        if windows is not None:
            maps.append(windows.repeat(1, count, 1))
        if modes is not None and modes.stripes:
            seen = columns[heads.start : heads.stop]
            odd = torch.arange(count * rows, device=tiles.device) % rows % 2
            others = torch.stack([mass[:, 1::2].sum(1), mass[:, ::2].sum(1)], 1) + seen[:, None]
            which = torch.arange(count, device=tiles.device).repeat_interleave(rows) * 2 + odd
            maps.append(modes.kept_by_stripes(others.flatten(0, 1), which, tiles.repeat(count)))
        kept = torch.cat(maps).transpose(0, 1).to(part.dtype)  # (count * R, K + M, n)
        full = part.sum(1) + rest_part
        total = kept @ part + rest_part[:, None]
        kept_weight = kept @ weight[..., None] + rest_weight
        out = torch.where(kept_weight > 0, total / kept_weight, 0.0)
        wrong = (out - full[:, None]).square().sum(-1)
        error = wrong.view(count, rows, -1).sum(1)
        energy = full.square().sum(-1).view(count, rows).sum(1)
        scored = len(densities)
        return RowErrors(error[:, :scored], error[:, scored:], energy, mass.sum(1))

    def _parts(self, table: TileTable, kv: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the rows get from each key tile, and from all keys outside of tiles.

        For h query heads: (h * R, n, D) probability times value, (h * R, n) probability; then
        (h * R, D) and (h * R, 1, 1).
        """
        tiles, size = table.rows.shape
        of_tiles, extra = table.rows.clamp(min=0).long().flatten(), table.extra.long()
        chances = self.chances[kv]
        tiled = chances.index_select(1, of_tiles)
        if _padded(table):
            tiled.masked_fill_((table.rows.flatten() < 0)[:, None], 0.0)
        tiled = tiled.view(len(chances), tiles, size, -1)
        values = self._values(kv, of_tiles).view(len(chances), tiles, size, -1)
        part = (tiled.transpose(2, 3) @ values).transpose(1, 2)
        weight = tiled.sum(2).transpose(1, 2)
        outside = chances.index_select(1, extra).transpose(1, 2)
        rest = outside @ self._values(kv, extra)
        return (
            part.reshape(-1, tiles, part.shape[-1]),
            weight.reshape(-1, tiles),
            rest.flatten(0, 1),
            outside.sum(-1).view(-1, 1, 1),
        )

    def _values(self, kv: slice, keys: Tensor) -> Tensor:
        """(kv, m, D) float32, the values of the keys (m,); zeros of those that do not count."""
        values = self.call.v[self.batch, kv].index_select(1, keys).float()
        if self.call.key_valid is not None:
            # they may be NaN, and 0 * NaN is NaN
            values.masked_fill_(~self.call.key_valid[self.batch, keys][:, None], 0.0)
        return values

    def _heads(self, kv: slice) -> range:
        """The query heads that share the KV heads `kv`."""
        repeat = self.call.q.shape[1] // self.call.k.shape[1]
        return range(kv.start * repeat, kv.stop * repeat)

    def _scores(
        self, table: TileTable, tiles: Tensor, shape: TileShape, score: str, kv: slice
    ) -> Tensor:
        """(h, R, n) of the rows' query tiles for all key tiles, as executors score them."""
        call, batch, heads = self.call, self.batch, list(self._heads(kv))
        repeat = len(heads) // (kv.stop - kv.start)
        plan = Plan.uniform(call.q.shape[1], shape, 1.0, score)
        q = call.q[batch : batch + 1, heads[0] : heads[-1] + 1]
        stats_q = tile_statistics(q, table.query_rows[tiles], None, False)
        stats_k = self._key_moments(table, kv)
        features = key_features(stats_k, plan, heads).repeat_interleave(repeat, dim=1)
        wanted = query_features(stats_q, plan, heads, call.scale)
        return tile_scores(wanted, features, stats_k.count, plan)[0]

    def _key_moments(self, table: TileTable, kv: slice) -> TileStatistics:
        """`tile_statistics` of the keys, as far as scores use them: in place, on one copy."""
        tiles, size = table.rows.shape
        of_tiles = table.rows.clamp(min=0).long().flatten()
        keys = self.call.k[self.batch, kv].index_select(1, of_tiles).float()
        keys = keys.view(len(keys), tiles, size, -1)
        count, missing = table.sizes.float(), None
        if _padded(table) or self.call.key_valid is not None:
            there = table.rows >= 0
            if self.call.key_valid is not None:
                there &= self.call.key_valid[self.batch, of_tiles].view(tiles, size)
            count, missing = there.sum(-1).float(), ~there[..., None]
            keys.masked_fill_(missing, 0.0)
        rows = count.clamp(min=1.0)[:, None]
        mean = keys.sum(2) / rows
        keys -= mean[:, :, None]
        if missing is not None:
            keys.masked_fill_(missing, 0.0)
        variance = (keys.square_().sum(2) / rows)[None]
        return TileStatistics(count[None, None], mean[None], variance, variance, None, None)


def head_slices(heads: int, each: int, most: int) -> Iterator[slice]:
    """All heads in order, so many at once that they take at most `most` bytes, at least one.

    each: bytes of one head.
    """
    step = max(1, most // each)
    for first in range(0, heads, step):
        yield slice(first, min(first + step, heads))


def _padded(table: TileTable) -> bool:
    """Whether a tile is ragged; known without reading the table from its device."""
    return table.rows.numel() > len(table.tile_of_token) - len(table.extra)
