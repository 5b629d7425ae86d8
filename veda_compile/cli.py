"""The `veda` command: look into sidecars, and tell what would become of a model."""

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
from .cli_cache import cache
from .cli_common import EXIT_ERROR, dtype_of
from .cli_distill import distill
from .errors import OptionsError, StrictError, VedaError
from .kernels.layout import Layout, Video
from .kernels.static_modes import mode_density
from .sidecar import GridPlan, Sidecar

app = typer.Typer(
    help="veda-compile: tile-sparse attention for video diffusion transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

EXIT_DENSE = 1
"""Exit code of `explain` when attention over the video would stay dense or unseen."""

app.command()(distill)
app.command()(cache)


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


@app.command()
def explain(
    target: Annotated[
        str,
        typer.Argument(
            help="A diffusers model folder or config.json, or package.module:callable that "
            "returns (model, inputs). Weights are not read."
        ),
    ],
    frames: Annotated[int, typer.Option(min=1, help="Frames of the video.")] = 81,
    height: Annotated[int, typer.Option(min=1, help="Height of the video in pixels.")] = 480,
    width: Annotated[int, typer.Option(min=1, help="Width of the video in pixels.")] = 832,
    latent: Annotated[
        bool,
        typer.Option("--latent", help="Frames, height and width are the latent's, not pixels."),
    ] = False,
    device: Annotated[str, typer.Option(help="Device the verdicts are for.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    options: Annotated[str, typer.Option(help="The backend's options as a JSON object.")] = "{}",
    dynamic_ops: Annotated[
        bool,
        typer.Option(
            "--dynamic-ops",
            help="As with torch._dynamo.config.capture_dynamic_output_shape_ops and "
            "capture_scalar_outputs set.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON instead of tables.")] = False,
) -> None:
    """Show what would become of a model's attention, and what to change, from shapes alone.

    Exit code 0 if all attention over the video would be sparse, 1 if not, 2 if the input is wrong.
    """
    from .explain import explain as look
    from .explain_subject import Video, load_subject

    try:
        subject = load_subject(target, Video(frames, height, width, latent), dtype_of(dtype))
        found = look(subject, _options(options), device, dynamic_ops)
    except VedaError as error:
        typer.echo(f"veda: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(EXIT_ERROR) from None
    if as_json:
        typer.echo(json.dumps({**found.report.to_dict(), "stopped": found.stopped}, indent=2))
    else:
        Console(emoji=False).print(found.report)
        if found.stopped is not None:
            typer.echo(f"The call was followed up to an error, as it would run: {found.stopped}")
    try:
        found.report.require()
    except StrictError:
        raise typer.Exit(EXIT_DENSE) from None


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise OptionsError(f"--options is {text!r}: not JSON: {error}") from None
    if not isinstance(options, dict):
        raise OptionsError(f"--options is {text!r}: must be a JSON object")
    return options


def summary(sidecar: Sidecar) -> dict[str, Any]:
    """What `veda inspect` shows, as plain JSON data."""
    return {
        "file": sidecar.source,
        "model": sidecar.model.model_class,
        "score": sidecar.score,
        "tile_size": sidecar.tile_size,
        "layer_independent": sidecar.layer_independent,
        "fingerprints_unique": sidecar.fingerprints_unique(),
        "factor_ranks": [None if x is None else x.shape[3] for x in sidecar.factors],
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
    layers = [_layer_density(plan, index) for index in range(len(plan.density))]
    density = [value for layer in layers for value in layer]
    modes = [mode for i, heads in enumerate(plan.density)
             for mode in plan.modes_of(i) or (None,) * len(heads)]  # fmt: skip
    kinds = Counter("scored" if mode is None else mode.kind for mode in modes)
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
        "layer_density": [sum(layer) / len(layer) for layer in layers],
        "modes": dict(kinds.most_common()),
    }


def _layer_density(plan: GridPlan, index: int) -> list[float]:
    """Per head its density, or the share that its static mode keeps."""
    layout, shapes = Layout.of(Video(*plan.grid)), plan.tile_shapes[index]
    modes = plan.modes_of(index) or (None,) * len(shapes)
    return [
        density if mode is None else mode_density(layout, shape, mode)
        for density, shape, mode in zip(plan.density[index], shapes, modes, strict=True)
    ]


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
    if facts["factor_ranks"]:
        ranks = Counter("none" if rank is None else rank for rank in facts["factor_ranks"])
        shown = ", ".join(f"{rank} in {count} layers" for rank, count in ranks.items())
        table.add_row("ranks of factors", shown)
    for key, value in facts["provenance"].items():
        table.add_row(escape(f"provenance {json.dumps(key)}"), escape(json.dumps(value)))
    console.print(table)

    grids = Table(
        "grid", "tokens", "density: mean (min to max)", "tile shapes: heads", "modes: heads"
    )
    for grid in facts["grids"]:
        density = grid["density"]
        grids.add_row(
            "x".join(map(str, grid["grid"])),
            str(grid["tokens"]),
            f"{density['mean']:.3f} ({density['min']:.3f} to {density['max']:.3f})",
            ", ".join(f"{shape}: {heads}" for shape, heads in grid["shapes"].items()),
            ", ".join(f"{kind}: {heads}" for kind, heads in grid["modes"].items()),
        )
    console.print(grids)


def _yes(answer: bool) -> str:
    return "yes" if answer else "no"
