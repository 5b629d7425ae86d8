"""Plans for grids never seen: `python -m benchmarks.unseen_grids`.

The reference model is distilled on several token grids, and the plans of each are used on all the
others as the backend uses the nearest plan it has: tile shapes stay where they fit, densities are
scaled to the mean wanted. Attention is measured against dense on held-out clips, beside plans
learned on that grid itself and beside the closed form, which needs none.

`--state` takes what a distillation on 16 x 16 x 16 kept (`*.job.veda.safetensors`). What is not
there is learned, some minutes of CPU a grid, and its state kept in `--folder` and used again.
"""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.ablation.learning import for_density, learn, load
from benchmarks.ablation.measure import Measured, measure, ratio_of
from benchmarks.ablation.variants import (
    CLOSED_FORM,
    Variant,
    plain_plans,
    plans_on,
    sidecar_of,
)
from benchmarks.measured_rows import with_interval
from benchmarks.quality.recordings import GRID, record, reference_model
from benchmarks.quality.splits import EVALUATION
from veda_compile.distiller import Distiller
from veda_compile.sidecar_lookup import nearest_grid
from veda_compile.sidecar_schema import Grid

DENSITIES = (0.1, 0.2)
GRIDS = ("16x12x20", "12x16x16", "16x20x12")
FOLDER = Path("build/distilled")
WIDTH = 140
"""Columns to print where standard output is no terminal."""

Task = Callable[[str, int], Callable[[], None]]


def main(
    state: Annotated[
        Path | None, typer.Option(help="A *.job.veda.safetensors file of 16 x 16 x 16 tokens.")
    ] = None,
    grid: Annotated[
        list[str] | None, typer.Option(help=f"Other grids, as TxHxW; default: {', '.join(GRIDS)}.")
    ] = None,
    density: Annotated[list[float] | None, typer.Option(help="Default: 0.1 and 0.2.")] = None,
    clips: Annotated[int, typer.Option(min=1, help="Held-out clips a grid.")] = 8,
    generations: Annotated[
        int, typer.Option(min=0, help="Clips to learn a grid from; 0: no grid without a state.")
    ] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each, all measured.")] = 10,
    folder: Annotated[Path, typer.Option(help="Where states of grids lie.")] = FOLDER,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the JSON.")] = None,
) -> None:
    """Measure plans on grids they were not learned on; the last line is one JSON object."""
    densities = sorted(density or DENSITIES)
    if not all(0.0 < each < 1.0 for each in densities):
        raise typer.BadParameter(f"densities {densities}: must be above 0 and below 1")
    grids = list(dict.fromkeys([GRID, *map(parsed, grid or GRIDS)]))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:

        def task(name: str, total: int) -> Callable[[], None]:
            return partial(bar.advance, bar.add_task(name, total=total))

        model = reference_model()
        learned: dict[Grid, Distiller] = {}
        for each in grids:
            path = folder / f"reference-{shown(each)}.job.veda.safetensors"
            if each == GRID and state is not None:
                path = state
            if not path.exists() and not generations:
                continue
            if not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                size = (each[0], 2 * each[1], 2 * each[2])
                learn(
                    model, path, densities[-1], size=size, generations=generations, steps=steps,
                    share=1.0, done=task(f"distil on {shown(each)}", generations),
                )  # fmt: skip
            learned[each] = load(path, type(model).__name__, densities[-1])
        if not learned:
            raise typer.BadParameter("no state, and no generations to learn from: give either")
        report = compare(model, grids, learned, densities, clips, task)
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    console.print(table(report["rows"], clips))
    line = json.dumps(report)
    if json_file:
        json_file.write_text(line + "\n")
    sys.stdout.write(line + "\n")


def parsed(text: str) -> Grid:
    """A grid from "TxHxW". Raises BadParameter."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    sides = tuple(int(side) for side in found.groups()) if found else ()
    # the data's objects need frames of 20 pixels, 10 tokens
    if len(sides) != 3 or min(sides[0], sides[1] // 10, sides[2] // 10) < 1:
        raise typer.BadParameter(f"grid {text}: must be TxHxW in tokens, H and W at least 10")
    return (sides[0], sides[1], sides[2])


def shown(grid: Sequence[int]) -> str:
    """A grid as "TxHxW"."""
    return "x".join(map(str, grid))


def compare(
    model: Any,
    grids: Sequence[Grid],
    learned: dict[Grid, Distiller],
    densities: list[float],
    clips: int,
    task: Task,
) -> dict[str, Any]:
    """The plans of every grid that was learned, on all grids. Returns what the JSON line says."""
    rows = []
    for grid in grids:
        variants = [v for each in densities for v in variants_on(model, learned, grid, each)]
        size = (grid[0], 2 * grid[1], 2 * grid[2])
        done = task(f"attention on {shown(grid)}", clips)
        rows += rows_of(measure(variants, record(model, EVALUATION, clips, size), done), grid)
    return {
        "benchmark": "unseen_grids",
        "rows": rows,
        "clips": clips,
        "probes": EVALUATION.probes(clips),
        "learned": {
            shown(grid): {"model_calls": each.calls, "measured_calls": each.measured}
            for grid, each in learned.items()
        },
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
    }


def variants_on(
    model: Any, learned: dict[Grid, Distiller], grid: Grid, density: float
) -> list[Variant]:
    """On one grid: its own plans if it was learned, those of each other grid, the closed form."""
    made = []
    others = [other for other in learned if other != grid]
    nearest = nearest_grid(grid, others).used if others else None
    own = _learned_on(grid) if grid in learned else CLOSED_FORM
    for other in [*([grid] if grid in learned else []), *others]:
        sidecar = sidecar_of(for_density(learned[other], density), type(model).__name__)
        part = "own" if other == grid else "nearest" if other == nearest else "other"
        plans = plans_on(sidecar, grid, density)
        made.append(Variant(_learned_on(other), part, density, plans, own))
    heads = [card.heads for card in sidecar.model.layers]
    plain = plain_plans(heads, grid, sidecar.tile_size, density)
    return [*made, Variant(CLOSED_FORM, "none", density, plain, own)]


def rows_of(measured: Sequence[Measured], grid: Grid) -> list[dict[str, Any]]:
    """Plain data: errors, and their ratios to own plans and to the closed form."""
    known = {(each.variant.name, each.variant.density): each for each in measured}
    made = []
    for each in measured:
        variant, errors = each.variant, each.by_layer
        row: dict[str, Any] = {
            "grid": list(grid),
            "density": variant.density,
            "plans": variant.name,
            "relation": variant.part,
            "kept": sum(each.kept) / len(each.kept),
            "retained_mass": sum(each.retained) / len(each.retained),
            "error": float(errors.mean()),
            "error_by_clip": errors.tolist(),
            "head_error": float(each.by_head.mean()),
        }
        for name, base in (("own", _learned_on(grid)), ("closed_form", CLOSED_FORM)):
            there = known.get((base, variant.density))
            if there is not None:
                ratio, interval = ratio_of(errors, there.by_layer)
                row[f"times_{name}"], row[f"times_{name}_interval"] = ratio, list(interval)
        made.append(row)
    return made


def table(rows: Sequence[dict[str, Any]], clips: int) -> Table:
    """For people."""
    made = Table(title=f"Relative squared error of attention, {clips} held-out clips a grid")
    for column in ("grid", "density", "plans", "kept", "error", "mass kept"):
        made.add_column(column, justify="left" if column == "plans" else "right")
    for column in ("x own plans (95 %)", "x closed form (95 %)"):
        made.add_column(column, justify="right")
    last = None
    for row in rows:
        place = (row["grid"], row["density"])
        if last not in (None, place):
            made.add_section()
        last = place
        nearest = ", nearest" if row["relation"] == "nearest" else ""
        made.add_row(
            shown(row["grid"]),
            f"{row['density']:.2f}",
            row["plans"] + nearest,
            f"{row['kept']:.3f}",
            f"{row['error']:.4f}",
            f"{row['retained_mass']:.3f}",
            *(_ratio(row, name) for name in ("times_own", "times_closed_form")),
        )
    return made


def _learned_on(grid: Grid) -> str:
    return f"learned on {shown(grid)}"


def _ratio(row: dict[str, Any], name: str) -> str:
    return with_interval(row, name, 3) if name in row else "-"


if __name__ == "__main__":
    typer.run(main)
