"""Times of alternatives that take turns, so that all meet the same clocks and temperature."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

_FLUSH_BYTES = 256 * 2**20
"""Several times the cache of any GPU."""

_FLUSHES = 8
"""So much memory traffic that the host is done launching before the measured work begins."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds on the device over several runs. host: until the call returned, median."""

    median: float
    min: float
    p25: float
    p75: float
    runs: int
    host: float

    @classmethod
    def of(cls, device_ms: Sequence[float], host_ms: Sequence[float]) -> Timing:
        """The timing of runs that took so long each."""
        low, middle, high = (
            statistics.quantiles(device_ms, n=4, method="inclusive")
            if len(device_ms) > 1
            else [device_ms[0]] * 3
        )
        numbers = (middle, min(device_ms), low, high)
        rounded = (round(x, 4) for x in numbers)
        return cls(*rounded, len(device_ms), round(statistics.median(host_ms), 4))

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class Stopwatch:
    """CUDA events with the cache flushed before each run; the wall clock on CPU."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        size = _FLUSH_BYTES if self._cuda else 0
        self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def measure(
        self,
        functions: Sequence[Callable[[], object]],
        seconds: float,
        least: int = 5,
        most: int = 50,
    ) -> list[Timing]:
        """One timing per function, after an unmeasured round.

        seconds: to spend on all rounds together, within `least` and `most` rounds.
        """
        self._round(functions)
        found = [self._round(functions)]
        spent = sum(device for device, _ in found[0]) / 1e3
        rounds = min(max(int(seconds / max(spent, 1e-6)), least), most)
        found += [self._round(functions) for _ in range(rounds - 1)]
        return [
            Timing.of([run[i][0] for run in found], [run[i][1] for run in found])
            for i in range(len(functions))
        ]

    def _round(self, functions: Sequence[Callable[[], object]]) -> list[tuple[float, float]]:
        """(device, host) milliseconds of one run of each."""
        return [self._cuda_run(f) if self._cuda else self._cpu_run(f) for f in functions]

    def _cuda_run(self, function: Callable[[], object]) -> tuple[float, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(_FLUSHES):
            self._flush.zero_()
        start.record()
        began = time.perf_counter()
        function()
        host = time.perf_counter() - began
        end.record()
        end.synchronize()
        return start.elapsed_time(end), 1e3 * host

    @staticmethod
    def _cpu_run(function: Callable[[], object]) -> tuple[float, float]:
        began = time.perf_counter()
        function()
        spent = 1e3 * (time.perf_counter() - began)
        return spent, spent
