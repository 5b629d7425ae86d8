"""The stages, most important first."""

from __future__ import annotations

from benchmarks.gpu import (
    attention,
    break_even,
    check,
    comparisons,
    demo,
    details,
    model,
    tune,
)
from benchmarks.gpu.stage import Stage

STAGES = {
    stage.name: stage
    for stage in (
        Stage("check", 1.5, 60.0, check.jobs),
        Stage("attention", 4.0, 150.0, attention.jobs),
        Stage("details", 0.8, 150.0, details.jobs),
        Stage("model", 4.0, 300.0, model.jobs),
        Stage("rivals", 1.2, 200.0, comparisons.jobs),
        Stage("demo", 0.8, 300.0, demo.jobs),
        Stage("break_even", 0.8, 60.0, break_even.jobs),
        Stage("tune", 2.0, 60.0, tune.jobs),
    )
}
"""By name."""

DEFAULT = [name for name in STAGES if name != "tune"]
"""What runs where nothing else is asked for."""
