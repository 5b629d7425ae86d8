"""Distil the reference model: the demo's sidecar, and an example of `veda_compile.distill`.

The model generates a few clips, dense and untouched. What its attention does meanwhile is measured,
and at the end of the with-block the sidecar is written. It takes some minutes on two CPU cores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from reference_model.sampling import FOLDER, load_reference_model, sample

from veda_compile import distill

CLASSES = (0, 3, 5, 6)
"""What the model is distilled on; the demo draws the other classes."""

FIRST_SEED = 100
"""Generation i takes seed FIRST_SEED + i; the demo's seeds begin at 5000."""

SIDECAR = FOLDER / "distilled.veda.safetensors"
STEPS = 20


def main(
    density: Annotated[float, typer.Option(help="Mean share of key tiles kept.")] = 0.3,
    policy: Annotated[str, typer.Option(help="mixed, scored or static.")] = "mixed",
    generations: Annotated[int, typer.Option(min=1, max=4000, help="Clips to learn from.")] = 8,
    out: Annotated[Path, typer.Option(help="The *.veda.safetensors file to write.")] = SIDECAR,
) -> None:
    """Learn per head what the reference model's attention needs, and write it to OUT."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_reference_model(device=device)
    with distill(model, out, density, policy=policy) as job:
        for number in range(generations):
            kind = CLASSES[number % len(CLASSES)]
            # as the demo samples: without guidance the model sees one clip a step
            sample(model, [kind], steps=STEPS, seed=FIRST_SEED + number, guidance=1.0)
    typer.echo(job.summary())
    typer.echo(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
