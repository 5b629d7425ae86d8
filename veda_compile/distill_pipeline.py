"""Distillation of a diffusers pipeline over a list of prompts: what `veda distill` does."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .distill import Job, distill
from .errors import DistillError, shown

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generation:
    """What each prompt is generated with; None leaves the pipeline's own default.

    height, width: pixels. frames: of the video. steps: denoising steps. guidance: guidance scale.
    seed: of the first prompt; each further prompt takes the next.
    """

    height: int | None = None
    width: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0

    def arguments(self, number: int) -> dict[str, Any]:
        """Keyword arguments of the pipeline for prompt `number`."""
        given = {
            "height": self.height,
            "width": self.width,
            "num_frames": self.frames,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
        }
        known = {name: value for name, value in given.items() if value is not None}
        # one seed a prompt, on the CPU: the same on every device
        return {**known, "generator": torch.Generator("cpu").manual_seed(self.seed + number)}


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; empty lines and lines that start with # do not count. DistillError."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DistillError(f"prompts {path}: cannot be read ({error}): check the path") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise DistillError(f"prompts {path}: no prompt in it, write one a line")
    return prompts


def load_pipeline(model: str, device: str, dtype: torch.dtype) -> Any:
    """`DiffusionPipeline.from_pretrained` of a folder or hub id, on `device`. DistillError."""
    from diffusers import DiffusionPipeline  # slow to import

    try:
        return DiffusionPipeline.from_pretrained(model, torch_dtype=dtype).to(device)
    except (OSError, ValueError, RuntimeError, ImportError, AttributeError) as error:
        raise DistillError(
            f"model {shown(model)}: no pipeline could be loaded ({error}): give the folder or hub "
            "id of a diffusers pipeline"
        ) from error


def distill_pipeline(
    pipe: Any,
    prompts: Sequence[str],
    out: Path,
    *,
    component: str = "transformer",
    generation: Generation | None = None,
    **arguments: Any,
) -> Job:
    """Run `pipe` over `prompts` inside a distillation of one of its components.

    pipe: a diffusers pipeline. component: its attribute that holds the video transformer; a
    pipeline with two of them needs two distillations. generation: see `Generation`. arguments: of
    `distill`. Raises DistillError, and what `distill` and the pipeline raise.
    """
    model = getattr(pipe, component, None)
    if not isinstance(model, nn.Module):
        parts = getattr(pipe, "components", None)
        names = [
            name
            for name, part in (parts.items() if isinstance(parts, Mapping) else ())
            if isinstance(part, nn.Module)
        ]
        raise DistillError(
            f"the pipeline {type(pipe).__name__} has no model {component!r}: name one of "
            f"{', '.join(names)} as component"
        )
    chosen = generation or Generation()
    with distill(model, out, **arguments) as job:
        for number, prompt in enumerate(prompts):
            logger.info("prompt %d of %d: %s", number + 1, len(prompts), shown(prompt))
            pipe(prompt=prompt, output_type="latent", **chosen.arguments(number))
    return job
