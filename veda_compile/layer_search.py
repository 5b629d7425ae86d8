"""Searching one layer's tile shapes on one grid: all of them once, the better ones once more."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .candidate_shapes import candidate_shapes
from .kernels.plan import TileShape
from .kernels.tiles import tile_table
from .observed_call import ObservedCall
from .row_errors import RowSample

ROUNDS = 2
"""How often a shape is measured, each time on another call of the model."""

_SURVIVORS = 2
"""Shapes of each head that are measured again."""

_ROWS, _LEAST_ROWS = 32, 8
_ROW_BYTES = 128 << 20
"""Memory for the probabilities of the sampled queries."""

_STEPS = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)


def ladder(density: float) -> tuple[float, ...]:
    """Densities at which error is measured, around the mean that is wanted; 1.0 has no error."""
    return tuple(step * density for step in _STEPS if step * density < 1.0)


@dataclass(eq=False)
class LayerSearch:
    """What was measured of one layer. Every unit is one shape for all heads on one call.

    density: the mean that is wanted. error: by shape, (H, K) relative squared error at `ladder`'s
    densities, summed over the rounds `taken` of it. energy: (H,) mean squared norm of the dense
    outputs, summed over `units`. stage: rounds completed.
    """

    shapes: tuple[TileShape, ...]
    heads: int
    head_dim: int
    density: float
    score: str
    error: dict[TileShape, Tensor] = field(default_factory=dict)
    taken: dict[TileShape, int] = field(default_factory=dict)
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
        return cls(shapes, call.layer.heads, call.layer.head_dim, density, score)

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
        error, energy = sample.errors(shape, densities, self.score)
        error, energy = error.double().cpu(), energy.double().cpu()
        relative = error / energy.clamp(min=torch.finfo(energy.dtype).tiny)[:, None]
        if not bool(relative.isfinite().all()):
            raise FloatingPointError("attention outputs are not finite")
        self.error[shape] = self.error.get(shape, 0.0) + relative
        self.taken[shape] = self.taken.get(shape, 0) + 1
        self.energy += energy / len(sample.tokens)
        self.units += 1
        self._pending.pop(0)
        if not self._pending:
            self.stage += 1
            self._pending = [] if self.done else self._survivors()

    def options(self, head: int) -> list[tuple[TileShape, float, float]]:
        """(shape, density, relative squared error) of what a head can take: of all rounds."""
        found = []
        for shape, taken in self.taken.items():
            if taken == ROUNDS:
                errors = (self.error[shape][head] / taken).tolist()
                densities = ladder(self.density)
                found += [(shape, d, e) for d, e in zip(densities, errors, strict=True)]
                found.append((shape, 1.0, 0.0))
        return found

    def weights(self) -> list[float]:
        """(H,) each head's share of the energy of the layer's output."""
        return (self.energy / self.energy.sum().clamp(min=1e-30)).tolist()

    def _survivors(self) -> list[TileShape]:
        """The shapes that err least for some head at the wanted density, in order."""
        place = len([d for d in ladder(self.density) if d < self.density * (1 - 1e-9)])
        place = min(place, len(ladder(self.density)) - 1)
        errors = torch.stack([self.error[shape][:, place] for shape in self.shapes])
        best = errors.topk(min(_SURVIVORS, len(self.shapes)), dim=0, largest=False).indices
        kept = set(best.flatten().tolist())
        return [shape for number, shape in enumerate(self.shapes) if number in kept]
