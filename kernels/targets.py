"""Distillation targets: what dense attention puts on every tile, without an N x N matrix.

An estimator learns from the tiles that dense attention would favour. The paper's target is the
largest probability of a tile pair (Veda, arXiv 2605.30325, the section on distillation: softmax of
all logits, max-pooled over tiles). Its authors later found (engineering notes of the repository
veda-sparse/Miowtion) that the *mass* of the pair, the sum of its probabilities, is the right
target: mass is what dropping a tile loses, and ranking by the maximum costs 7-10 % more output
error and flickers. Both come out here for the same work, and for a sample of the query tiles
alone, which is enough to learn from.

This file defines both in plain torch for any device; triton/targets.py computes the same on GPUs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .call import AttentionCall
from .errors import LayoutError, PlanError
from .plan import TileShape
from .tiles import TileTable, tile_table

_QUERIES_AT_ONCE = 512
_LOGITS_AT_ONCE = 1 << 20  # 4 MiB: small enough for a cache, large enough for a matrix product
_KEYS_PER_BLOCK = 128  # of `row_lse`, which has no tiles


@dataclass(frozen=True, eq=False)
class TileTargets:
    """Dense attention of m sampled query tiles, summed up by key tile; all float32.

    For the h heads of one tile shape, in the plan's order, and the n key tiles of that shape.
    Probabilities are those over every valid key, extra and context keys included.

    mass: (B, h, m, n), probability of all the key tile's valid rows, averaged over the query
        tile's rows. A row of it and `extra` add up to 1, or to 0 where no key is valid.
    highest: (B, h, m, n), the largest single probability of the pair.
    extra: (B, h, m), the mass on keys in no tile: extra and context tokens.
    """

    mass: torch.Tensor
    highest: torch.Tensor
    extra: torch.Tensor


@torch.no_grad()
def row_lse(call: AttentionCall) -> torch.Tensor:
    """(B, H, Nq) float32: natural log of the sum of exp(logit) over all valid keys of each query.

    -inf where no key is valid. Plan and `keep_all` play no part.
    """
    queries, keys = call.q.shape[2], call.k.shape[2]
    lse = call.q.new_empty(call.q.shape[:3], dtype=torch.float32)
    rows = _in_blocks(torch.arange(keys, device=call.q.device), _KEYS_PER_BLOCK)
    with torch.autocast(call.q.device.type, enabled=False):
        for batch, head, problem in _heads(call, list(range(call.q.shape[1])), rows):
            for first in range(0, queries, _QUERIES_AT_ONCE):
                part = slice(first, first + _QUERIES_AT_ONCE)
                highest, total = problem.terms(call.q[batch, head, part])
                lse[batch, head, part] = torch.logsumexp(highest + torch.log(total), -1)
    return lse


@torch.no_grad()
def tile_targets(
    call: AttentionCall,
    query_tiles: torch.Tensor,
    lse: torch.Tensor | None = None,
    shape: TileShape | None = None,
) -> TileTargets:
    """The targets of some query tiles, for the heads that share one tile shape.

    call: its v, densities and `keep_all` play no part.
    query_tiles: (m,) int32 or int64, tiles of the layout under `shape`, in any order.
    lse: (B, H, Nq) float32, `row_lse` of the call if it is known already.
    shape: which of the plan's groups of heads; may be left out where there is only one.

    No gradient flows. Memory beyond inputs and result is one head's keys in float32 and about
    15 MiB. Raises PlanError if the plan has no heads of `shape`, or lse is not the call's;
    LayoutError if a query tile is not one of the layout's.
    """
    shape, heads = group_of(call, shape)
    table = tile_table(call.layout, shape, call.q.device)
    check_sample(query_tiles, table.tiles)
    check_lse(call, lse)
    # shapes that stick out of the grid leave every tile part empty
    width = int(table.sizes.max())
    extra = _in_blocks(table.extra, width)
    rows = torch.cat([table.rows[:, :width], extra])
    found = call.q.new_empty(
        (2, call.q.shape[0], len(heads), len(query_tiles), len(rows)), dtype=torch.float32
    )
    sample = query_tiles.to(call.q.device).long()
    step = max(_QUERIES_AT_ONCE // width, 1)
    with torch.autocast(call.q.device.type, enabled=False):
        for batch, head, problem in _heads(call, heads, rows):
            known = None if lse is None else lse[batch, head]
            into = found[:, batch, heads.index(head)]
            for first in range(0, len(sample), step):
                queries = table.query_rows[sample[first : first + step], :width].long()
                into[:, first : first + step] = problem.pooled(call.q[batch, head], queries, known)
    return as_targets(found[0], found[1], table, sample)


def as_targets(
    total: torch.Tensor, highest: torch.Tensor, table: TileTable, sample: torch.Tensor
) -> TileTargets:
    """Targets from sums and maxima of probabilities by pair, both (B, h, m, n + e) float32.

    The first n columns are the key tiles, the others hold extra keys. sample: (m,) query tiles.
    """
    mass = total / table.sizes[sample][:, None]
    return TileTargets(
        mass[..., : table.tiles].contiguous(),
        highest[..., : table.tiles].contiguous(),
        mass[..., table.tiles :].sum(-1),
    )


def group_of(call: AttentionCall, shape: TileShape | None) -> tuple[TileShape, list[int]]:
    """The shape and heads of one group of the call's plan. Raises PlanError if there is none."""
    groups = call.plan.groups()
    if shape is None:
        if len(groups) > 1:
            raise PlanError(f"the plan has heads of shapes {sorted(groups)}: say for which")
        return next(iter(groups.items()))
    if shape not in groups:
        raise PlanError(f"no head has tile shape {shape}: the plan's are {sorted(groups)}")
    return shape, groups[shape]


def check_sample(query_tiles: torch.Tensor, tiles: int) -> None:
    """Raise LayoutError unless these are numbers of tiles. Waits where they are on a GPU."""
    if query_tiles.dtype not in (torch.int32, torch.int64) or query_tiles.dim() != 1:
        raise LayoutError(
            f"query_tiles is {query_tiles.dtype} of shape {tuple(query_tiles.shape)}: must be "
            "int32 or int64 of shape (m,)"
        )
    if not len(query_tiles):
        raise LayoutError("query_tiles is empty: sample at least one tile")
    least, most = (int(x) for x in query_tiles.aminmax())
    if least < 0 or most >= tiles:
        raise LayoutError(f"query_tiles range from {least} to {most}: there are {tiles} tiles")


def check_lse(call: AttentionCall, lse: torch.Tensor | None) -> None:
    """Raise PlanError unless lse is None or could be the call's."""
    if lse is None:
        return
    if lse.shape != call.q.shape[:3] or lse.dtype != torch.float32 or lse.device != call.q.device:
        raise PlanError(
            f"lse is {lse.dtype} of shape {tuple(lse.shape)} on {lse.device}: must be float32 of "
            f"shape {tuple(call.q.shape[:3])} on {call.q.device}"
        )


class _Keys:
    """One head's keys side by side in blocks of equal width, in float32, with what hides some."""

    def __init__(
        self, k: torch.Tensor, rows: torch.Tensor, valid: torch.Tensor | None, scale: float
    ) -> None:
        """k: (Nk, D); rows: (C, w) keys of each block, -1 for none; valid: (Nk,) bool or None."""
        self.width, self.scale = rows.shape[1], scale
        flat = rows.flatten().long()
        counted = flat >= 0
        flat = flat.clamp(min=0)
        if valid is not None:
            counted &= valid[flat]
        self.k = k[flat].float()
        self.bias: torch.Tensor | None = None
        if not bool(counted.all()):
            # -inf alone would not do: hidden keys may hold NaN
            self.k.masked_fill_(~counted[:, None], 0.0)
            self.bias = torch.zeros_like(counted, dtype=torch.float32)
            self.bias.masked_fill_(~counted, -torch.inf)

    def terms(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(m, s), both (R, C), for q (R, D): s exp(m) is the sum of exp(logit) over a block.

        m is the block's largest logit. One product and one exponential a logit serve both the
        row's log-sum-exp and the sums by block.
        """
        q = q.float() * self.scale
        blocks = len(self.k) // self.width
        highest, total = q.new_empty(2, len(q), blocks)
        step = max(_LOGITS_AT_ONCE // (len(q) * self.width), 1)
        for first in range(0, blocks, step):
            part = slice(first, first + step)
            columns = slice(first * self.width, (first + step) * self.width)
            keys = self.k[columns].T
            logits = q @ keys if self.bias is None else torch.addmm(self.bias[columns], q, keys)
            logits = logits.unflatten(1, (-1, self.width))
            most = highest[:, part] = logits.amax(-1)
            total[:, part] = logits.sub_(_finite(most)[..., None]).exp_().sum(-1)
        return highest, total

    def pooled(
        self, q: torch.Tensor, queries: torch.Tensor, lse: torch.Tensor | None
    ) -> torch.Tensor:
        """(2, t, C): sum and maximum of the probabilities of t query tiles by block of keys.

        q: (Nq, D); queries: (t, S) its rows in each tile, -1 for none; lse: (Nq,) or None.
        """
        real = (queries >= 0)[..., None]
        flat = queries.clamp(min=0).flatten()
        highest, total = self.terms(q[flat])
        if lse is None:
            norm = torch.logsumexp(highest + torch.log(total), -1, keepdim=True)
        else:
            norm = lse[flat, None]
        highest = highest.sub_(_finite(norm)).exp_()
        by_tile = (
            (total * highest).unflatten(0, queries.shape),
            highest.unflatten(0, queries.shape),
        )
        # where, not multiplication: row 0, which stands in for none, may hold NaN
        mass, most = (torch.where(real, x, 0.0) for x in by_tile)
        return torch.stack([mass.sum(1), most.amax(1)])


def _finite(x: torch.Tensor) -> torch.Tensor:
    """0 in place of -inf, which marks rows without any key: -inf - -inf would be NaN."""
    return x.masked_fill(x == -torch.inf, 0.0)


def _heads(
    call: AttentionCall, heads: list[int], rows: torch.Tensor
) -> Iterator[tuple[int, int, _Keys]]:
    """(batch element, head, its keys in blocks `rows`), one KV head after the other."""
    for batch in range(call.q.shape[0]):
        valid = None if call.key_valid is None else call.key_valid[batch]
        for kv, members in itertools.groupby(heads, lambda head: head // call.kv_repeat):
            keys = _Keys(call.k[batch, kv], rows, valid, call.scale)
            for head in members:
                yield batch, head, keys


def _in_blocks(numbers: torch.Tensor, width: int) -> torch.Tensor:
    """(ceil(L / width), width): the (L,) numbers in order, -1 after the last."""
    blocks = -(-len(numbers) // width)
    padded = numbers.new_full((blocks * width,), -1)
    padded[: len(numbers)] = numbers
    return padded.view(blocks, width)
