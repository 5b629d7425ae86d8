"""Which models are served, and how rightly: `python -m benchmarks.coverage [--all] [--regional]`.

Every model is compiled with density 1.0, where sparse attention must equal dense, and with 0.3,
where every call must equal the reference executor's. Which calls are sparse, with which grids, and
why the others are not, must be what the zoo says is true. `--all` takes every model, and every
transformer class of the installed diffusers must be known. Exits with status 1 otherwise.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.catalogue import Catalogue, catalogue
from benchmarks.zoo import ENTRIES, FIRST, Entry, Grid
from benchmarks.zoo.measure import Outcome, Setup, measure, shown

GRID: Grid = (5, 6, 10)
"""Tokens; all sides different, so that swapped axes show."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Row:
    """One model."""

    model: str
    batch: int
    dtype: str
    expected: int
    true_grids: list[Grid]
    outcome: Outcome

    @property
    def right(self) -> bool:
        """Whether everything was as the zoo says."""
        return not self.outcome.problems


def setup_of(entry: Entry, batch: int | None, dtype: str, regional: bool, inner: str) -> Setup:
    """How to compile an entry; it may not take every batch, grid or dtype."""
    chosen = batch if batch in entry.batches else entry.batch
    precision = torch.float32 if entry.float32_only else DTYPES[dtype]
    return Setup(entry.fit(GRID), chosen, precision, regional, inner)


def row(entry: Entry, setup: Setup) -> Row:
    """Compile and run one model."""
    layouts = entry.layouts(setup.grid)
    grids = sorted({video.grid for layout in layouts for _, video in layout.videos})
    try:
        outcome = measure(entry, setup)
    except Exception as error:  # noqa: BLE001 - one model that fails must not hide the others
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        outcome = Outcome(0, 0, [], {}, [], float("nan"), [said])
    dtype = str(setup.dtype).removeprefix("torch.")
    return Row(entry.name, setup.batch, dtype, len(layouts), grids, outcome)


def table(rows: Sequence[Row], title: str) -> Table:
    """The rows for people."""
    made = Table(title=title)
    for column in ("model", "expected", "rewritten", "wrong", "true grid", "found grid",
                   "left dense", "evidence", "max error"):  # fmt: skip
        made.add_column(column, overflow="fold")
    for each in rows:
        found = each.outcome
        made.add_row(
            each.model,
            str(each.expected),
            str(found.rewritten),
            str(found.wrong),
            " ".join(map(shown, each.true_grids)),
            " ".join(map(shown, found.grids)),
            ", ".join(f"{count} {reason}" for reason, count in sorted(found.left.items())),
            ", ".join(found.evidence),
            f"{found.error:.1e}",
            style=None if each.right else "red",
        )
    return made


def _problems(console: Console, rows: Sequence[Row]) -> None:
    """What is not as it should be."""
    for each in rows:
        for problem in each.outcome.problems:
            console.print(f"{each.model}: {problem}", style="red", markup=False)


def _classes(console: Console, known: Catalogue) -> None:
    """What was found in diffusers."""
    console.print(
        f"{len(known.covered)} video transformer classes covered, "
        f"{len(known.not_video)} attend over no video"
    )
    if known.not_covered:
        console.print("not covered yet: " + ", ".join(known.not_covered), style="red")


def main(
    everything: Annotated[bool, typer.Option("--all", help="Every model of the zoo.")] = False,
    regional: Annotated[
        bool, typer.Option("--regional", help="Compile block by block, not the whole model.")
    ] = False,
    model: Annotated[list[str] | None, typer.Option(help="Only these models.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    batch: Annotated[
        int | None, typer.Option(help="Batch, where a model takes it; default: its usual one.")
    ] = None,
    inner: Annotated[str, typer.Option(help="eager, aot_eager or inductor.")] = "eager",
    only_json: Annotated[bool, typer.Option("--json", help="No table, no progress bar.")] = False,
) -> None:
    """Measure models; the last line is one JSON object."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"dtype is {dtype!r}: must be one of {', '.join(DTYPES)}")
    names = {entry.name for entry in ENTRIES}
    unknown = [name for name in model or () if name not in names]
    if unknown:
        raise typer.BadParameter(f"no such model: {', '.join(unknown)}; there are {sorted(names)}")
    chosen = [e for e in ENTRIES if e.name in model] if model else ENTRIES if everything else FIRST
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    console = Console(stderr=True, quiet=only_json)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    rows: list[Row] = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(chosen))
        for entry in chosen:
            progress.update(task, description=entry.name)
            rows.append(row(entry, setup_of(entry, batch, dtype, regional, inner)))
            progress.advance(task)
    known = catalogue() if everything else None
    right = all(each.right for each in rows) and not (known and known.not_covered)
    if not only_json:
        out = Console()
        out.width = max(out.width, 140)  # a pipe has no width of its own
        way = "block by block" if regional else "whole models"
        out.print(table(rows, f"Video self-attention made sparse: {way}, {dtype}"))
        _problems(out, rows)
        if known:
            _classes(out, known)
    report = {
        "models": len(rows),
        "expected": sum(each.expected for each in rows),
        "rewritten": sum(each.outcome.rewritten for each in rows),
        "wrong": sum(each.outcome.wrong for each in rows),
        "wrong_models": [each.model for each in rows if not each.right],
        "classes": asdict(known) if known else None,
        "right": right,
    }
    lines = [
        {"model": each.model, "batch": each.batch, "dtype": each.dtype, "expected": each.expected,
         "true_grids": each.true_grids, **asdict(each.outcome), "right": each.right}
        for each in rows
    ]  # fmt: skip
    sys.stdout.write(json.dumps({"rows": lines, **report}) + "\n")
    raise typer.Exit(0 if right else 1)


if __name__ == "__main__":
    typer.run(main)
