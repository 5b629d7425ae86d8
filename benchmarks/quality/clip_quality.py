"""Whole clips: the model samples with every self-attention replaced by a rule, against dense.

Beside them dense attention in bfloat16: how far clips are apart that differ by rounding alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from veda_compile.metrics import bootstrap_interval, psnr, ssim, temporal_difference_error

from .recordings import GRID, SIZE, sample
from .rule import Rule, Site, attend
from .splits import EVALUATION

STEPS = 20
CLIP_SEED = EVALUATION.first_seed + 100
"""Noise of the first clip; the others follow."""


ROUNDED = "dense, bfloat16"
"""The row of the whole model in bfloat16."""


@dataclass
class ClipRow:
    """One rule at one density: how far each clip is from the dense clip of the same seed."""

    rule: str
    source: str
    density: float
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    temporal: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)

    def add(self, clip: Tensor, exact: Tensor, kept: float) -> None:
        """One clip, (1, 3, T, H, W), beside the dense one."""
        self.kept.append(kept)
        self.psnr.append(float(psnr(clip, exact)))
        self.ssim.append(float(ssim(clip, exact)))
        self.temporal.append(float(temporal_difference_error(clip, exact)))

    def to_dict(self) -> dict[str, object]:
        """Plain data: means with intervals over clips, and the values of each clip."""
        made: dict[str, object] = {
            "rule": self.rule,
            "source": self.source,
            "density": self.density,
            "kept": sum(self.kept) / len(self.kept),
        }
        for name in ("psnr", "ssim", "temporal"):
            values = torch.tensor(getattr(self, name))
            made[name] = float(values.mean())
            made[f"{name}_interval"] = list(bootstrap_interval(values))
            made[f"{name}_by_clip"] = values.tolist()
        return made


class Replaced(TorchFunctionMode):
    """Sends every self-attention call, queries and keys of the grid's length, through a rule."""

    def __init__(self, rule: Rule, density: float, layers: int) -> None:
        super().__init__()
        self._rule, self._density, self._layers = rule, density, layers
        self._calls = 0
        self.kept: list[float] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **given)
        named = dict(zip(("query", "key", "value"), args, strict=False)) | given
        q, k, v = (named[name] for name in ("query", "key", "value"))
        if q.shape[-2] != k.shape[-2]:
            return func(*args, **given)
        layer = self._calls % self._layers
        self._calls += 1
        site = Site(q.contiguous(), k.contiguous(), v.contiguous(), GRID, layer)
        choice = self._rule.choose(site, self._density)
        self.kept.append(float(choice.density.mean()))
        return attend(choice)[0]


@torch.no_grad()
def measure_clips(
    model: Any,
    rules: Sequence[Rule],
    clips: int,
    densities: Sequence[float],
    layers: int,
    done: Callable[[], None],
) -> list[ClipRow]:
    """Sample each clip dense, in bfloat16 and with every rule; `done` after each sampled clip."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    rounded = ClipRow(ROUNDED, "noise of rounding", 1.0)
    rows = [ClipRow(rule.name, rule.source, d) for d in densities for rule in rules]
    by_name = {rule.name: rule for rule in rules}
    for number in range(clips):
        exact = _clip(model, number)
        done()
        rounded.add(_clip(half, number), exact, 1.0)
        done()
        for row in rows:
            rule = by_name[row.rule]
            rule.start()
            with Replaced(rule, row.density, layers) as replaced:
                clip = _clip(model, number)
            row.add(clip, exact, sum(replaced.kept) / len(replaced.kept))
            done()
    return [*rows, rounded]


def _clip(model: Any, number: int) -> Tensor:
    """(1, 3, T, H, W), clamped to [-1, 1] as a screen shows it."""
    label = EVALUATION.classes[number % len(EVALUATION.classes)]
    return sample(model, label, SIZE, STEPS, CLIP_SEED + number).clamp(-1.0, 1.0)
