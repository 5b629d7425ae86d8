"""Whether each part of distillation earns its place: `python -m benchmarks.ablation`.

From one distillation of the reference model plans are made that differ in one part each, and their
attention is measured against dense on clips of classes and seeds that nothing was learned from,
always at equal density. The ratio to everything is paired clip by clip; its interval says whether
the part helps, harms, or shows no difference. Whether log S_j in the score helps is asked on a
grid whose borders hold ragged tiles, of full tiles it says nothing.

`--state` takes what a distillation kept (`*.job.veda.safetensors`): one for all densities, or one
for each. Without it the reference model is distilled for each density, which takes some minutes of
CPU; the states are kept in `--folder` and used again.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.quality.recordings import GRID, Size, grid_of, record, reference_model
from benchmarks.quality.splits import EVALUATION
from veda_compile.distiller import Distiller

from .learning import learn, load
from .measure import measure, rows
from .tables import ablation_table
from .variants import Variant, all_variants, ragged_variants

DENSITIES = (0.1, 0.2)
CLIPS = 16
"""Each class at each noise level once."""
RAGGED: Size = (7, 30, 26)
"""In pixels; 7 x 15 x 13 tokens."""
FOLDER = Path("build/distilled")
WIDTH = 200
"""Columns to print where standard output is no terminal."""

Task = Callable[[str, int], Callable[[], None]]


def main(
    state: Annotated[
        list[Path] | None, typer.Option(help="A *.job.veda.safetensors file, or one each density.")
    ] = None,
    density: Annotated[list[float] | None, typer.Option(help="Default: 0.1 and 0.2.")] = None,
    clips: Annotated[int, typer.Option(min=1, help="Held-out clips.")] = CLIPS,
    folder: Annotated[Path, typer.Option(help="Where states of own distillations lie.")] = FOLDER,
    generations: Annotated[int, typer.Option(min=1, help="Clips of an own distillation.")] = 8,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the JSON.")] = None,
) -> None:
    """Measure distillation without each of its parts; the last line is one JSON object."""
    densities = list(density or DENSITIES)
    if not all(0.0 < each < 1.0 for each in densities):
        raise typer.BadParameter(f"densities {densities}: must be above 0 and below 1")
    if state and len(state) not in (1, len(densities)):
        raise typer.BadParameter(
            f"{len(state)} states for densities {densities}: give one, or one each"
        )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:

        def task(name: str, total: int) -> Callable[[], None]:
            return partial(bar.advance, bar.add_task(name, total=total))

        model = reference_model()
        if state:
            paths = state * len(densities) if len(state) == 1 else state
            name = type(model).__name__
            learned = [load(p, name, d) for p, d in zip(paths, densities, strict=True)]
        else:
            learned = [own(model, folder, d, generations, task) for d in densities]
        report = ablate(model, learned, clips, task)
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    for part in ("parts", "ragged"):
        console.print(ablation_table(report[part], clips))
    line = json.dumps(report)
    if json_file:
        json_file.write_text(line + "\n")
    sys.stdout.write(line + "\n")


def own(model: Any, folder: Path, density: float, generations: int, task: Task) -> Distiller:
    """What was learned for a density, from the folder's state, or else learned now."""
    path = folder / f"reference-{density}.job.veda.safetensors"
    if path.exists():
        return load(path, type(model).__name__, density)
    folder.mkdir(parents=True, exist_ok=True)
    done = task(f"distil for {density}", generations)
    return learn(model, path, density, generations=generations, done=done)


def ablate(model: Any, learned: list[Distiller], clips: int, task: Task) -> dict[str, Any]:
    """Everything measured; each of `learned` is planned for its own density."""
    name, ragged_grid = type(model).__name__, grid_of(RAGGED)
    parts: list[Variant] = []
    ragged: list[Variant] = []
    for each in learned:
        parts += all_variants(each, name, GRID, each.options.density)
        ragged += ragged_variants(each, name, ragged_grid, each.options.density)
    found = measure(parts, record(model, EVALUATION, clips), task("parts", clips))
    bordered = measure(ragged, record(model, EVALUATION, clips, RAGGED), task("log S_j", clips))
    return {
        "benchmark": "ablation",
        "parts": rows(found, GRID),
        "ragged": rows(bordered, ragged_grid),
        "clips": clips,
        "probes": EVALUATION.probes(clips),
        "learned": [
            {
                "density": each.options.density,
                "runs": each.runs,
                "model_calls": each.calls,
                "measured_calls": each.measured,
            }
            for each in learned
        ],
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    typer.run(main)
