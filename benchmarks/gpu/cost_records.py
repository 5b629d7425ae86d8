"""Recorded times of GPUs for the cost model: what `benchmarks.cost_table --gpu` fits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.cost_fit import Timed
from benchmarks.gpu.results import Record, Results
from benchmarks.gpu.sizes import Size
from veda_compile.kernels.cost_model import work_of
from veda_compile.kernels.plan import Plan

LEAST = 12
"""Fewer calls than this are no ground for a table."""


def timed_records(folder: Path) -> dict[str, list[Timed]]:
    """Whole layers and the best dense attention beside them, by the cost table they are for.

    Each side takes the longer of its device's and its host's time, as where nothing runs ahead.
    """
    found: dict[str, list[Timed]] = {}
    for path in sorted(folder.glob("*.json")):
        for record in Results.load(path).records:
            about = record["machine"]
            if record["status"] != "ok" or about["device_type"] != "cuda":
                continue
            for timed in _timed(record):
                generation = str(about["capability"]).partition(".")[0]
                found.setdefault(f"cuda {generation} {record['dtype']}", []).append(timed)
    return {name: calls for name, calls in found.items() if len(calls) >= LEAST}


def _timed(record: Record) -> Iterator[Timed]:
    if record["stage"] == "break_even":
        times = record["times"]
        dense, sparse = times[record["best"]], times["sparse"]
    elif "layer" in record and record["shapes"] == 1 and record["requested"] == "auto":
        dense, sparse = record["dense_layer"], record["layer"]
    else:
        return
    heads, dim = record["heads"], record["head_dim"]
    grid, shape = tuple(record["grid"]), tuple(record["tile"])
    size = Size(record["case"], grid, heads, record["batch"], record["text"], dim)
    work = work_of(Plan.uniform(heads, shape, record["density"]), size.layout, record["batch"], dim)
    slow, fast = (max(times["median"], times["host"]) for times in (dense, sparse))
    yield Timed(record["case"], work, slow, fast, slow / fast)
