"""All of the GPU benchmark, stage by stage: `python -m benchmarks.gpu --help`.

Every stage runs in a process of its own with a share of the time. What one loses by a crash or an
overrun is one case; the file of results is whole after every case.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.gpu.bars import bars_table
from benchmarks.gpu.machine import describe
from benchmarks.gpu.results import Results
from benchmarks.gpu.stages import DEFAULT, STAGES
from benchmarks.gpu.table import Grid
from benchmarks.gpu.tables import tables

_ROOT = Path(__file__).resolve().parents[2]
_FOLDER = _ROOT / "benchmarks" / "results"

_STARTS = 5
"""Processes a stage may use up."""

_GRACE = 15.0
"""Seconds beyond its time in which a stage may finish a case."""


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(STAGES)}.")] = None,
    tune: Annotated[bool, typer.Option("--tune", help="The sweep of configurations too.")] = False,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    smoke: Annotated[bool, typer.Option(help="Tiny sizes: does it run at all?")] = False,
    executor: Annotated[str, typer.Option(help="auto, triton, hopper, cpu or reference.")] = "auto",
    minutes: Annotated[float, typer.Option(help="For all stages together.")] = 9.0,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = _FOLDER,
    commit: Annotated[str | None, typer.Option(help="Where there is no .git.")] = None,
    seed: int = 0,
) -> None:
    """Check and time the kernels; the last line of the output is JSON."""
    end = time.monotonic() + 60.0 * minutes
    names = list(only or DEFAULT) + (["tune"] if tune and "tune" not in (only or []) else [])
    unknown = sorted(set(names) - set(STAGES))
    if unknown:
        raise typer.BadParameter(f"no stage is called {unknown[0]}: give {', '.join(STAGES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device: give --device cpu --smoke")
    if device == "cpu" and not smoke:
        raise typer.BadParameter("real sizes take hours on a CPU: give --smoke too")
    about = describe(device, commit)
    results = Results(_path(out, about), about)
    results.save()
    console = Console(width=160)
    for i, name in enumerate(names):
        shares = [STAGES[later].share for later in names[i:]]
        seconds = (end - time.monotonic()) * shares[0] / sum(shares)
        options = ["--device", device, "--seed", str(seed), *["--smoke"] * smoke]
        results = _run(name, results, seconds, executor, options)
        for table in tables(name, list(results.of(name))):
            _print(console, table)
    _print(console, bars_table(results.records))
    sys.stdout.write(json.dumps(_summary(results)) + "\n")
    failed = any(record["status"] == "failed" for record in results.records)
    raise typer.Exit(1 if failed else 0)


def _print(console: Console, table: Grid) -> None:
    shown = Table(*table.columns, title=table.title, caption=table.note or None)
    for row in table.rows:
        shown.add_row(*row)
    console.print(shown)


def _path(folder: Path, about: dict[str, Any]) -> Path:
    """<device>-<date>-<commit>.json in the folder, which is made."""
    name = "-".join(str(about["device"]).lower().replace("/", " ").split())
    when = datetime.now(UTC).strftime("%Y%m%d.%H%M%S")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}-{when}-{about['commit']}.json"


def _run(name: str, results: Results, seconds: float, executor: str, options: list[str]) -> Results:
    """Run a stage to its end, in as many processes as its crashes need. Returns the results."""
    end = time.monotonic() + seconds
    for _ in range(_STARTS):
        left = end - time.monotonic()
        command = [sys.executable, "-m", "benchmarks.gpu.worker", name, str(results.path)]
        worker = subprocess.Popen(
            [*command, "--seconds", f"{max(left, 0.0):.1f}", "--executor", executor, *options],
            cwd=_ROOT,
        )
        why = _watch(worker, results.path, end + _GRACE, STAGES[name].stall)
        status = worker.wait()
        results = Results.load(results.path)
        if results.running is not None:
            why = why or f"the process ended with {status}"
            results.add(*results.running, "failed", {"error": why, "requested": executor})
        if status == 0 or time.monotonic() >= end:
            return results
    why = f"{_STARTS} processes ended early"
    results.add(name, "the rest", "failed", {"error": why, "requested": executor})
    return results


def _watch(worker: subprocess.Popen[bytes], file: Path, end: float, stall: float) -> str | None:
    """Wait for a worker. Returns why it had to be killed, or None where it ended by itself.

    end: on `time.monotonic()`. A worker writes its file as it begins and ends a case.
    """
    while True:
        try:
            worker.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            late = time.monotonic() > end
            if late or time.time() - file.stat().st_mtime > stall:
                worker.kill()
                return "took longer than the stage had" if late else f"hung for {stall:.0f} s"
            continue
        return None


def _summary(results: Results) -> dict[str, Any]:
    """What the JSON line says."""
    speedups = {
        record["case"]: record.get("speedup_layer", record.get("speedup"))
        for record in results.records
        if record["stage"] in ("attention", "model") and record["status"] == "ok"
    }
    return {
        "results": str(results.path),
        "machine": results.machine,
        "stages": {
            name: dict(Counter(record["status"] for record in results.of(name)))
            for name in STAGES
            if any(results.of(name))
        },
        "speedups": {case: value for case, value in speedups.items() if value is not None},
    }


if __name__ == "__main__":
    typer.run(main)
