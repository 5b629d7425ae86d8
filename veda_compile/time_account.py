"""Time account: measuring may cost a share of what the model itself has taken so far, no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import torch

SHARE = 0.1
"""Measuring takes at most this share of all dense time so far: so much longer a run can take."""

CALL_SHARE = 0.2
"""And at most this share of a usual call's own time in any one call."""


@dataclass(eq=False)
class TimeAccount:
    """Seconds of dense graph runs, and of what was measured inside them.

    share, call_share: see `SHARE` and `CALL_SHARE`. clock: seconds from any start. dense: of timed
    runs, without what was measured in them. spent: on measuring. calls: of the model that were
    timed. units: measured.
    """

    share: float = field(default_factory=lambda: SHARE)
    call_share: float = field(default_factory=lambda: CALL_SHARE)
    clock: Callable[[], float] = field(default_factory=lambda: perf_counter)
    dense: float = 0.0
    spent: float = 0.0
    calls: int = 0
    units: int = 0
    _device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _since: float | None = None
    _spent_before: float = 0.0
    _dense_at_call: float = 0.0
    _spent_at_call: float = 0.0

    def next_call(self) -> None:
        """A call of the model begins."""
        self.calls += self.dense > self._dense_at_call
        self._dense_at_call, self._spent_at_call = self.dense, self.spent

    @contextmanager
    def run(self, device: torch.device, timed: bool) -> Iterator[None]:
        """One graph runs. timed: False where it compiles or warms up, which tells nothing."""
        self._device = device
        if not timed:
            yield
            return
        self._since, self._spent_before = self._now(), self.spent
        try:
            yield
            self.dense += self._own()
        finally:
            self._since = None

    @contextmanager
    def unit(self) -> Iterator[None]:
        """One unit is measured, inside a run."""
        begun = self._now()
        try:
            yield
        finally:
            self.spent += self._now() - begun
            self.units += 1

    def allows(self) -> bool:
        """Whether one more unit fits in, of the mean length so far."""
        if self._since is None or self.calls == 0:
            return False
        longer = self.spent / max(self.units, 1)
        usual = self._dense_at_call / self.calls
        if self.spent - self._spent_at_call + longer > self.call_share * usual:
            return False
        return self.spent + longer <= self.share * (self.dense + self._own())

    def _own(self) -> float:
        """Of the run in progress, what it took itself so far."""
        assert self._since is not None
        return self._now() - self._since - (self.spent - self._spent_before)

    def _now(self) -> float:
        if self._device.type == "cuda":  # time counts once the work is done
            torch.cuda.synchronize(self._device)
        return self.clock()
