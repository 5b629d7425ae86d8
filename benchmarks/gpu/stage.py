"""What a stage of the benchmark is: named jobs that share a setting and a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.results import Results
from veda_compile.kernels.executors import default_name


class SkippedError(RuntimeError):
    """Why a case does not run here. No failure."""


class WrongResultError(RuntimeError):
    """A result is wrong. Nothing of the case is timed."""


@dataclass(frozen=True)
class Setting:
    """How to run. deadline: on `time.monotonic()`. smoke: tiny sizes, to exercise the code."""

    device: str
    smoke: bool
    executor: str
    seed: int
    results: Results
    deadline: float

    @property
    def executor_name(self) -> str:
        """The executor that "auto" stands for here, measurements aside."""
        return default_name(self.executor, self.device)

    @property
    def seconds_left(self) -> float:
        """Until the stage should end."""
        return self.deadline - time.monotonic()

    @property
    def patience(self) -> float:
        """Seconds to spend on the measured runs of one alternative."""
        return 0.01 if self.smoke else 0.5


@dataclass(frozen=True)
class Job:
    """One case. seconds: a guess of how long it takes, not begun with less left."""

    case: str
    run: Callable[[], dict[str, Any]]
    seconds: float = 5.0


@dataclass(frozen=True)
class Stage:
    """One part of the benchmark.

    share: of the time, against the other stages. stall: seconds after which a case hangs.
    """

    name: str
    share: float
    stall: float
    jobs: Callable[[Setting], Iterator[Job]]
