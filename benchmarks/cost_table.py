"""Measures what dense and sparse attention cost on CPU: `python -m benchmarks.cost_table`.

Whole calls of the op and dense calls take turns, at random sizes, densities, heads and dtypes. Two
in three cases fit the costs of `kernels/cost_tables.py`; the others judge them: how far are
predicted gains from measured ones, and is a call that the backend would make sparse ever slower
than dense? `--write` writes the tables. Costs are those of one thread (OMP_NUM_THREADS=1) and of
the processor's time, so that other work on the machine counts little. `--judge` also takes several
threads, by the clock; only an idle machine tells anything then. `--gpu` takes recorded times of
GPUs in place of measuring, and with `--write` writes `kernels/kernel_tables.py` too.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.cost_fit import Timed, fitted, write_tables
from benchmarks.gpu.cost_records import timed_records
from benchmarks.kernel_table import kernel_records, shown, write_table
from veda_compile.functional import sparse_attention
from veda_compile.kernels.cost_model import Forecast, Work, from_table, with_threads, work_of
from veda_compile.kernels.cost_tables import TABLES, CostTable
from veda_compile.kernels.kernel_tables import FASTER
from veda_compile.kernels.layout import Extra, Layout, Video
from veda_compile.kernels.plan import Plan, least_padding_shape
from veda_compile.options import tile_size_for

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GRIDS = (
    (3, 6, 8), (4, 8, 8), (5, 9, 11), (8, 8, 8), (5, 13, 14), (16, 8, 8), (5, 13, 21), (7, 16, 16),
    (8, 16, 16), (9, 15, 22), (16, 16, 16), (13, 17, 19), (8, 24, 32), (8, 32, 32),
)  # fmt: skip
_DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
_HEADS = ((1, 1, 64), (1, 4, 64), (2, 2, 64), (1, 2, 128), (1, 3, 96), (1, 8, 64))
_TEXT = (0, 0, 77, 256)
_MOST_PAIRS = 7e7  # over batch and heads


@dataclass(frozen=True)
class Case:
    """One call: (batch, heads, head_dim), a grid, text after it, and a density."""

    grid: tuple[int, int, int]
    sizes: tuple[int, int, int]
    text: int
    density: float
    tile_size: int

    @property
    def layout(self) -> Layout:
        """The segments."""
        video = Video(*self.grid)
        return Layout.of(video, Extra(self.text)) if self.text else Layout.of(video)

    @property
    def plan(self) -> Plan:
        """One shape for all heads."""
        shape = least_padding_shape(self.layout, self.tile_size)
        return Plan.uniform(self.sizes[1], shape, self.density)

    @property
    def work(self) -> Work:
        """What the cost model counts."""
        return work_of(self.plan, self.layout, self.sizes[0], self.sizes[2])

    def __str__(self) -> str:
        batch, heads, dim = self.sizes
        text = f" + {self.text}" if self.text else ""
        return (
            f"{'x'.join(map(str, self.grid))}{text}, {batch} x {heads} of {dim}, "
            f"tile {self.tile_size}, density {self.density}"
        )


def cases(count: int, seed: int) -> list[Case]:
    """Random cases, no two alike; short calls are as likely as long ones."""
    chance = random.Random(seed)
    found: dict[Case, None] = {}
    while len(found) < count:
        grid = chance.choice(_GRIDS)
        size = tile_size_for(math.prod(grid))
        if chance.random() < 0.25:
            size = 192 - size
        case = Case(
            grid, chance.choice(_HEADS), chance.choice(_TEXT), chance.choice(_DENSITIES), size
        )
        if case.work.pairs <= _MOST_PAIRS:
            found[case] = None
    return list(found)


def measure(case: Case, dtype: torch.dtype, repeats: int, seed: int) -> Timed:
    """Dense and sparse runs in turn, after one of each that does not count."""
    batch, heads, dim = case.sizes
    layout, plan = case.layout, case.plan
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, layout.length, heads, dim, generator=generator).to(dtype).transpose(1, 2)
        for _ in range(3)
    )
    runs: tuple[Callable[[], object], ...] = (
        partial(F.scaled_dot_product_attention, q, k, v),
        partial(sparse_attention, q, k, v, layout=layout, plan=plan),
    )
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    pairs = []
    for _ in range(repeats + 1):
        times = []
        for run in runs:
            began = clock()
            run()
            times.append(1e3 * (clock() - began))
        pairs.append(times)
    del pairs[0]
    dense, sparse = (statistics.median(column) for column in zip(*pairs, strict=True))
    gain = statistics.median(d / s for d, s in pairs)
    return Timed(str(case), case.work, dense, sparse, gain)


def judged(measured: Sequence[Timed], table: CostTable) -> list[tuple[Timed, Forecast]]:
    """Every measurement with what the table foretells of it."""
    return [(found, from_table(table, found.work)) for found in measured]


def main(
    count: Annotated[int, typer.Option(help="Cases of each dtype.")] = 42,
    repeats: Annotated[int, typer.Option(help="Measured runs of each.")] = 3,
    seed: int = 0,
    write: Annotated[bool, typer.Option("--write", help="The tables in kernels/ anew.")] = False,
    raw: Annotated[Path | None, typer.Option(help="File for the measurements.")] = None,
    judge: Annotated[
        bool, typer.Option("--judge", help="Fit nothing: how good are the tables there are?")
    ] = False,
    gpu: Annotated[
        Path | None, typer.Option(help="Fit what `benchmarks.gpu` left in this folder instead.")
    ] = None,
) -> None:
    """Measure, fit, judge. The last line of the output is JSON."""
    console = Console(width=140)
    if judge and write:
        raise typer.BadParameter("--judge fits nothing that --write could write")
    if gpu is not None:
        _from_records(gpu, console, write)
        return
    threads = torch.get_num_threads()
    if threads > 1 and not judge:
        raise typer.BadParameter("costs are those of one thread: set OMP_NUM_THREADS=1")
    about = f"torch {torch.__version__}, threads: {threads}, {count} cases"
    tables: dict[str, CostTable] = {}
    told: dict[str, Any] = {"threads": threads}
    kept: dict[str, list[dict[str, Any]]] = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        measured = []
        for case in track(cases(count, seed), name, console=console):
            measured.append(measure(case, dtype, repeats, seed))
            kept.setdefault(name, []).append(asdict(measured[-1]))
            if raw is not None:
                raw.write_text(json.dumps(kept, indent=1) + "\n")
        if judge:
            pairs = judged(measured, with_threads(TABLES[f"cpu {name}"], threads))
        else:
            learned = [found for place, found in enumerate(measured) if place % 3]
            tables[f"cpu {name}"] = fitted(learned, about)
            pairs = judged(measured[::3], tables[f"cpu {name}"])
        console.print(_table(name, pairs))
        told[name] = summary(pairs)
    if write:
        write_tables(tables)
    sys.stdout.write(json.dumps(told) + "\n")


def _from_records(folder: Path, console: Console, write: bool) -> None:
    tables: dict[str, CostTable] = {}
    told: dict[str, Any] = {}
    for name, measured in timed_records(folder).items():
        learned = [found for place, found in enumerate(measured) if place % 3]
        tables[name] = fitted(learned, f"{len(learned)} calls of benchmarks.gpu")
        pairs = judged(measured[::3], tables[name])
        console.print(_table(name, pairs))
        told[name] = summary(pairs)
    measured = kernel_records(folder)
    faster = measured.table(FASTER)
    console.print(shown(measured, faster))
    told["hopper"] = {" ".join(map(str, kind)): gain for kind, gain in faster.items()}
    if write:
        write_tables(tables)
        write_table(faster)
    sys.stdout.write(json.dumps(told) + "\n")


def summary(pairs: Sequence[tuple[Timed, Forecast]]) -> dict[str, Any]:
    """How far off gains were, at most and in the median, and whether a sparse call lost."""
    off = sorted(max(m.gain / f.gain, f.gain / m.gain) for m, f in pairs)
    chosen = [m.gain for m, f in pairs if f.worth]
    return {
        "cases": len(pairs),
        "off_median": round(statistics.median(off), 3),
        "off_most": round(off[-1], 3),
        "chosen_sparse": len(chosen),
        "least_gain_of_chosen": round(min(chosen), 3) if chosen else None,
        "left_dense_though_faster": sum(m.gain > 1.0 and not f.worth for m, f in pairs),
    }


def _table(name: str, pairs: Sequence[tuple[Timed, Forecast]]) -> Table:
    table = Table(title=f"{name}: calls that the costs were not fitted to")
    for column in ("case", "dense ms", "sparse ms", "gain", "predicted", "chosen"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for found, expected in sorted(pairs, key=lambda pair: pair[0].gain):
        table.add_row(
            found.name,
            f"{found.dense:.2f}",
            f"{found.sparse:.2f}",
            f"{found.gain:.2f}x",
            f"{expected.gain:.2f}x",
            "sparse" if expected.worth else "dense",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
