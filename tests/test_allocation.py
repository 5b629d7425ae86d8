"""Budgets: never over the mean, and the least error that the options allow."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veda_compile.allocation import allocate, lower_hull

OPTION = st.tuples(st.floats(0.01, 1.0), st.floats(0.0, 1.0))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(OPTION, min_size=1, max_size=6), min_size=1, max_size=5),
       st.floats(0.01, 1.0))  # fmt: skip
def test_never_over_the_mean_unless_nothing_is_cheap_enough(heads: list, mean: float) -> None:
    costs = [[cost for cost, _ in head] for head in heads]
    errors = [[error for _, error in head] for head in heads]
    for blends in (None, [[0] * len(head) for head in heads]):
        chosen = allocate(costs, errors, mean, blends)
        spent = sum(
            costs[h][c.index] + c.share * (costs[h][c.toward] - costs[h][c.index])
            for h, c in enumerate(chosen)
        )
        cheapest = sum(min(head) for head in costs)
        assert spent <= max(mean * len(heads), cheapest) + 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_on_convex_curves_no_choice_of_equal_cost_is_better(seed: int) -> None:
    draw = random.Random(seed)
    costs, errors = [], []
    for _ in range(3):
        steps = sorted((draw.random() for _ in range(3)), reverse=True)
        costs.append([0.25, 0.5, 0.75, 1.0])
        errors.append([sum(steps), sum(steps[1:]), steps[2], 0.0])
    mean = draw.choice([0.25, 0.5, 0.75])
    chosen = allocate(costs, errors, mean)
    got = sum(errors[h][c.index] for h, c in enumerate(chosen))
    best = min(
        sum(errors[h][i] for h, i in enumerate(places))
        for places in itertools.product(range(4), repeat=3)
        if sum(costs[h][i] for h, i in enumerate(places)) <= mean * 3 + 1e-9
    )
    assert got == pytest.approx(best)


def test_the_rest_of_the_budget_is_spent_in_part() -> None:
    chosen = allocate([[0.1, 0.5]], [[1.0, 0.2]], 0.3, [[7, 7]])
    assert (chosen[0].index, chosen[0].toward) == (0, 1)
    assert chosen[0].share == pytest.approx(0.5)
    assert allocate([[0.1, 0.5]], [[1.0, 0.2]], 0.3, [[7, 8]])[0].share == 0.0


def test_hull_leaves_out_what_is_never_worth_it() -> None:
    # the second point lies above the line between its neighbours, the last errs more for more
    assert lower_hull([0.1, 0.2, 0.3, 0.5], [1.0, 0.9, 0.1, 0.4]) == [0, 2]


def test_heads_that_need_more_get_more() -> None:
    costs = [[0.1, 0.2, 0.4]] * 2
    errors = [[0.9, 0.5, 0.1], [0.02, 0.01, 0.0]]
    hungry, content = allocate(costs, errors, 0.25)
    assert costs[0][hungry.index] == 0.4
    assert costs[1][content.index] == 0.1
