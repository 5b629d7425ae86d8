"""Timed sampling for the demo: the same seeds through two models, step by step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from reference_model.sampling import sample_steps
from torch import Tensor

CLASSES = (1, 7, 2, 4)
"""What the demo draws, clip by clip: nothing of it was seen by distillation."""


@dataclass(frozen=True)
class Setup:
    """What is generated, and where.

    size: (T, H, W) in pixels. steps: denoising steps per clip. seed: clip i starts from the noise
    of seed + i. guidance: weight of classifier-free guidance, which doubles the model's batch.
    """

    size: tuple[int, int, int]
    steps: int
    clips: int
    seed: int
    guidance: float
    device: torch.device
    dtype: torch.dtype

    def class_of(self, clip: int) -> int:
        """Class of a clip; neighbouring clips differ in both shape and motion."""
        return CLASSES[clip % len(CLASSES)]


def timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """(result, seconds) of one call: wall clock on CPU, events on CUDA."""
    if device.type != "cuda":
        began = time.perf_counter()
        result = call()
        return result, time.perf_counter() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    result = call()
    end.record()
    end.synchronize()
    return result, start.elapsed_time(end) / 1e3


@dataclass
class TimedModel:
    """A model that notes how long each call takes, and the arguments of one of them.

    keep: number of the call whose arguments stay in `kept`.
    """

    model: Callable[..., Any]
    device: torch.device
    keep: int = -1
    seconds: list[float] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)

    def __call__(self, **inputs: Any) -> Any:
        """Call the model."""
        if len(self.seconds) == self.keep:
            self.kept = inputs
        result, seconds = timed(lambda: self.model(**inputs), self.device)
        self.seconds.append(seconds)
        return result

    @property
    def step(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)


def warm_up(model: Callable[..., Any], setup: Setup, calls: int = 3) -> float:
    """Compile a model for the set-up and run it a few times. Returns the first call's seconds."""
    watched = TimedModel(model, setup.device)
    for _ in _states(watched, setup, clip=0, steps=calls):
        pass
    return watched.seconds[0]


def generate_both(
    dense: TimedModel, sparse: TimedModel, setup: Setup, after_step: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """The same clips from both models: two (B, 3, T, H, W), as `_shown` makes them.

    The models take turns step by step, so that both meet the same state of the machine.
    """
    ends = []
    for clip in range(setup.clips):
        pairs = zip(_states(dense, setup, clip), _states(sparse, setup, clip), strict=True)
        for pair in pairs:
            end = pair
            after_step()
        ends.append(end)
    dense_ends, sparse_ends = zip(*ends, strict=True)
    return _shown(dense_ends), _shown(sparse_ends)


def _states(
    model: Callable[..., Any], setup: Setup, clip: int, steps: int | None = None
) -> Iterator[Tensor]:
    """The latents of one clip after each step."""
    return sample_steps(
        model,
        [setup.class_of(clip)],
        setup.size,
        setup.steps if steps is None else steps,
        setup.seed + clip,
        guidance=setup.guidance,
        device=setup.device,
        dtype=setup.dtype,
    )


def _shown(clips: Sequence[Tensor]) -> Tensor:
    """One float32 batch on CPU, clamped to [-1, 1] as a screen shows it."""
    return torch.cat(list(clips)).cpu().clamp(-1.0, 1.0)
