"""Searching one layer on one grid: every tile shape once, the better ones more often.

With each shape come densities for its scored heads, and static modes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .candidate_shapes import candidate_shapes
from .kernels.layout import Layout, Video
from .kernels.plan import TileShape
from .kernels.static_modes import StaticMode
from .kernels.tiles import tile_table
from .observed_call import ObservedCall
from .row_errors import RowSample
from .searched_modes import SearchedModes, searched_modes
from .sidecar_schema import Grid
from .static_candidates import stripe_of

ROUNDS = 4
"""How often a shape can be measured, each time on another call of the model."""

_SURVIVORS = 2
"""Shapes of each head that go on into the next round."""

_ROWS, _LEAST_ROWS = 32, 8
_ROW_BYTES = 128 << 20
"""Memory for the probabilities of the sampled queries; `row_errors` takes as much beside them."""

_STEPS = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)


def ladder(density: float) -> tuple[float, ...]:
    """Densities at which error is measured, around the mean that is wanted; 1.0 has no error."""
    return tuple(step * density for step in _STEPS if step * density < 1.0)


@dataclass(frozen=True)
class Option:
    """What a head can take: a tile shape with a density, or with a static mode of that cost.

    error: relative squared output error. mode: "scored", "window" or "stripe". number: which of
    the windows or of the stripes of `searched_modes`.
    """

    shape: TileShape
    density: float
    error: float
    mode: str = "scored"
    number: int = 0


@dataclass(eq=False)
class LayerSearch:
    """What was measured of one layer. Every unit is one shape for all heads on one call.

    density: the mean that is wanted. error: by shape, (H, K) relative squared error at `ladder`'s
    densities, summed over the rounds `taken` of it. static: by shape, (H, M) that of its
    `searched_modes`, summed over `static_taken` of them: those whose layout has one video segment
    alone. columns: by shape, (H, n) probability on each key tile, summed over these rounds. energy:
    (H,) mean squared norm of the dense outputs, summed over `units`. stage: rounds completed.
    """

    grid: Grid
    shapes: tuple[TileShape, ...]
    heads: int
    head_dim: int
    density: float
    score: str
    error: dict[TileShape, Tensor] = field(default_factory=dict)
    taken: dict[TileShape, int] = field(default_factory=dict)
    static: dict[TileShape, Tensor] = field(default_factory=dict)
    static_taken: dict[TileShape, int] = field(default_factory=dict)
    columns: dict[TileShape, Tensor] = field(default_factory=dict)
    energy: Tensor = field(init=False)
    stage: int = 0
    units: int = 0
    _pending: list[TileShape] = field(init=False)

    def __post_init__(self) -> None:
        self.energy = torch.zeros(self.heads, dtype=torch.float64, device="cpu")
        self._pending = list(self.shapes)

    @classmethod
    def of(cls, call: ObservedCall, tile_size: int, density: float, score: str) -> LayerSearch:
        """A search with nothing measured yet."""
        shapes = candidate_shapes(call.layout, tile_size)
        grid = max((video.grid for _, video in call.layout.videos), key=math.prod)
        return cls(grid, shapes, call.layer.heads, call.layer.head_dim, density, score)

    @property
    def done(self) -> bool:
        """Whether all rounds are completed."""
        return self.stage == ROUNDS

    def sample(self, call: ObservedCall, seed: int) -> RowSample:
        """The queries of this call that are measured; others for every seed."""
        table = tile_table(call.layout, self.shapes[0], torch.device("cpu"))
        video = (table.tile_of_query >= 0).nonzero()[:, 0]
        room = _ROW_BYTES // (4 * self.heads * call.k.shape[2])
        rows = max(_LEAST_ROWS, min(_ROWS, room))
        generator = torch.Generator(device="cpu").manual_seed(seed)
        steps = torch.arange(rows, device="cpu")
        shifts = torch.rand(rows, generator=generator, device="cpu")
        places = (steps + shifts) / rows * len(video)
        tokens = video[places.long().clamp(max=len(video) - 1)]
        return RowSample.of(call, seed % call.q.shape[0], tokens)

    def step(self, sample: RowSample) -> None:
        """Measure the next shape."""
        shape = self._pending[0]
        densities = ladder(self.density)
        alone = len(sample.call.layout.videos) == 1
        modes, seen = self.modes(shape) if alone else None, self.columns.get(shape)
        found = sample.errors(shape, densities, self.score, modes, seen if alone else None)
        energy = found.energy.double().cpu()
        floor = energy.clamp(min=torch.finfo(energy.dtype).tiny)[:, None]
        relative, static = found.scored.double().cpu() / floor, found.static.double().cpu() / floor
        if not bool(relative.isfinite().all() and static.isfinite().all()):
            raise FloatingPointError("attention outputs are not finite")
        self.error[shape] = self.error.get(shape, 0.0) + relative
        self.taken[shape] = self.taken.get(shape, 0) + 1
        if alone:
            self.static[shape] = self.static.get(shape, 0.0) + static
            self.static_taken[shape] = self.static_taken.get(shape, 0) + 1
            columns = found.columns.double().cpu()
            self.columns[shape] = columns if seen is None else seen + columns
        self.energy += energy / len(sample.tokens)
        self.units += 1
        self._pending.pop(0)
        if not self._pending:
            self.stage += 1
            self._pending = [] if self.done else self._survivors()

    def modes(self, shape: TileShape) -> SearchedModes:
        """The static modes that are tried under a shape."""
        return searched_modes(self.grid, shape, self.density)

    def options(self, head: int) -> list[Option]:
        """What a head can take: of all that was measured in all rounds."""
        found: list[Option] = []
        for shape, taken in self.taken.items():
            if taken < ROUNDS:
                continue
            errors = (self.error[shape][head] / taken).tolist()
            found += map(Option, [shape] * len(errors), ladder(self.density), errors)
            found.append(Option(shape, 1.0, 0.0))
            if self.static_taken.get(shape, 0) < ROUNDS:
                continue
            modes = self.modes(shape)
            kinds = [("window", number) for number in range(len(modes.windows))]
            kinds += [("stripe", number) for number in range(len(modes.stripes))]
            errors = (self.static[shape][head] / taken).tolist()
            found += [
                Option(shape, cost, error, *kind)
                for cost, error, kind in zip(modes.costs, errors, kinds, strict=True)
            ]
        return found

    def static_mode(self, head: int, option: Option) -> StaticMode | None:
        """The static mode of an option of a head; None where it is scored."""
        modes = self.modes(option.shape)
        if option.mode == "window":
            return modes.windows[option.number]
        if option.mode == "stripe":
            mass, count = self.columns[option.shape][head], modes.stripes[option.number]
            return stripe_of(mass, Layout.of(Video(*self.grid)), option.shape, count)
        return None

    def weights(self) -> list[float]:
        """(H,) each head's share of the energy of the layer's output."""
        return (self.energy / self.energy.sum().clamp(min=1e-30)).tolist()

    def _survivors(self) -> list[TileShape]:
        """Of the shapes measured in every round so far, those that err least for some head at no
        more than the wanted density, in order."""
        place = len([d for d in ladder(self.density) if d < self.density * (1 - 1e-9)])
        place = min(place, len(ladder(self.density)) - 1)
        alive = [shape for shape in self.shapes if self.taken[shape] == self.stage]
        errors = torch.stack([self._least_error(shape, place) for shape in alive])
        best = errors.topk(min(_SURVIVORS, len(alive)), dim=0, largest=False).indices
        kept = set(best.flatten().tolist())
        return [shape for number, shape in enumerate(alive) if number in kept]

    def _least_error(self, shape: TileShape, place: int) -> Tensor:
        """(H,) of scores at a place of the ladder, or of a static mode that costs no more."""
        least, taken = self.error[shape][:, place] / self.taken[shape], self.static_taken.get(shape)
        if taken is not None:
            costs = torch.tensor(self.modes(shape).costs, dtype=torch.float64, device="cpu")
            static = self.static[shape][:, costs <= self.density * (1 + 1e-9)] / taken
            least = torch.cat([least[:, None], static], 1).amin(1)
        return least
