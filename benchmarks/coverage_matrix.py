"""Coverage in every way of compiling: `python -m benchmarks.coverage_matrix [--model NAME]`.

Whole models and block by block, in float32 and in bfloat16, at batch 1 and 2: one row each, over
all models that take that batch and dtype. What is measured and what counts as right is said in
`benchmarks.coverage`, whose `--all` shows the models of one cell. Exits with status 1 if any cell
has a model that is not right.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.coverage import DTYPES, Row, row, setup_of
from benchmarks.zoo import ENTRIES, Entry

BATCHES = (1, 2)


@dataclass(frozen=True)
class Cell:
    """One way of compiling."""

    regional: bool
    dtype: str
    batch: int

    @property
    def words(self) -> str:
        """For people."""
        return f"{'block by block' if self.regional else 'whole'}, {self.dtype}, batch {self.batch}"

    def takes(self, entry: Entry) -> bool:
        """Whether a model can be compiled this way."""
        return self.batch in entry.batches and not (entry.float32_only and self.dtype != "float32")


CELLS = [
    Cell(regional, dtype, batch)
    for regional, dtype, batch in itertools.product((False, True), DTYPES, BATCHES)
]


@dataclass(frozen=True)
class Summary:
    """One cell.

    expected, rewritten: video self-attention calls, and those that became sparse. wrong: sparse
    calls that should not be or have another layout than the true one. right: models of which all is
    as the zoo says. error: the largest difference to dense at density 1.0, as a share of the
    largest value, over the models that attend over a video; None where no model gave one. worst:
    the model whose it is.
    """

    models: int
    right: int
    expected: int
    rewritten: int
    wrong: int
    error: float | None
    worst: str | None
    wrong_models: list[str]


def summary(rows: Sequence[Row]) -> Summary:
    """What the models of a cell add up to."""
    known = [each for each in rows if each.expected and math.isfinite(each.outcome.error)]
    worst = max(known, key=lambda each: each.outcome.error, default=None)
    return Summary(
        models=len(rows),
        right=sum(each.right for each in rows),
        expected=sum(each.expected for each in rows),
        rewritten=sum(each.outcome.rewritten for each in rows),
        wrong=sum(each.outcome.wrong for each in rows),
        error=worst.outcome.error if worst else None,
        worst=worst.model if worst else None,
        wrong_models=[each.model for each in rows if not each.right],
    )


def table(cells: Sequence[tuple[Cell, Summary]]) -> Table:
    """The cells for people."""
    made = Table(title="Video self-attention made sparse, in every way of compiling")
    for column in ("compiled", "rewritten", "wrong", "models right", "max error", "of"):
        made.add_column(column, overflow="fold")
    for cell, found in cells:
        made.add_row(
            cell.words,
            f"{found.rewritten} of {found.expected}",
            str(found.wrong),
            f"{found.right} of {found.models}",
            "" if found.error is None else f"{found.error:.1e}",
            found.worst or "",
            style=None if found.right == found.models else "red",
        )
    return made


def main(
    model: Annotated[list[str] | None, typer.Option(help="Only these models.")] = None,
    inner: Annotated[str, typer.Option(help="eager, aot_eager or inductor.")] = "eager",
    only_json: Annotated[bool, typer.Option("--json", help="No table, no progress bar.")] = False,
) -> None:
    """Measure all cells; the last line is one JSON object."""
    names = {entry.name for entry in ENTRIES}
    unknown = [name for name in model or () if name not in names]
    if unknown:
        raise typer.BadParameter(f"no such model: {', '.join(unknown)}; there are {sorted(names)}")
    entries = [entry for entry in ENTRIES if not model or entry.name in model]
    work = [(cell, [entry for entry in entries if cell.takes(entry)]) for cell in CELLS]
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    console = Console(stderr=True, quiet=only_json)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    done: list[tuple[Cell, Summary]] = []
    problems: list[str] = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(len(chosen) for _, chosen in work))
        for cell, chosen in work:
            rows = []
            for entry in chosen:
                progress.update(task, description=f"{cell.words}: {entry.name}")
                setup = setup_of(entry, cell.batch, cell.dtype, cell.regional, inner)
                rows.append(row(entry, setup))
                progress.advance(task)
            done.append((cell, summary(rows)))
            problems += [
                f"{cell.words}: {each.model}: {problem}"
                for each in rows
                for problem in each.outcome.problems
            ]
    right = all(found.right == found.models for _, found in done)
    if not only_json:
        out = Console()
        out.width = max(out.width, 140)  # a pipe has no width of its own
        out.print(table(done))
        for problem in problems:
            out.print(problem, style="red", markup=False)
    cells = [{**asdict(cell), **asdict(found)} for cell, found in done]
    sys.stdout.write(json.dumps({"cells": cells, "problems": problems, "right": right}) + "\n")
    raise typer.Exit(0 if right else 1)


if __name__ == "__main__":
    typer.run(main)
