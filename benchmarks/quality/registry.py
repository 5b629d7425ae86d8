"""All rules by name, and what some of them need beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from .cluster_rules import SemanticClusters
from .fitting import fit_alike, fit_windows
from .oracle_rules import ClosedForm, FromSidecar, Oracle, OracleOf
from .rule import Rule, Site
from .scored_rules import MeanPool, Random, SubBlock
from .threshold_rules import Sol, Sparge
from .trained_rule import Trained, train
from .window_rules import SlidingWindow, SpaceOrTime

SEARCHED = 4
"""Calibration clips that windows and similarity thresholds are fitted on; training takes all."""

NEED_CALIBRATION = (SlidingWindow.name, Sparge.name, Trained.name)

NAMES = (
    Random.name,
    MeanPool(cubes=False).name,
    MeanPool(cubes=True).name,
    SlidingWindow.name,
    SpaceOrTime.name,
    SemanticClusters.name,
    SubBlock.name,
    Sol(corrected=False).name,
    Sol(corrected=True).name,
    Sparge.name,
    Trained.name,
    Oracle.name,
    ClosedForm.name,
    OracleOf(ClosedForm()).name,
)
"""In the order of tables; sidecars follow, each with its oracle."""


def build(
    names: Sequence[str],
    sidecars: Sequence[Path],
    calibration: Sequence[Sequence[Site]],
    done: Callable[[], None],
    oracles: bool = True,
) -> list[Rule]:
    """The rules named, then one for each sidecar, and its oracle if `oracles`.

    calibration: the sites of each calibration clip, for rules in `NEED_CALIBRATION`. done: called
    after each site that was worked through.
    """
    every = [site for sites in calibration for site in sites]
    some = [site for sites in calibration[:SEARCHED] for site in sites]
    ours = ClosedForm()
    makers: dict[str, Callable[[], Rule]] = {
        Random.name: Random,
        MeanPool(cubes=False).name: lambda: MeanPool(cubes=False),
        MeanPool(cubes=True).name: lambda: MeanPool(cubes=True),
        SlidingWindow.name: lambda: SlidingWindow(fit_windows(some, done)),
        SpaceOrTime.name: SpaceOrTime,
        SemanticClusters.name: SemanticClusters,
        SubBlock.name: SubBlock,
        Sol(corrected=False).name: lambda: Sol(corrected=False),
        Sol(corrected=True).name: lambda: Sol(corrected=True),
        Sparge.name: lambda: Sparge(fit_alike(some, done)),
        Trained.name: lambda: Trained(train(every, done)),
        Oracle.name: Oracle,
        ours.name: lambda: ours,
        OracleOf(ours).name: lambda: OracleOf(ours),
    }
    rules = [makers[name]() for name in names]
    for path in sidecars:
        theirs = FromSidecar(path.name.removesuffix(".veda.safetensors"), str(path))
        rules += [theirs, OracleOf(theirs)] if oracles else [theirs]
    return rules


def calibration_work(names: Sequence[str], clips: int, layers: int) -> int:
    """How often `build` calls `done`."""
    searched = min(clips, SEARCHED)
    return layers * sum(
        clips if name == Trained.name else searched for name in names if name in NEED_CALIBRATION
    )
