"""What a rule is: from the q, k, v of one attention call to the tiles each query tile keeps.

All rules run on the same executor. Density is kept tile pairs / n_ideal^2, n_ideal being the tiles
of a grid without padding: a ragged tile counts as a full one, as it costs a full one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from veda_compile.kernels.budget import tiles_to_keep
from veda_compile.kernels.call import AttentionCall, Selection
from veda_compile.kernels.executors import get_executor
from veda_compile.kernels.layout import Layout, Video
from veda_compile.kernels.plan import Plan, TileShape, ideal_tiles
from veda_compile.kernels.selection import lists_of
from veda_compile.kernels.tiles import tile_table
from veda_compile.tile_metrics import tile_mass

TILE_SIZE = 64
CUBE: TileShape = (4, 4, 4)


@dataclass(frozen=True, eq=False)
class Site:
    """One self-attention call of the model.

    q, k, v: (1, H, N, D). grid: (T, H, W) in tokens, N of them. layer: which layer calls.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grid: tuple[int, int, int]
    layer: int

    _masses: dict[tuple[TileShape, int], Tensor] = field(default_factory=dict, repr=False)

    @property
    def heads(self) -> int:
        """H."""
        return self.q.shape[1]

    @property
    def scale(self) -> float:
        """1 / sqrt(D)."""
        return 1.0 / math.sqrt(self.q.shape[-1])

    @property
    def layout(self) -> Layout:
        """The grid and nothing else."""
        return Layout.of(Video(*self.grid))

    def call(self, plan: Plan) -> AttentionCall:
        """The call under a plan."""
        return AttentionCall(self.q, self.k, self.v, self.layout, plan, self.scale)

    @cached_property
    def lse(self) -> Tensor:
        """(1, H, N): the log-sum-exp of every query's logits, of all keys."""
        call = self.call(Plan.uniform(self.heads, CUBE, 1.0))
        executor = get_executor("cpu")
        return executor.attend(call, executor.select(call))[1]

    def mass(self, shape: TileShape, heads: Sequence[int]) -> Tensor:
        """(1, h, n, n): the true attention mass of every tile pair; worked out once."""
        for head in heads:
            if (shape, head) not in self._masses:
                one = slice(head, head + 1)
                self._masses[shape, head] = tile_mass(
                    self.q[:, one], self.k[:, one], layout=self.layout, tile_shape=shape
                )
        return torch.cat([self._masses[shape, head] for head in heads], dim=1)


@dataclass(frozen=True, eq=False)
class Choice:
    """What a rule made of a site.

    call: what the executor runs; its tokens may be permuted and padded. selection: its tiles.
    density: kept share of the token pairs, (H,). finish: from the executor's (out, lse) to the
    site's, for rules that permute or correct. ordered: whether the call's tokens are
    the site's own, so that its tiles are tiles of the video.
    """

    call: AttentionCall
    selection: Selection
    density: Tensor
    finish: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    ordered: bool = True


class Rule(ABC):
    """A way of choosing tiles.

    name: what tables show. source: who published it.
    """

    name: str
    source: str

    @abstractmethod
    def choose(self, site: Site, density: float) -> Choice:
        """The tiles to keep at a mean density over the heads."""

    def start(self) -> None:  # noqa: B027 - most rules carry nothing from call to call
        """Forget what was carried from call to call: another clip begins."""


def attend(choice: Choice) -> tuple[Tensor, Tensor]:
    """(out (1, H, N, D), lse of the kept logits (1, H, N)) of a site under a choice."""
    out, lse = get_executor("cpu").attend(choice.call, choice.selection)
    return (out, lse) if choice.finish is None else choice.finish(out, lse)


def tiled(site: Site, keeps: dict[TileShape, Tensor], shapes: tuple[TileShape, ...]) -> Choice:
    """A choice in the site's own token order.

    keeps: (1, h, n, n) bool for the heads of each shape, as `Plan.groups` groups them.
    """
    call = site.call(Plan(shapes, (1.0,) * site.heads))
    return counted(call, lists_of(keeps, call))


def counted(call: AttentionCall, selection: Selection) -> Choice:
    """The choice with its density."""
    ((_, video),) = call.layout.videos
    pairs = ideal_tiles(video, call.plan.tile_size) ** 2
    return Choice(call, selection, selection.counts[0].sum(-1) / pairs)


def ranked(site: Site, scores: Tensor, shape: TileShape, density: float) -> Choice:
    """Every query tile keeps its budget of the highest scores: (1, H, n, n)."""
    keep = top(scores, budget(site, shape, density))
    return tiled(site, {shape: keep}, (shape,) * site.heads)


def budget(site: Site, shape: TileShape, density: float) -> Tensor:
    """(n,) tiles each query tile keeps."""
    return tiles_to_keep(site.layout, shape, density)[:, 0]


def top(scores: Tensor, kept: Tensor) -> Tensor:
    """(..., n, m) bool: the `kept` (..., n) highest of each row, ties to the lower number."""
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(-1, order, torch.arange(scores.shape[-1]).expand_as(order))
    return rank < kept[..., None]


def gathered(x: Tensor, site: Site, shape: TileShape) -> tuple[Tensor, Tensor]:
    """(rows (1, H, n, S, D), real (n, S, 1) bool): x by tiles; places without a token hold 0."""
    rows = tile_table(site.layout, shape, x.device).rows.long()
    real = (rows >= 0)[..., None]
    picked = x[:, :, rows.clamp(min=0)]
    return torch.where(real, picked, 0.0), real


def means(x: Tensor, site: Site, shape: TileShape) -> Tensor:
    """(1, H, n, D): the mean of each tile's real rows."""
    rows, real = gathered(x, site, shape)
    return rows.sum(3) / real.sum(1)


def by_plan(site: Site, plan: Plan) -> Choice:
    """What the backend itself keeps under a plan."""
    call = site.call(plan)
    return counted(call, get_executor("cpu").select(call))
