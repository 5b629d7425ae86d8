"""How far attention under a variant is from dense, on clips that nothing was learned from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.fitting import dense
from benchmarks.quality.rule import Site, attend
from veda_compile.metrics import bootstrap_interval

from .variants import Variant


@dataclass(eq=False)
class Measured:
    """One variant on all clips.

    wrong, length: per clip and layer (H,), squared error and squared length of the dense output.
    kept, retained: of each call, the share of token pairs and of attention mass that was kept.
    """

    variant: Variant
    wrong: list[list[Tensor]] = field(default_factory=list)
    length: list[list[Tensor]] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    retained: list[float] = field(default_factory=list)

    @property
    def by_layer(self) -> Tensor:
        """(clips,) relative squared error of a layer's output, mean over layers."""
        wrong, length = self._sums()
        return (wrong.sum(-1) / length.sum(-1)).mean(-1)

    @property
    def by_head(self) -> Tensor:
        """(clips,) relative squared error of a head's output, mean over heads."""
        wrong, length = self._sums()
        return (wrong / length).mean((1, 2))

    def _sums(self) -> tuple[Tensor, Tensor]:
        wrong, length = (
            torch.stack([torch.stack(layers) for layers in clips]).double()
            for clips in (self.wrong, self.length)
        )
        return wrong, length


@torch.no_grad()
def measure(
    variants: Sequence[Variant], clips: Iterable[Sequence[Site]], done: Callable[[], None]
) -> list[Measured]:
    """Every variant on every site of every clip; `done` after each clip."""
    measured = [Measured(variant) for variant in variants]
    for sites in clips:
        for each in measured:
            each.wrong.append([])
            each.length.append([])
        for site in sites:
            exact = dense(site)
            length = exact.square().sum((0, 2, 3))
            for each in measured:
                choice = each.variant.choose(site)
                out, lse = attend(choice)
                each.wrong[-1].append((out - exact).square().sum((0, 2, 3)))
                each.length[-1].append(length)
                each.kept.append(float(choice.density.mean()))
                # of each query: what its kept keys weigh among all
                each.retained.append(float((lse - site.lse).exp().mean()))
        done()
    return measured


def rows(measured: Sequence[Measured], grid: Sequence[int]) -> list[dict[str, Any]]:
    """Plain data, each variant compared with the one it is against, at its density."""
    known = {(each.variant.name, each.variant.density): each for each in measured}
    made = []
    for each in measured:
        variant = each.variant
        base = known[variant.against, variant.density]
        ratio, interval = ratio_of(each.by_layer, base.by_layer)
        head_ratio, head_interval = ratio_of(each.by_head, base.by_head)
        made.append(
            {
                "variant": variant.name,
                "part": variant.part,
                "against": variant.against,
                "density": variant.density,
                "grid": list(grid),
                "kept": sum(each.kept) / len(each.kept),
                "error": float(each.by_layer.mean()),
                "error_by_clip": each.by_layer.tolist(),
                "ratio": ratio,
                "ratio_interval": list(interval),
                "head_error": float(each.by_head.mean()),
                "head_ratio": head_ratio,
                "head_ratio_interval": list(head_interval),
                "retained_mass": sum(each.retained) / len(each.retained),
                "verdict": "-" if each is base else verdict(interval),
            }
        )
    return made


def ratio_of(errors: Tensor, base: Tensor) -> tuple[float, tuple[float, float]]:
    """The geometric mean over clips of errors / base, both (clips,), and its 95 % interval."""
    logs = (errors / base).log()
    low, high = bootstrap_interval(logs)
    return math.exp(float(logs.mean())), (math.exp(low), math.exp(high))


def verdict(interval: tuple[float, float]) -> str:
    """What the error without a part, over the error with it, says of the part."""
    low, high = interval
    return "helps" if low > 1.0 else "harms" if high < 1.0 else "no difference shown"
