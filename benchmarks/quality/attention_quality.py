"""Attention alone: the error of each rule on recorded calls, and how long a call takes."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch

from veda_compile.kernels.selection import kept_map
from veda_compile.metrics import bootstrap_interval
from veda_compile.tile_metrics import tile_recall

from .fitting import dense, head_errors
from .rule import Choice, Rule, Site, attend

_T = TypeVar("_T")


@dataclass
class AttentionRow:
    """One rule at one density, over all recorded calls.

    errors: per clip (layers, H), relative squared error. kept: real density of each call.
    retained: share of the attention mass kept, of each call. recall: Tile Recall of each call and
    head, empty where tiles are not tiles of the video. seconds: per call, the choice of tiles
    included; dense_seconds: of exact attention, in turn with it.
    """

    rule: str
    source: str
    density: float
    errors: list[list[list[float]]] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    retained: list[float] = field(default_factory=list)
    recall: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    dense_seconds: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """Plain data: means with intervals over clips, and the errors they are made of."""
        errors = torch.tensor(self.errors)
        by_clip = errors.mean((1, 2))
        return {
            "rule": self.rule,
            "source": self.source,
            "density": self.density,
            "kept": statistics.fmean(self.kept),
            "error": float(by_clip.mean()),
            "error_interval": list(bootstrap_interval(by_clip)),
            "error_by_clip": by_clip.tolist(),
            "error_by_head": errors.mean(0).tolist(),
            "retained_mass": statistics.fmean(self.retained),
            "tile_recall": statistics.fmean(self.recall) if self.recall else None,
            "ms": 1e3 * statistics.median(self.seconds),
            "dense_ms": 1e3 * statistics.median(self.dense_seconds),
        }


@torch.no_grad()
def measure_attention(
    rules: Sequence[Rule],
    clips: Sequence[Sequence[Site]],
    densities: Sequence[float],
    done: Callable[[], None],
) -> list[AttentionRow]:
    """Every rule at every density on the sites of every clip; `done` after each rule and site."""
    rows = {
        (rule.name, density): AttentionRow(rule.name, rule.source, density)
        for rule in rules
        for density in densities
    }
    for sites in clips:
        errors: dict[tuple[str, float], list[list[float]]] = defaultdict(list)
        for site in sites:
            exact = dense(site)
            for rule in rules:
                rule.start()
                # what a rule carries from step to step is there before it is timed
                rule.choose(site, densities[0])
                dense_seconds = _timed(partial(dense, site))[1]
                for density in densities:
                    row = rows[rule.name, density]
                    row.dense_seconds.append(dense_seconds)
                    choice, first = _timed(partial(rule.choose, site, density))
                    (out, lse), second = _timed(partial(attend, choice))
                    row.seconds.append(first + second)
                    row.kept.append(float(choice.density.mean()))
                    errors[rule.name, density].append(head_errors(out, exact).tolist())
                    # of each query: what its kept keys weigh among all
                    row.retained.append(float((lse - site.lse).exp().mean()))
                    row.recall += _recall(site, choice)
                done()
        for key, by_layer in errors.items():
            rows[key].errors.append(by_layer)
    return list(rows.values())


def _timed(call: Callable[[], _T]) -> tuple[_T, float]:
    began = time.perf_counter()
    result = call()
    return result, time.perf_counter() - began


def _recall(site: Site, choice: Choice) -> list[float]:
    """Tile Recall by head; none where tiles are not tiles of the video."""
    if not choice.ordered:
        return []
    found: list[float] = []
    for shape, heads in choice.call.plan.groups().items():
        mass = site.mass(shape, heads)
        found += tile_recall(mass, kept_map(choice.selection, heads, mass.shape[-1]))[0].tolist()
    return found
