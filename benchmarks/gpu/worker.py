"""Runs the jobs of one stage in a process of its own: `python -m benchmarks.gpu.worker`.

A crash, a hang or a broken CUDA context ends this process, not the benchmark: the next one goes on
with the cases that have no record yet.
"""

from __future__ import annotations

import gc
import logging
import time
import traceback
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.gpu.results import Results
from benchmarks.gpu.stage import Setting, SkippedError, Stage
from benchmarks.gpu.stages import STAGES

CONTEXT_LOST = 3
"""Exit status after a failure that left the GPU unusable for this process."""

_log = logging.getLogger("benchmarks.gpu")


def work(stage: Stage, setting: Setting) -> int:
    """Run the jobs that have no record yet. Returns the exit status."""
    results = setting.results
    for job in stage.jobs(setting):
        if any(record["case"] == job.case for record in results.of(stage.name)):
            continue
        if setting.seconds_left < job.seconds:
            skipped = {"error": "no time left", "requested": setting.executor}
            results.add(stage.name, job.case, "skipped", skipped)
            continue
        results.begin(stage.name, job.case)
        began = time.monotonic()
        try:
            found, status = job.run(), "ok"
        except SkippedError as reason:
            found, status = {"error": str(reason)}, "skipped"
        except Exception as error:  # noqa: BLE001 - one broken case must not lose the others
            found, status = {"error": _one_line(error)}, "failed"
            _log.error("%s: %s\n%s", stage.name, job.case, traceback.format_exc())
        seconds = time.monotonic() - began
        asked = {"requested": setting.executor, "seconds": round(seconds, 1)}
        results.add(stage.name, job.case, status, found | asked)
        _log.info("%s: %s: %s in %.1f s", stage.name, job.case, status, seconds)
        if not _usable(setting.device):  # after a case that went well too: part of it may not have
            return CONTEXT_LOST
    return 0


def _one_line(error: Exception) -> str:
    """What went wrong, in at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _usable(device: str) -> bool:
    """Whether the GPU still answers; frees what the failed case left."""
    gc.collect()
    if device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def main(
    stage: str,
    results: Path,
    device: Annotated[str, typer.Option()],
    executor: Annotated[str, typer.Option()],
    seconds: Annotated[float, typer.Option()],
    seed: Annotated[int, typer.Option()],
    smoke: Annotated[bool, typer.Option()] = False,
) -> None:
    """Run one stage and write its records into the results file."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    _log.setLevel(logging.INFO)
    deadline = time.monotonic() + seconds
    setting = Setting(device, smoke, executor, seed, Results.load(results), deadline)
    raise typer.Exit(work(STAGES[stage], setting))


if __name__ == "__main__":
    typer.run(main)
