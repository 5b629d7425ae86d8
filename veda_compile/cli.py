"""The `veda` command: look into sidecars."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import __version__
from .errors import VedaError
from .sidecar import GridPlan, Sidecar

app = typer.Typer(
    help="veda-compile: tile-sparse attention for video diffusion transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

EXIT_ERROR = 2
"""Exit code when the input was wrong; the error is one line on stderr."""


@app.command()
def version() -> None:
    """Show the installed version."""
    typer.echo(__version__)


@app.command()
def inspect(
    sidecar: Annotated[Path, typer.Argument(help="A *.veda.safetensors file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON instead of tables.")] = False,
) -> None:
    """Show what a sidecar holds: its model, grids, tile shapes, densities and provenance."""
    try:
        facts = summary(Sidecar.load(sidecar))
    except VedaError as error:
        typer.echo(f"veda: {error}", err=True)
        raise typer.Exit(EXIT_ERROR) from None
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _show(facts)


def summary(sidecar: Sidecar) -> dict[str, Any]:
    """What `veda inspect` shows, as plain JSON data."""
    return {
        "file": sidecar.source,
        "model": sidecar.model.model_class,
        "score": sidecar.score,
        "tile_size": sidecar.tile_size,
        "layer_independent": sidecar.layer_independent,
        "fingerprints_unique": sidecar.fingerprints_unique(),
        "layers": [
            {
                "name": card.name,
                "heads": card.heads,
                "head_dim": card.head_dim,
                "fingerprint": card.fingerprint,
            }
            for card in sidecar.model.layers
        ],
        "grids": [_grid_facts(plan) for plan in sidecar.plans],
        "provenance": sidecar.provenance,
    }


def _grid_facts(plan: GridPlan) -> dict[str, Any]:
    shapes = Counter(shape for layer in plan.tile_shapes for shape in layer)
    density = [value for layer in plan.density for value in layer]
    t, h, w = plan.grid
    return {
        "grid": [t, h, w],
        "tokens": t * h * w,
        "shapes": {
            "x".join(map(str, shape)): heads
            for shape, heads in sorted(shapes.items(), key=lambda item: (-item[1], item[0]))
        },
        "density": {
            "mean": sum(density) / len(density),
            "min": min(density),
            "max": max(density),
        },
        "layer_density": [sum(layer) / len(layer) for layer in plan.density],
    }


def _show(facts: dict[str, Any]) -> None:
    console = Console(emoji=False)
    # Every text from the file is escaped: names could hold markup, and JSON escapes control codes.
    table = Table("property", "value", title=escape(facts["file"]), title_justify="left")
    kinds = Counter((layer["heads"], layer["head_dim"]) for layer in facts["layers"])
    first, last = facts["layers"][0]["name"], facts["layers"][-1]["name"]
    table.add_row("model", escape(facts["model"]))
    table.add_row("layers", escape(f"{len(facts['layers'])}: {first} to {last}"))
    for (heads, head_dim), count in kinds.items():
        table.add_row("heads", f"{heads} of {head_dim} in {count} layers")
    table.add_row("score", facts["score"])
    table.add_row("tile size", str(facts["tile_size"]))
    table.add_row("same plan in every layer", _yes(facts["layer_independent"]))
    table.add_row("layers told apart by content", _yes(facts["fingerprints_unique"]))
    for key, value in facts["provenance"].items():
        table.add_row(escape(f"provenance {json.dumps(key)}"), escape(json.dumps(value)))
    console.print(table)

    grids = Table("grid", "tokens", "density: mean (min to max)", "tile shapes: heads")
    for grid in facts["grids"]:
        density = grid["density"]
        grids.add_row(
            "x".join(map(str, grid["grid"])),
            str(grid["tokens"]),
            f"{density['mean']:.3f} ({density['min']:.3f} to {density['max']:.3f})",
            ", ".join(f"{shape}: {heads}" for shape, heads in grid["shapes"].items()),
        )
    console.print(grids)


def _yes(answer: bool) -> str:
    return "yes" if answer else "no"
