"""What published rules fit to a model beforehand, on clips that evaluation never sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .rule import Choice, Site, attend
from .threshold_rules import Sparge
from .window_rules import WINDOWS, SlidingWindow, Window

_T = TypeVar("_T")

ALIKE = (-1.0, 0.2, 0.3, 0.4, 0.5, 0.6)
"""Similarity thresholds tried for each head; -1 trusts every tile."""

DENSITY = 0.15
"""At which the error of candidates is compared."""


def dense(site: Site) -> Tensor:
    """(1, H, N, D): exact attention."""
    return F.scaled_dot_product_attention(site.q, site.k, site.v)


def head_errors(out: Tensor, exact: Tensor) -> Tensor:
    """(H,): squared error of each head over its squared length."""
    return (out - exact).square().sum((0, 2, 3)) / exact.square().sum((0, 2, 3))


def fit_windows(sites: Sequence[Site], done: Callable[[], None]) -> dict[int, list[Window]]:
    """The window of each layer and head with the least mean error over the sites."""

    def with_all(window: Window, site: Site) -> Choice:
        return SlidingWindow({site.layer: [window] * site.heads}).choose(site, DENSITY)

    best = _least(sites, WINDOWS, with_all, done)
    return {layer: [WINDOWS[i] for i in chosen] for layer, chosen in best.items()}


def fit_alike(sites: Sequence[Site], done: Callable[[], None]) -> dict[int, Tensor]:
    """The similarity threshold of each layer and head with the least mean error over the sites."""

    def with_all(least: float, site: Site) -> Choice:
        return Sparge({site.layer: torch.full((site.heads,), least)}).choose(site, DENSITY)

    best = _least(sites, ALIKE, with_all, done)
    return {layer: torch.tensor([ALIKE[i] for i in chosen]) for layer, chosen in best.items()}


def _least(
    sites: Sequence[Site],
    candidates: Sequence[_T],
    choose: Callable[[_T, Site], Choice],
    done: Callable[[], None],
) -> dict[int, list[int]]:
    """Per layer and head the number of the best candidate."""
    sums: dict[int, Tensor] = {}
    for site in sites:
        exact = dense(site)
        errors = [head_errors(attend(choose(each, site))[0], exact) for each in candidates]
        sums[site.layer] = sums.get(site.layer, 0.0) + torch.stack(errors)
        done()
    return {layer: total.argmin(0).tolist() for layer, total in sums.items()}
