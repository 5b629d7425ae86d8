"""What distillation targets cost beside dense attention: `python -m benchmarks.targets`.

Targets of a sample of the query tiles, and the log-sum-exp of all rows, against one dense
`F.scaled_dot_product_attention` of all rows. All take turns, so that they meet the same state of
the machine. What comes out is first checked against float64; nothing is timed that is wrong.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.attention import DTYPES, Case, Timing, WrongResultError, prepare
from veda_compile.kernels.call import AttentionCall
from veda_compile.kernels.targets import TileTargets, row_lse, tile_targets
from veda_compile.kernels.tiles import tile_table

GRIDS = ((16, 32, 32), (13, 33, 39))
"""16,384 tokens, and a ragged grid of 16,731."""

BAR = 1.5
"""Most that the targets of a quarter of the query tiles may cost, in dense attentions."""

TOLERANCE = 1e-4
"""Largest accepted relative error of a tile pair's mass and maximum."""

Targets = Callable[[AttentionCall, torch.Tensor], TileTargets]
Row = dict[str, Any]


def implementation(device: str) -> Targets:
    """What computes targets on a device type."""
    if device == "cpu":
        return tile_targets
    from veda_compile.kernels.triton import targets

    return targets.tile_targets


def sampled(tiles: int, share: float, seed: int) -> torch.Tensor:
    """(m,) int64 on CPU: a random share of the query tiles, each at most once."""
    order = torch.randperm(tiles, generator=torch.Generator().manual_seed(seed))
    return order[: max(round(share * tiles), 1)]


def check(call: AttentionCall, found: TileTargets, sample: torch.Tensor) -> float:
    """Largest relative error over the first and last sampled tile of the first and last head.

    Raises WrongResultError.
    """
    table = tile_table(call.layout, call.plan.tile_shapes[0], call.q.device)
    worst = 0.0
    for head, place in itertools.product((0, call.plan.heads - 1), (0, len(sample) - 1)):
        rows = table.query_rows[int(sample[place])]
        logits = call.q[0, head, rows[rows >= 0].long()].double() @ call.k[0, head].double().T
        chances = torch.softmax(logits * call.scale, -1)
        keys = table.rows.long()
        by_tile = chances[:, keys.clamp(min=0)].masked_fill(keys < 0, 0.0)  # (rows, n, S)
        mass, highest = by_tile.sum(-1).mean(0), by_tile.amax((0, 2))
        for value, right in ((found.mass, mass), (found.highest, highest)):
            error = (value[0, head, place].double() - right).abs() / right
            worst = max(worst, float(error.max()))
            if not bool((error <= TOLERANCE).all()):  # also refuses NaN
                raise WrongResultError(f"targets are off by {worst:.1e} (limit {TOLERANCE:.0e})")
    return worst


def measure(case: Case, share: float, device: str, repeats: int, seed: int) -> Row:
    """Check and time one case. Raises WrongResultError."""
    call = prepare(case, device, seed)
    targets = implementation(device)
    tiles = tile_table(call.layout, call.plan.tile_shapes[0], call.q.device).tiles
    sample = sampled(tiles, share, seed)
    error = check(call, targets(call, sample), sample)
    seconds = turns(
        device,
        repeats,
        partial(F.scaled_dot_product_attention, call.q, call.k, call.v),
        partial(targets, call, sample),
        partial(row_lse, call),
    )
    dense, some, lse = seconds
    ratios = [other / one for one, other in zip(dense, some, strict=True)]
    return {
        "dtype": str(case.dtype).removeprefix("torch."),
        "grid": "x".join(map(str, case.grid)),
        "tokens": case.video.length,
        "tile": "x".join(map(str, call.plan.tile_shapes[0])),
        "sampled": f"{len(sample)} of {tiles}",
        "dense": Timing.of(dense),
        "targets": Timing.of(some),
        "row LSE": Timing.of(lse),
        "ratio": round(statistics.median(ratios), 3),
        "worst": round(max(ratios), 3),
        "error": error,
    }


def turns(device: str, repeats: int, *functions: Callable[[], object]) -> list[list[float]]:
    """Seconds of functions that take turns, after one unmeasured turn."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, found in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            function()
            if device != "cpu":
                torch.accelerator.synchronize()
            found.append(time.perf_counter() - start)
    return [found[1:] for found in seconds]


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    share: Annotated[float, typer.Option(help="Share of the query tiles to sample.")] = 0.25,
    heads: int = 4,
    head_dim: int = 64,
    tile_size: int = 128,
    repeats: Annotated[int, typer.Option(help="Measured runs of each.")] = 5,
    seed: int = 0,
    json_only: Annotated[bool, typer.Option("--json", help="Only the JSON line.")] = False,
) -> None:
    """Time targets against dense attention. The last line of the output is JSON."""
    rows = [
        measure(Case(grid, 1.0, tile_size, dtype, heads, head_dim), share, device, repeats, seed)
        for grid, dtype in itertools.product(GRIDS, DTYPES[device])
    ]
    if not json_only:
        console = Console()
        console.width = max(console.width, 150)  # a pipe has no width of its own
        console.print(_table(rows))
    report = {
        "device": device,
        "threads": torch.get_num_threads(),
        "heads": heads,
        "head_dim": head_dim,
        "share": share,
        "bar": BAR,
        "within_bar": all(row["ratio"] <= BAR for row in rows),
        "results": [
            {key: asdict(x) if isinstance(x, Timing) else x for key, x in row.items()}
            for row in rows
        ],
    }
    sys.stdout.write(json.dumps(report) + "\n")


def _table(rows: list[Row]) -> Table:
    table = Table(
        caption="times in ms: median ± half the spread; ratio: targets / dense, median and worst"
    )
    for name in rows[0]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{x:.1e}" if key == "error" else str(x) for key, x in row.items()))
    return table


if __name__ == "__main__":
    typer.run(main)
