"""How much memory something takes while it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch


def peak_memory(function: Callable[[], object], folder: Path) -> int:
    """Largest number of bytes that torch had allocated on CPU at a time while `function` ran.

    What was allocated before does not count. folder: for the profiler's trace.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    trace = folder / "trace.json"
    profile.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    memory = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    assert memory
    most = held = 0
    for _, size in memory:
        held += size
        most = max(most, held)
    return most
