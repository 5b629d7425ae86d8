"""Which models are served, and how rightly: `python -m benchmarks.coverage [--json]`.

Every model of the zoo is compiled with density 1.0, where sparse attention must equal dense, once
per token grid. Exits with status 1 if a call was missed, or rewritten though it should not be, or
with a wrong grid or result.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import veda_compile
from benchmarks.zoo import ENTRIES, Entry, Grid, call

GRID: Grid = (5, 6, 10)
"""Tokens; all sides different, so that swapped axes show."""

TOLERANCE = 2e-5
"""Largest accepted |sparse at density 1.0 - dense|, float32."""


@dataclass(frozen=True)
class Row:
    """One model. wrong: calls missed, plus calls rewritten that should have stayed dense."""

    model: str
    expected: int
    rewritten: int
    wrong: int
    true_grid: Grid
    found_grids: list[Grid]
    left: dict[str, int]
    evidence: list[str]
    error: float
    right: bool


def measure(entry: Entry, grid: Grid) -> Row:
    """Compile and run one model."""
    model, inputs = entry.make(grid)
    torch._dynamo.reset()
    veda_compile.reset_report()
    options = {"density": 1.0, "min_tokens": 0, "inner": "eager"}
    compiled = torch.compile(model, backend="veda", options=options)
    with torch.no_grad():
        error = float((call(compiled, inputs) - call(model, inputs)).abs().max())
    sites = veda_compile.report().sites
    done = [site for site in sites if site.rewritten]
    rightly = sum(site.grid == grid for site in done)
    missed = max(entry.sites - rightly, 0)
    extra = len(done) - min(rightly, entry.sites)
    unseen = abs(entry.sites + entry.others - len(sites))
    return Row(
        model=entry.name,
        expected=entry.sites,
        rewritten=len(done),
        wrong=missed + extra,
        true_grid=grid,
        found_grids=sorted({site.grid for site in done if site.grid is not None}),
        left=dict(Counter(str(site.reason) for site in sites if not site.rewritten)),
        evidence=sorted({str(site.evidence) for site in done}),
        error=error,
        right=missed + extra + unseen == 0 and error <= TOLERANCE,
    )


def table(rows: list[Row]) -> Table:
    """The rows for people."""
    shown = Table(title="Video self-attention found and rewritten, at density 1.0")
    for column in ("model", "expected", "rewritten", "wrong", "true grid", "found grid",
                   "left dense", "evidence", "max |error|"):  # fmt: skip
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(
            row.model,
            str(row.expected),
            str(row.rewritten),
            str(row.wrong),
            _sides(row.true_grid),
            " ".join(_sides(grid) for grid in row.found_grids),
            ", ".join(f"{count} {reason}" for reason, count in sorted(row.left.items())),
            ", ".join(row.evidence),
            f"{row.error:.1e}",
            style=None if row.right else "red",
        )
    return shown


def _sides(grid: Grid) -> str:
    return "x".join(map(str, grid))


def main(
    only_json: Annotated[bool, typer.Option("--json", help="No table.")] = False,
    model: Annotated[list[str] | None, typer.Option(help="Only these models.")] = None,
) -> None:
    """Measure all models; the last line is one JSON object."""
    rows = [measure(entry, GRID) for entry in ENTRIES if not model or entry.name in model]
    right = bool(rows) and all(row.right for row in rows)
    if not only_json:
        console = Console()
        console.width = max(console.width, 120)  # a pipe has no width of its own
        console.print(table(rows))
    totals = {
        "models": len(rows),
        "expected": sum(row.expected for row in rows),
        "rewritten": sum(row.rewritten for row in rows),
        "wrong": sum(row.wrong for row in rows),
        "right": right,
    }
    sys.stdout.write(json.dumps({"rows": [asdict(row) for row in rows], **totals}) + "\n")
    raise typer.Exit(0 if right else 1)


if __name__ == "__main__":
    typer.run(main)
