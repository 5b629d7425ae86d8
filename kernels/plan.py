"""Plans: what each head of one attention layer keeps, and by which score it chooses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from .errors import PlanError
from .layout import Layout, Video
from .static_modes import Modes, StaticMode

TileShape = tuple[int, int, int]

SCORES = ("closed_form", "mean", "projection")
"""See docs/method.md, section 2. mean: mean(q).mean(k) alone. projection: the closed form of
projected means."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Per head a tile shape and a density, or a static mode; for all scored heads one score.

    tile_shapes: (pt, ph, pw) per head; every product is the same tile size.
    density: share of key tiles kept, per head, in (0, 1]; 1.0 keeps everything. Of a static head it
        is not used.
    score: one of `SCORES`.
    projection: (2, heads, 3 * head_dim, head_dim) float32 for score "projection", [0] for q and
        [1] for k, applied to [mean | max | min] as a residual around the mean; else None. A head
        whose matrices are zero has the closed form.
    factors: (2, heads, head_dim, r) float32 with r from 1 to head_dim, or None. They replace the
        second-order term E[q^2] . Var(k) by (E[q^2] F_q) . (Var(k) F_k), [0] being F_q and [1] F_k.
        Not with score "mean", which has no such term.
    modes: per head its static mode, None for a scored head; None where all heads are scored.
    """

    tile_shapes: tuple[TileShape, ...]
    density: tuple[float, ...]
    score: str = "closed_form"
    projection: torch.Tensor | None = None
    factors: torch.Tensor | None = None
    modes: Modes | None = None

    def __post_init__(self) -> None:
        if not self.tile_shapes:
            raise PlanError("a plan needs at least one head, got no tile shapes")
        if len(self.density) != len(self.tile_shapes):
            raise PlanError(
                f"{len(self.density)} densities for {len(self.tile_shapes)} heads: give one each"
            )
        for shape in set(self.tile_shapes):
            if len(shape) != 3 or min(shape) < 1:
                raise PlanError(f"tile shape {shape}: needs three sides of at least 1")
        sizes = sorted({math.prod(shape) for shape in self.tile_shapes})
        if len(sizes) > 1:
            raise PlanError(f"tile sizes {sizes} in one plan: all heads must share one size")
        for value in self.density:
            if not 0.0 < value <= 1.0:  # also refuses NaN
                raise PlanError(f"density {value}: must be above 0 and at most 1")
        if self.score not in SCORES:
            raise PlanError(f"score {self.score!r}: must be one of {', '.join(SCORES)}")
        if (self.projection is not None) != (self.score == "projection"):
            raise PlanError(f"score {self.score!r} and projection tensors do not go together")
        if self.projection is not None:
            shape_ok = (
                self.projection.dim() == 4
                and self.projection.shape[0] == 2
                and self.projection.shape[1] == len(self.tile_shapes)
                and self.projection.shape[2] == 3 * self.projection.shape[3]
            )
            if not shape_ok:
                raise PlanError(
                    f"projection of shape {tuple(self.projection.shape)}: must be "
                    f"(2, {len(self.tile_shapes)}, 3 * head_dim, head_dim)"
                )
        self._check_factors()
        self._check_modes()

    def _check_factors(self) -> None:
        factors = self.factors
        if factors is None:
            return
        if self.score == "mean":
            raise PlanError("score 'mean' has no second-order term: leave out factors")
        if (
            factors.dim() != 4
            or factors.shape[:2] != (2, len(self.tile_shapes))
            or not 1 <= factors.shape[3] <= factors.shape[2]
            or factors.dtype != torch.float32
        ):
            raise PlanError(
                f"factors are {factors.dtype} of shape {tuple(factors.shape)}: must be "
                f"torch.float32 of shape (2, {len(self.tile_shapes)}, head_dim, r) with r from 1 "
                "to head_dim"
            )

    def _check_modes(self) -> None:
        if self.modes is None:
            return
        if not isinstance(self.modes, tuple) or len(self.modes) != len(self.tile_shapes):
            raise PlanError(
                f"modes {self.modes!r}: must be a tuple with one for each of "
                f"{len(self.tile_shapes)} heads"
            )
        for mode in self.modes:
            if mode is not None and not isinstance(mode, StaticMode):
                raise PlanError(f"mode {mode!r}: must be a StaticMode, or None for a scored head")
        if not any(self.modes):
            object.__setattr__(self, "modes", None)

    @classmethod
    def uniform(
        cls, heads: int, tile_shape: TileShape, density: float, score: str = "closed_form"
    ) -> Plan:
        """The same tile shape and density for every head."""
        return cls((tile_shape,) * heads, (float(density),) * heads, score)

    @property
    def heads(self) -> int:
        """Query heads the plan is for."""
        return len(self.tile_shapes)

    @property
    def tile_size(self) -> int:
        """Tokens a full tile holds."""
        return math.prod(self.tile_shapes[0])

    def mode(self, head: int) -> StaticMode | None:
        """The static mode of a head, None where it is scored."""
        return None if self.modes is None else self.modes[head]

    @property
    def scored(self) -> list[int]:
        """The heads that are scored, ascending."""
        return [head for head in range(self.heads) if self.mode(head) is None]

    def groups(self) -> dict[TileShape, list[int]]:
        """Heads by tile shape, in order of first appearance."""
        found: dict[TileShape, list[int]] = {}
        for head, shape in enumerate(self.tile_shapes):
            found.setdefault(shape, []).append(head)
        return found

    def check(self, heads: int, head_dim: int) -> None:
        """Raise PlanError unless the plan is for `heads` heads of width `head_dim`."""
        if self.heads != heads:
            raise PlanError(f"the plan is for {self.heads} heads but the call has {heads}")
        if self.projection is not None and self.projection.shape[3] != head_dim:
            raise PlanError(
                f"the plan's projections are for head_dim {self.projection.shape[3]}, "
                f"the call has {head_dim}"
            )
        if self.factors is not None and self.factors.shape[2] != head_dim:
            raise PlanError(
                f"the plan's factors are for head_dim {self.factors.shape[2]}, the call has "
                f"{head_dim}"
            )


@lru_cache(maxsize=64)
def factorisations(tile_size: int) -> tuple[TileShape, ...]:
    """Every (pt, ph, pw) whose product is `tile_size`."""
    sides = [d for d in range(1, tile_size + 1) if tile_size % d == 0]
    return tuple(
        (a, b, tile_size // (a * b)) for a in sides for b in sides if tile_size % (a * b) == 0
    )


def count_tiles(grid: Sequence[int], shape: TileShape) -> int:
    """Boxes of `shape` that cover `grid`; border boxes may be ragged."""
    return math.prod(-(-side // step) for side, step in zip(grid, shape, strict=True))


@lru_cache(maxsize=1024)
def least_padding_shape(layout: Layout, tile_size: int) -> TileShape:
    """The shape of `tile_size` tokens that covers the layout's grids with the fewest tiles.

    Fewest tiles means least padding. Ties go to the most compact box, then to the shape that is
    longest along w (neighbours in memory).
    """

    def cost(shape: TileShape) -> tuple[int, int, int]:
        tiles = sum(count_tiles(video.grid, shape) for _, video in layout.videos)
        return tiles, sum(side * side for side in shape), -shape[2]

    return min(factorisations(tile_size), key=cost)


def ideal_tiles(video: Video, tile_size: int) -> int:
    """Tiles a grid would need without any padding."""
    return -(-video.length // tile_size)


def padding(layout: Layout, shape: TileShape) -> float:
    """Tiles of `shape` that cover the layout's grids, over those a grid without padding needs."""
    size = math.prod(shape)
    needed = sum(ideal_tiles(video, size) for _, video in layout.videos)
    return sum(count_tiles(video.grid, shape) for _, video in layout.videos) / needed
