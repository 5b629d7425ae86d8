"""The command `veda cache`."""

from __future__ import annotations

from typing import Annotated

import typer

from .calibration_cache import cache_folder, cached_files
from .cli_common import EXIT_ERROR
from .errors import SidecarError
from .sidecar import Sidecar


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all of them.")] = False,
) -> None:
    """List the calibrations that option sidecar="auto" has kept, or remove them."""
    typer.echo(f"{cache_folder()}:")
    removed = 0
    for path in cached_files():
        typer.echo(f"  {path.name}: {_described(str(path))}")
        if clear:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                typer.echo(f"veda: {path}: cannot be removed: {error.strerror}", err=True)
                raise typer.Exit(EXIT_ERROR) from None
            removed += 1
    if clear:
        typer.echo(f"removed: {removed}")


def _described(path: str) -> str:
    try:
        found = Sidecar.load(path)
    except SidecarError:
        return "damaged, will be replaced when its model runs"
    grids = ", ".join("x".join(map(str, grid)) for grid in found.grids)
    made = f"{found.model.model_class}, {len(found.model.layers)} layers, density"
    return f"{made} {found.provenance.get('density')}, grids {grids}"
