"""Distillation: a sidecar from a user's own runs, learned while they run dense and untouched."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from .distill_progress import JobProgress
from .distill_state import load_state, save_state, state_path
from .distill_summary import job_table
from .distilled_plan import POLICIES
from .distilled_sidecar import distilled_sidecar
from .distiller import Distiller, StudyOptions
from .errors import DistillError, OptionsError, shown
from .kernels.op import OP_NAME
from .observing import ObservedCall, ObservedModel, observed
from .options import DEFAULT_DENSITY, TILE_SIZES
from .sidecar import Sidecar
from .sidecar_file import SUFFIX

logger = logging.getLogger(__name__)

_SUMMARY_WIDTH = 110


class Job:
    """A distillation in progress, or done.

    out: the sidecar to be written. learned: what has been measured. sidecar: what was written;
    None before.
    """

    def __init__(self, out: Path, model_class: str, options: StudyOptions) -> None:
        self.out = out
        self.model_class = model_class
        self.learned = Distiller(options)
        self.sidecar: Sidecar | None = None
        self.resumed = False

    def summary(self) -> str:
        """What was measured and chosen so far, as a table in plain text."""
        text = io.StringIO()
        console = Console(file=text, width=_SUMMARY_WIDTH, force_terminal=False)
        console.print(job_table(self.learned, self.model_class))
        return text.getvalue()

    def finish(self, complete: bool = True) -> Sidecar:
        """Write the sidecar from what has been learned so far. Raises DistillError, SidecarError.

        complete: whether the runs came to their end; goes into the provenance.
        """
        learned = self.learned
        provenance = {
            "made_by": "veda_compile.distill",
            "complete": complete,
            "density": learned.options.density,
            "policy": learned.options.policy,
            "model_calls": learned.calls,
            "measured_calls": learned.measured,
            "runs": learned.runs,
            "timesteps": sorted({round(step, 3) for step in learned.timesteps}, reverse=True),
            "seed": learned.options.seed,
            "versions": {"torch": torch.__version__, "op": OP_NAME},
        }
        self.sidecar = distilled_sidecar(learned, self.model_class, provenance)
        self.sidecar.save(self.out)
        return self.sidecar


@contextmanager
def distill(
    model: nn.Module,
    out: str | os.PathLike[str],
    density: float = DEFAULT_DENSITY,
    *,
    policy: str = "mixed",
    tile_size: int | None = None,
    train: bool = False,
    share: float = 0.34,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Iterator[Job]:
    """Learn a sidecar from what `model` is used for inside the context, and write it at its end.

    The model runs dense, bit-equal to a dense compile by Inductor; a part of its calls is measured
    as they pass. Run what the sidecar is for: your own prompts, sizes, schedulers, LoRAs. Four or
    more generations are a good start; one in four is set apart to judge the result.

    Args:
        model: the transformer: eager, compiled as a whole or block by block.
        out: the *.veda.safetensors file to write.
        density: mean share of key tiles to keep over all heads, in (0, 1].
        policy: "mixed" (per head a scored tile shape or a static mode), "scored", "static".
        tile_size: 64 or 128; None is by length.
        train: train score projections too. Heads keep them only where they beat the closed form.
            Off, because what they gained on held-out clips is less than what they cost: see
            docs/method.md, section 6.
        share: of the model's calls that are measured, in (0, 1].
        seed: of the samples.
        options: of backend "veda" for finding the attention (`grid`, `dense_layers`, ...).
        resume: go on from the state that an interrupted run has left beside `out`.
        progress: show a progress line where standard error is a terminal.

    If the context is left by an exception, Ctrl-C for one, what was learned is kept beside `out` as
    `*.job.veda.safetensors` (and as a sidecar, if it is enough for one), and the next distillation
    into `out` goes on from there.

    Raises:
        OptionsError: an argument is wrong. DistillError: nothing could be learned, or the state
        beside `out` is of other work. SidecarError: `out` cannot be written.
    """
    path = Path(out)
    chosen = _checked(path, density, policy, tile_size, share, train, seed)
    inner = getattr(model, "_orig_mod", model)
    job = Job(path, type(inner).__name__, chosen)
    state = state_path(path)
    if resume and state.exists():
        load_state(job.learned, job.model_class, state)
        job.resumed = True
        logger.info("distillation goes on from %s: %d calls measured", state, job.learned.measured)
    with JobProgress(job.learned, shown=progress) as line:

        def observe(call: ObservedCall) -> None:
            job.learned(call)
            line.update()

        with observed(model, observe, options=options) as seen:
            try:
                yield job
            except BaseException:
                _keep(job, state)
                raise
    if not job.learned.layers:
        raise DistillError(_nothing_seen(seen))
    try:
        job.finish()
    except BaseException:
        save_state(job.learned, job.model_class, state)
        raise
    state.unlink(missing_ok=True)


def _keep(job: Job, state: Path) -> None:
    """Save what an interrupted job has learned."""
    if not job.learned.measured:
        return
    save_state(job.learned, job.model_class, state)
    logger.warning(
        "distillation was interrupted after %d measured calls: they are kept in %s, distill into "
        "%s again to go on", job.learned.measured, state, job.out,
    )  # fmt: skip
    try:
        job.finish(complete=False)
    except DistillError as error:
        logger.warning("no sidecar yet: %s", error)


def _nothing_seen(seen: ObservedModel) -> str:
    """Why no attention call was observed."""
    if not seen.left:
        return (
            f"no attention call of {seen.model_class} was seen: call the model, or a pipeline that "
            "uses it, inside the distillation"
        )
    reasons = {f"{site.layer}: {site.reason}" for site in seen.left}
    return (
        f"none of {len(seen.left)} attention calls of {seen.model_class} is video self-attention "
        f"that can be replaced ({'; '.join(sorted(reasons)[:3])}): see `veda explain`"
    )


def _checked(
    path: Path,
    density: float,
    policy: str,
    tile_size: int | None,
    share: float,
    train: bool,
    seed: int,
) -> StudyOptions:
    if not path.name.endswith(SUFFIX):
        raise OptionsError(f"out is {shown(str(path))}: its name must end in {SUFFIX}")
    if not path.parent.is_dir():
        raise OptionsError(f"out is {shown(str(path))}: the folder {path.parent} does not exist")
    for name, value in (("density", density), ("share", share)):
        number = isinstance(value, float | int) and not isinstance(value, bool)
        if not (number and 0.0 < value <= 1.0):
            raise OptionsError(f"{name} is {shown(value)}: must be above 0 and at most 1")
    if policy not in POLICIES:
        raise OptionsError(f"policy is {shown(policy)}: must be one of {', '.join(POLICIES)}")
    if tile_size not in (None, *TILE_SIZES):
        raise OptionsError(
            f"tile_size is {shown(tile_size)}: must be one of {', '.join(map(str, TILE_SIZES))}"
        )
    return StudyOptions(
        float(density), policy, tile_size, float(share), train=bool(train), seed=int(seed)
    )
