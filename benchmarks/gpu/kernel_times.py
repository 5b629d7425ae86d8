"""Where a call's time goes, kernel by kernel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

STEPS = {"attend": "attend", "choose": "selection"}
"""Step by a part of its kernels' names; every other kernel makes statistics and scores. One that
scores and chooses at once counts as selection."""


def kernel_times(function: Callable[[], object], runs: int = 2) -> dict[str, float]:
    """Mean milliseconds per call of every GPU kernel, by name, longest first."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(runs):
            function()
        torch.cuda.synchronize()
    total: dict[str, float] = defaultdict(float)
    for event in profiled.events():
        if event.device_type == DeviceType.CUDA:
            total[event.name] += event.time_range.elapsed_us() / 1e3 / runs
    return {
        name[:80]: round(spent, 4)
        for name, spent in sorted(total.items(), key=lambda item: -item[1])
    }


def steps(kernels: Mapping[str, float]) -> dict[str, float]:
    """The times of the method's steps."""
    found = {"statistics and scores": 0.0, "selection": 0.0, "attend": 0.0}
    for name, spent in kernels.items():
        step = next((step for part, step in STEPS.items() if part in name), None)
        found[step or "statistics and scores"] += spent
    return {step: round(spent, 4) for step, spent in found.items()}
