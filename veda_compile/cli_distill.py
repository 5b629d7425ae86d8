"""The command `veda distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from .cli_common import EXIT_ERROR, dtype_of
from .errors import VedaError
from .options import DEFAULT_DENSITY


def distill(
    model: Annotated[str, typer.Argument(help="A diffusers pipeline: a folder, or a hub id.")],
    prompts: Annotated[Path, typer.Option(help="A text file with one prompt a line.")],
    out: Annotated[Path, typer.Option(help="The *.veda.safetensors file to write.")],
    density: Annotated[float, typer.Option(help="Mean share of key tiles kept.")] = DEFAULT_DENSITY,
    policy: Annotated[str, typer.Option(help="mixed, scored or static.")] = "mixed",
    component: Annotated[
        str, typer.Option(help="The pipeline's video transformer.")
    ] = "transformer",
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of the video.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first prompt.")] = 0,
    device: Annotated[str, typer.Option(help="Where to run; auto is a GPU if there is one.")] = (
        "auto"
    ),
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    train: Annotated[bool, typer.Option(help="Train score projections too.")] = False,
    resume: Annotated[
        bool, typer.Option(help="Go on from what an interrupted run has left.")
    ] = True,
) -> None:
    """Learn a sidecar from a pipeline's own runs over your prompts.

    What is not given is the pipeline's default: give the sizes that you will generate.
    """
    from .distill_pipeline import Generation, distill_pipeline, load_pipeline, read_prompts

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = read_prompts(prompts)
        pipe = load_pipeline(model, device, dtype_of(dtype))
        job = distill_pipeline(
            pipe,
            wanted,
            out,
            component=component,
            generation=Generation(height, width, frames, steps, guidance, seed),
            density=density,
            policy=policy,
            train=train,
            resume=resume,
        )
    except VedaError as error:
        typer.echo(f"veda: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(EXIT_ERROR) from None
    typer.echo(job.summary())
    typer.echo(f"written: {out}")
