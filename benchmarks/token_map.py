"""Token maps against the numbers: `python -m benchmarks.token_map [--model NAME] [--elements N]`.

Every model of the zoo at every batch it takes: a NaN in one random element of an input that holds
tokens must show in exactly those rows of q, k and v that the analysis names, in every call of
self-attention. Exits with status 1 if a row is wrong, or a model's own attention was not seen.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.zoo import ENTRIES, Entry, Grid
from benchmarks.zoo.claims import Probed
from benchmarks.zoo.token_check import probe

GRID: Grid = (5, 6, 10)
"""Tokens; all sides different, so that swapped axes show."""

UNSEEN: dict[str, str] = {
    "sana video": "its attention over the video is linear: no model to be covered, as none of it "
    "is ever rewritten",
}
"""Models without a call of self-attention over tokens of their inputs, and why."""


@dataclass(frozen=True)
class Row:
    """One model at one batch."""

    entry: Entry
    batch: int
    probed: Probed

    @property
    def right(self) -> bool:
        """Whether every row was as named, and attention was seen where there is some to see."""
        seen = self.probed.hits > 0 and self.probed.calls >= self.entry.sites
        return not self.probed.faults and (seen or self.entry.name in UNSEEN)


def row(entry: Entry, batch: int, elements: int, seed: int) -> Row:
    """Probe one model."""
    try:
        probed = probe(entry, GRID, batch, elements, seed)
    except Exception as error:  # noqa: BLE001 - one model that fails must not hide the others
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        probed = Probed(faults=[said])
    return Row(entry, batch, probed)


def table(rows: Sequence[Row]) -> Table:
    """The rows for people."""
    made = Table(title="One NaN in an input, and the rows of q, k and v it reaches")
    for column in ("model", "batch", "calls", "inputs", "NaNs", "rows", "named", "wrong", "note"):
        made.add_column(column, overflow="fold")
    for each in rows:
        found = each.probed
        made.add_row(
            each.entry.name,
            str(each.batch),
            str(found.calls),
            str(len(found.sources)),
            str(found.elements),
            str(found.rows),
            str(found.hits),
            str(len(found.faults)),
            "" if found.hits else UNSEEN.get(each.entry.name, "nothing seen"),
            style=None if each.right else "red",
        )
    return made


def main(
    model: Annotated[list[str] | None, typer.Option(help="Only these models.")] = None,
    elements: Annotated[int, typer.Option(min=1, help="Random elements of each input.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the random elements.")] = 0,
    only_json: Annotated[bool, typer.Option("--json", help="No table, no progress bar.")] = False,
) -> None:
    """Probe models; the last line is one JSON object."""
    names = {entry.name for entry in ENTRIES}
    unknown = [name for name in model or () if name not in names]
    if unknown:
        raise typer.BadParameter(f"no such model: {', '.join(unknown)}; there are {sorted(names)}")
    chosen = [(e, batch) for e in ENTRIES if not model or e.name in model for batch in e.batches]
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    console = Console(stderr=True, quiet=only_json)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    rows: list[Row] = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(chosen))
        for entry, batch in chosen:
            progress.update(task, description=f"{entry.name}, batch {batch}")
            rows.append(row(entry, batch, elements, seed))
            progress.advance(task)
    right = all(each.right for each in rows)
    if not only_json:
        out = Console()
        out.width = max(out.width, 140)  # a pipe has no width of its own
        out.print(table(rows))
        for each in rows:
            for fault in each.probed.faults:
                out.print(f"{each.entry.name}: {fault}", style="red", markup=False)
    sys.stdout.write(json.dumps(report(rows) | {"right": right}) + "\n")
    raise typer.Exit(0 if right else 1)


def report(rows: Sequence[Row]) -> dict[str, object]:
    """The rows for machines."""
    seen = [each for each in rows if each.probed.hits]
    return {
        "rows": [
            {"model": each.entry.name, "class": each.entry.model, "batch": each.batch,
             "calls": each.probed.calls, "inputs": sorted(each.probed.sources),
             "elements": each.probed.elements, "rows": each.probed.rows,
             "named": each.probed.hits, "faults": each.probed.faults, "right": each.right}
            for each in rows
        ],
        "models": len({each.entry.name for each in seen}),
        "classes": len({each.entry.model for each in seen if each.entry.model}),
        "elements": sum(each.probed.elements for each in rows),
        "compared": sum(each.probed.rows for each in rows),
        "wrong": sum(len(each.probed.faults) for each in rows),
        "unseen": {each.entry.name: UNSEEN.get(each.entry.name) for each in rows
                   if not each.probed.hits},
    }  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
