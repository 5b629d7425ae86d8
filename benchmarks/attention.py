"""Sparse against dense attention, one call at a time: `python -m benchmarks.attention`.

Every case is first checked against the reference executor on the same selection; nothing is timed
that is wrong. Dense and sparse runs alternate, so that both meet the same state of the machine.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.fields import video_qkv
from veda_compile.kernels.call import AttentionCall, Selection
from veda_compile.kernels.executors import Executor, Traits, choose_executor
from veda_compile.kernels.layout import Layout, Video
from veda_compile.kernels.op import sparse_attention_v2
from veda_compile.kernels.plan import Plan, least_padding_shape
from veda_compile.kernels.reference import ReferenceExecutor
from veda_compile.kernels.selection import kept_map, select_tiles

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Largest accepted |out - reference|, as a share of the largest |reference|."""

LSE_TOLERANCE = 1e-3

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float16)}

DIFFERENT_LISTS = 0.01
"""Accepted share of tile pairs chosen otherwise than by `select_tiles`: near ties round apart."""


class WrongResultError(RuntimeError):
    """An executor's result is not the reference's. No times are reported."""


@dataclass(frozen=True)
class Case:
    """One attention call to time."""

    grid: tuple[int, int, int]
    density: float
    tile_size: int
    dtype: torch.dtype
    heads: int
    head_dim: int

    @property
    def video(self) -> Video:
        """The grid as a segment."""
        return Video(*self.grid)


@dataclass(frozen=True)
class Timing:
    """Median of several runs and their spread (largest minus smallest), in milliseconds."""

    median: float
    spread: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """The timing of runs that took so many seconds each."""
        spread = max(seconds) - min(seconds)
        return cls(round(1e3 * statistics.median(seconds), 3), round(1e3 * spread, 3))

    def __str__(self) -> str:
        return f"{self.median:.1f} ±{self.spread / 2:.1f}"


Row = dict[str, str | int | float | Timing]
"""One line of the table. `Timing`s are in milliseconds; "error" is the largest absolute one."""


def cases(device: str) -> list[Case]:
    """The standard cases: two regular grids and a ragged one."""
    if device == "cpu":
        chosen = [((16, 32, 32), 0.1, 128), ((16, 16, 16), 0.25, 64), ((13, 33, 39), 0.1, 128)]
        heads, head_dim = 4, 64
    else:
        chosen = [((16, 32, 32), 0.1, 128), ((21, 30, 52), 0.1, 128), ((13, 33, 39), 0.1, 128)]
        heads, head_dim = 12, 128
    return [
        Case(*case, dtype, heads, head_dim)
        for case, dtype in itertools.product(chosen, DTYPES[device])
    ]


def prepare(case: Case, device: str, seed: int) -> AttentionCall:
    """The call of a case, with the tile shape that pads least."""
    layout = Layout.of(case.video)
    plan = Plan.uniform(case.heads, least_padding_shape(layout, case.tile_size), case.density)
    q, k, v = video_qkv(case.video, case.heads, case.head_dim, case.dtype, device, seed)
    return AttentionCall(q, k, v, layout, plan, 1.0 / math.sqrt(case.head_dim))


def check(call: AttentionCall, executor: Executor) -> tuple[float, Selection]:
    """(largest absolute error in the first and last head, selection). Raises WrongResultError."""
    selection = executor.select(call)
    expected = select_tiles(call)
    tiles, heads = expected.counts.shape[2], list(range(call.plan.heads))
    if not torch.equal(selection.counts, expected.counts):
        raise WrongResultError("the executor keeps other numbers of tiles than the reference")
    other = kept_map(selection, heads, tiles) & ~kept_map(expected, heads, tiles)
    share = float(other.sum()) / float(expected.counts.sum())
    if share > DIFFERENT_LISTS:
        raise WrongResultError(f"{share:.1%} of the tiles kept are not the reference's")
    out, lse = executor.attend(call, selection)
    ends = sorted({0, call.plan.heads - 1})  # the reference takes seconds for every head
    right, right_lse = ReferenceExecutor().attend(*_some_heads(call, selection, ends))
    error = float((out[:, ends].float() - right.float()).abs().max())
    limit = TOLERANCE[call.q.dtype] * float(right.float().abs().max())
    lse_error = float((lse[:, ends] - right_lse).abs().max())
    if not (error <= limit and lse_error <= 1e-3):  # also refuses NaN
        raise WrongResultError(
            f"out is off by {error:.1e} (limit {limit:.1e}), lse {lse_error:.1e}"
        )
    return error, selection


def _some_heads(
    call: AttentionCall, selection: Selection, heads: list[int]
) -> tuple[AttentionCall, Selection]:
    plan = Plan(
        tuple(call.plan.tile_shapes[head] for head in heads),
        tuple(call.plan.density[head] for head in heads),
        call.plan.score,
    )
    q, k, v = (x[:, heads] for x in (call.q, call.k, call.v))
    part = AttentionCall(q, k, v, call.layout, plan, call.scale)
    return part, Selection(selection.indices[:, heads], selection.counts[:, heads])


def measure(case: Case, executor_name: str, device: str, repeats: int, seed: int) -> Row:
    """Check and time one case. Raises WrongResultError."""
    call = prepare(case, device, seed)
    traits = Traits(device, case.dtype, case.head_dim, case.tile_size)
    executor = choose_executor(executor_name, traits)
    error, selection = check(call, executor)
    now = _clock(device)
    dense, select, attend, sparse = [], [], [], []
    for _ in range(repeats + 1):  # the first is thrown away
        start = now()
        F.scaled_dot_product_attention(call.q, call.k, call.v)
        dense.append(now() - start)
        start = now()
        chosen = executor.select(call)
        middle = now()
        executor.attend(call, chosen)
        end = now()
        select.append(middle - start)
        attend.append(end - middle)
        start = now()
        executor.attend(call, executor.select(call))
        sparse.append(now() - start)
    times = [Timing.of(seconds[1:]) for seconds in (dense, select, attend, sparse)]
    return {
        "dtype": str(case.dtype).removeprefix("torch."),
        "grid": "x".join(map(str, case.grid)),
        "tokens": case.video.length,
        "density": case.density,
        "kept": round(float(selection.counts.float().mean()) / selection.counts.shape[2], 4),
        "tile": "x".join(map(str, call.plan.tile_shapes[0])),
        **dict(zip(("dense", "select", "attend", "sparse"), times, strict=True)),
        "speed-up": round(times[0].median / times[3].median, 2),
        "error": error,
    }


def standard(device: str, executor_name: str, repeats: int, seed: int) -> list[Row]:
    """Every standard case. Raises WrongResultError."""
    return [measure(case, executor_name, device, repeats, seed) for case in cases(device)]


def break_even(device: str, executor_name: str, repeats: int, seed: int) -> list[Row]:
    """Dense over sparse time of whole op calls, by sequence length, at density 0.2.

    Raises WrongResultError.
    """
    grids = [(8, 8, 8), (16, 8, 8), (8, 16, 16), (16, 16, 16), (8, 32, 32), (16, 32, 32)]
    rows: list[Row] = []
    for grid, dtype in itertools.product(grids, DTYPES[device]):
        size = 64 if math.prod(grid) < 8192 else 128
        call = prepare(Case(grid, 0.2, size, dtype, 4, 64), device, seed)
        error, _ = check(call, choose_executor(executor_name, Traits(device, dtype, 64, size)))
        dense, sparse = _times(
            device,
            repeats,
            partial(F.scaled_dot_product_attention, call.q, call.k, call.v),
            partial(_whole_op, call, executor_name),
        )
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "tokens": call.layout.length,
                "dense": dense,
                "sparse": sparse,
                "speed-up": round(dense.median / sparse.median, 2),
                "error": error,
            }
        )
    return rows


def _whole_op(call: AttentionCall, executor: str) -> None:
    """What a rewritten graph runs, reading of the plan included."""
    shapes = torch.tensor(call.plan.tile_shapes, dtype=torch.int32)
    density = torch.tensor(call.plan.density, dtype=torch.float64)
    layout, score = call.layout.encode(), call.plan.score
    sparse_attention_v2(
        call.q, call.k, call.v, None, layout, None, shapes, density, None, score, None, executor
    )


def _times(device: str, repeats: int, *functions: Callable[[], object]) -> list[Timing]:
    """Times of functions that take turns, after one unmeasured turn."""
    now = _clock(device)
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, found in zip(functions, seconds, strict=True):
            start = now()
            function()
            found.append(now() - start)
    return [Timing.of(found[1:]) for found in seconds]


def _clock(device: str) -> Callable[[], float]:
    """Seconds now, once the device has done its work."""

    def now() -> float:
        if device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    return now


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    executor: Annotated[str, typer.Option(help="auto, cpu, triton, reference.")] = "auto",
    repeats: Annotated[int, typer.Option(help="Measured runs of each.")] = 5,
    seed: int = 0,
    break_even_only: Annotated[
        bool, typer.Option("--break-even", help="From which length on is sparse faster?")
    ] = False,
    json_only: Annotated[bool, typer.Option("--json", help="Only the JSON line.")] = False,
) -> None:
    """Time sparse against dense attention. The last line of the output is JSON."""
    run = break_even if break_even_only else standard
    rows = run(device, executor, repeats, seed)
    if not json_only:
        console = Console()
        console.width = max(console.width, 120)  # a pipe has no width of its own
        console.print(_table(rows))
    report = {
        "device": device,
        "threads": torch.get_num_threads(),
        "results": [
            {key: asdict(x) if isinstance(x, Timing) else x for key, x in row.items()}
            for row in rows
        ],
    }
    sys.stdout.write(json.dumps(report) + "\n")


def _table(rows: list[Row]) -> Table:
    table = Table(caption="times in ms: median ± half the spread")
    for name in rows[0]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{x:.1e}" if key == "error" else str(x) for key, x in row.items()))
    return table


if __name__ == "__main__":
    typer.run(main)
