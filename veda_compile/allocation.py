"""Spending a budget: which option each head takes so that the total error is least.

Every head has options, each with a cost (share of key tiles kept) and a measured error. The mean
cost over all heads is given. Lagrangian allocation: at a price lambda per unit of cost each head
takes the option with the least error + lambda * cost; only options on the lower convex hull of a
head's points are ever taken, and going down the price means taking hull steps in the order of
their gain. (Static per-head budgets: docs/method.md, section 6.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_TINY = 1e-12


@dataclass(frozen=True)
class Choice:
    """What one head takes: its option `index`, or on the way to option `toward`.

    share: how far on the way, in [0, 1); 0 where `toward` is `index`.
    """

    index: int
    toward: int
    share: float


def allocate(
    costs: Sequence[Sequence[float]],
    errors: Sequence[Sequence[float]],
    mean_cost: float,
    blends: Sequence[Sequence[int]] | None = None,
) -> list[Choice]:
    """The options of all heads whose mean cost is at most `mean_cost`.

    costs, errors: per head, per option; costs in [0, 1]. blends: per head, per option a group
    number: between two options of one group any cost can be had at the interpolated error (a
    density between two measured ones), and the last step is taken in part; None blends nothing.
    Where even the cheapest options cost more than the budget these are taken: the caller must
    check. Deterministic.
    """
    hulls = [lower_hull(c, e) for c, e in zip(costs, errors, strict=True)]
    places = [0] * len(hulls)
    left = mean_cost * len(hulls) - sum(costs[head][hull[0]] for head, hull in enumerate(hulls))
    steps = []
    for head, hull in enumerate(hulls):
        for place in range(len(hull) - 1):
            here, after = hull[place], hull[place + 1]
            price = costs[head][after] - costs[head][here]
            gain = errors[head][here] - errors[head][after]
            steps.append((-gain / max(price, _TINY), head, place, price))
    steps.sort()
    stopped: set[int] = set()
    partly: dict[int, float] = {}
    for _, head, place, price in steps:
        if head in stopped:
            continue
        if price <= left + _TINY:
            places[head] = place + 1
            left -= price
            continue
        # too dear for what is left: take a part of it if it can be had, else leave it to cheaper
        stopped.add(head)
        hull = hulls[head]
        if blends is not None and blends[head][hull[place]] == blends[head][hull[place + 1]]:
            share = max(left, 0.0) / price
            if share > 0.0:
                partly[head] = share
                left = 0.0
    chosen = []
    for head, (hull, place) in enumerate(zip(hulls, places, strict=True)):
        share = partly.get(head, 0.0)
        chosen.append(Choice(hull[place], hull[place + (share > 0.0)], share))
    return chosen


def lower_hull(costs: Sequence[float], errors: Sequence[float]) -> list[int]:
    """Options on the lower convex hull by rising cost and falling error, from the cheapest on."""
    order = sorted(range(len(costs)), key=lambda i: (costs[i], errors[i], i))
    hull: list[int] = []
    for option in order:
        if hull and errors[option] >= errors[hull[-1]] - _TINY:
            continue
        if hull and costs[option] <= costs[hull[-1]] + _TINY:
            hull[-1] = option
            continue
        while len(hull) > 1 and _above(costs, errors, hull[-2], hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _above(costs: Sequence[float], errors: Sequence[float], a: int, b: int, c: int) -> bool:
    """Whether b lies on or above the line from a to c."""
    slope_b = (errors[b] - errors[a]) * (costs[c] - costs[a])
    slope_c = (errors[c] - errors[a]) * (costs[b] - costs[a])
    return slope_b >= slope_c
