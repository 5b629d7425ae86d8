"""What distillation measured of the reference model: from a saved job, or measured here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.quality.recordings import SIZE, Size, sample
from benchmarks.quality.splits import CALIBRATION
from veda_compile import distill
from veda_compile.distill_state import load_state, save_state
from veda_compile.distiller import Distiller, StudyOptions
from veda_compile.kernels.layout import Layout, Video
from veda_compile.sidecar_schema import Grid

FIRST_SEED = 100
"""Generation i takes seed FIRST_SEED + i, as examples/distill_reference.py does."""


def load(path: Path, model_class: str, density: float) -> Distiller:
    """What a job kept in `path`, to be planned for a mean density. Raises DistillError."""
    learned = Distiller(StudyOptions(density))
    load_state(learned, model_class, path)
    return learned


def learn(
    model: Any,
    path: Path,
    density: float,
    *,
    size: Size = SIZE,
    generations: int = 8,
    steps: int = 20,
    share: float = 0.34,
    options: Mapping[str, Any] | None = None,
    done: Callable[[], None] = lambda: None,
) -> Distiller:
    """Distil the model on clips of the calibration split; the state is kept in `path`.

    size: of the clips. share: of the model's calls that are measured. options: of the backend.
    done: called after each generation. Raises DistillError.
    """
    # a job that is interrupted leaves its state under another name than a complete one
    out = path.with_name(path.name.replace(".job.", ".full."))
    classes = CALIBRATION.classes
    with distill(
        model,
        out,
        density,
        share=share,
        options=options,
        resume=False,
        progress=False,
        train=True,
    ) as job:
        for number in range(generations):
            seed = FIRST_SEED + number
            sample(model, classes[number % len(classes)], size, steps, seed)
            done()
    save_state(job.learned, job.model_class, path)
    return job.learned


def for_density(learned: Distiller, density: float) -> Distiller:
    """The same measurements, planned for another mean density."""
    return replace(learned, options=replace(learned.options, density=density))


def layout_of(grid: Grid) -> Layout:
    """The grid and nothing else."""
    return Layout.of(Video(*grid))
