"""The learner behind distillation: an observer of attention calls that decides what to measure.

Two phases per token grid. *Search*: some calls of every layer are measured under every tile shape.
Then every head's shape is chosen, for all layers at once. *Study*: more query tiles of the chosen
shapes, from which scores are trained and, on calls set apart, judged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .candidate_shapes import candidate_shapes
from .distilled_plan import LayerChoice, choose_heads
from .kernels.layout import Layout, Video
from .kernels.plan import TileShape
from .layer_study import LayerStudy
from .observed_call import ObservedCall
from .options import tile_size_for
from .score_training import Lesson, ScoreTrainer
from .sidecar_schema import Grid, LayerCard

_GOLDEN = 0.6180339887498949
_HELD_OUT_EVERY = 4
_LESSONS_A_STEP = 4


@dataclass(frozen=True)
class StudyOptions:
    """How much is measured.

    density: mean density wanted. policy: "mixed", "scored" or "static", see `choose_heads`.
    tile_size: 64 or 128; None is by length. share: of the model's calls that are measured.
    search_calls: per layer and grid; after search_all_calls of them only promising shapes.
    search_tokens: queries a call. study_tokens: query tiles a call.
    train: whether scores are trained. training_steps: after each studied call.
    lesson_bytes: memory for what training repeats. seed: of the samples.
    """

    density: float
    policy: str = "mixed"
    tile_size: int | None = None
    share: float = 0.34
    search_calls: int = 12
    search_all_calls: int = 4
    search_tokens: int = 64
    study_tokens: int = 8
    train: bool = False
    training_steps: int = 2
    lesson_bytes: int = 512 << 20
    seed: int = 0


@dataclass(eq=False)
class Distiller:
    """Takes `ObservedCall`s; `choices` tells what each head should do by now.

    layers: by name, in the order of first calls. studies: by (layer, grid). calls: the model's
    calls seen; measured: those measured; runs: generations, told by a timestep that goes back up.
    """

    options: StudyOptions
    layers: dict[str, LayerCard] = field(default_factory=dict)
    studies: dict[tuple[str, Grid], LayerStudy] = field(default_factory=dict)
    shapes: dict[Grid, dict[str, tuple[TileShape, ...]]] = field(default_factory=dict)
    trainers: dict[str, ScoreTrainer] = field(default_factory=dict)
    lessons: dict[str, list[Lesson]] = field(default_factory=dict)
    calls: int = 0
    measured: int = 0
    runs: int = 0
    timesteps: list[float] = field(default_factory=list)
    _measuring: bool = False
    _split: str = "fit"
    _studied: int = 0
    _begun: bool = False
    _last: float | None = None

    def __call__(self, call: ObservedCall) -> None:
        """Measure the call, or let it pass."""
        name = call.layer.name
        if name not in self.layers:
            self.layers[name] = call.layer
        if name == next(iter(self.layers)):
            self._begin(call)
        if self._measuring:
            self._measure(call)

    def grid_of(self, layout: Layout) -> Grid:
        """The grid that a sidecar's plan for `layout` is filed under: the largest."""
        return max((video.grid for _, video in layout.videos), key=math.prod)

    def grids(self) -> list[Grid]:
        """Grids met, in order."""
        return list(dict.fromkeys(grid for _, grid in self.studies))

    def choices(self, grid: Grid, split: str = "fit") -> Mapping[str, LayerChoice]:
        """What each layer's heads take on `grid`, from what has been measured."""
        studies = {name: study for (name, of), study in self.studies.items() if of == grid}
        return choose_heads(
            studies, self.options.density, self.options.policy, self.shapes.get(grid)
        )

    def _begin(self, call: ObservedCall) -> None:
        """A new call of the model: is it measured, and what for."""
        now = None if call.timestep is None else float(call.timestep)
        risen = now is not None and self._last is not None and now > self._last
        self.runs += risen or not self._begun
        self._begun, self._last = True, now
        self.calls += 1
        # spread evenly over the steps, and over other steps in every run
        self._measuring = self.calls == 1 or (self.calls * _GOLDEN) % 1.0 < self.options.share
        if not self._measuring:
            return
        self.measured += 1
        if now is not None:
            self.timesteps.append(now)
        grid = self.grid_of(call.layout)
        self._settle_shapes(grid)
        self._split = "fit"
        if grid in self.shapes:
            self._studied += 1
            apart = self.runs if self.runs > 1 else self._studied
            self._split = "held_out" if apart % _HELD_OUT_EVERY == 0 else "fit"

    def _settle_shapes(self, grid: Grid) -> None:
        """Choose the shapes of a grid once every layer has been searched often enough."""
        studies = [study for (_, of), study in self.studies.items() if of == grid]
        known = len(studies) == len(self.layers) > 0
        enough = all(study.searched >= self.options.search_calls for study in studies)
        if grid not in self.shapes and known and enough:
            self.shapes[grid] = {name: choice.shapes for name, choice in self.choices(grid).items()}

    def _measure(self, call: ObservedCall) -> None:
        grid, name = self.grid_of(call.layout), call.layer.name
        size = self.options.tile_size or tile_size_for(
            sum(video.length for _, video in call.layout.videos)
        )
        study = self.studies.get((name, grid))
        if study is None or study.layout != call.layout:
            # extra tokens may vary in number from prompt to prompt: the study goes on
            fresh = LayerStudy(call.layout, call.layer.heads, call.layer.head_dim, size)
            study = fresh if study is None else study.on(call.layout)
            self.studies[name, grid] = study
        shapes = self.shapes.get(grid, {}).get(name)
        if shapes is None:
            tokens = self._tokens(call.layout, self.options.search_tokens)
            found = candidate_shapes(call.layout, size)
            if study.searched >= self.options.search_all_calls:
                found = study.promising(found, self.options.density)
            study.search(call, found, tokens)
            return
        tokens = self._tokens(call.layout, self.options.study_tokens)
        trainer = self.trainers.get(name)
        weights = None if trainer is None else trainer.weights.detach()
        study.study(call, shapes, tokens, self._split, weights)
        if self._split == "fit" and self.options.train:
            self._train(call, study, shapes, tokens)

    def _tokens(self, layout: Layout, count: int) -> Tensor:
        """(count,) queries of the video, one at random in each of as many parts, others each time.

        At equal steps they would stand in few columns of the grid.
        """
        rows = torch.cat(
            [torch.arange(at, at + video.length) for at, video in _query_places(layout)]
        )
        generator = torch.Generator().manual_seed(self.options.seed + 7919 * self.calls)
        places = (torch.arange(count) + torch.rand(count, generator=generator)) / count * len(rows)
        return rows[places.long().clamp(max=len(rows) - 1)]

    def _train(
        self, call: ObservedCall, study: LayerStudy, shapes: tuple[TileShape, ...], tokens: Tensor
    ) -> None:
        name = call.layer.name
        lesson = study.lesson(call, shapes, tokens, self.options.density)
        kept = self.lessons.setdefault(name, [])
        room = self.options.lesson_bytes // max(len(self.layers), 1)
        while kept and sum(x.bytes for x in kept) + lesson.bytes > room:
            kept.pop(0)
        kept.append(lesson)
        if name not in self.trainers:
            self.trainers[name] = ScoreTrainer(
                call.layer.heads, call.layer.head_dim, call.scale, call.q.device
            )
        self.trainers[name] = self.trainers[name].on(call.q.device)
        picks = torch.Generator().manual_seed(self.options.seed + self.calls)
        for _ in range(self.options.training_steps):
            order = torch.randperm(len(kept), generator=picks)[:_LESSONS_A_STEP].tolist()
            self.trainers[name].step([kept[i] for i in order])


def _query_places(layout: Layout) -> list[tuple[int, Video]]:
    """(first query, video segment) of every video segment: context tokens are no queries."""
    contexts = [(first, context.length) for first, context in layout.contexts]
    return [
        (at - sum(length for first, length in contexts if first < at), video)
        for at, video in layout.videos
    ]
