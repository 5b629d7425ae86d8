"""Every model of the zoo, compiled as a whole: what is sparse, with which grids, and what is not.

The common ones are looked at more closely in `test_models`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import pytest
import torch
from _pytest.mark import ParameterSet

import veda_compile
from benchmarks.zoo import ENTRIES, FIRST, Entry, Grid
from benchmarks.zoo.measure import Setup, measure

GRID: Grid = (3, 4, 5)

OPEN_REGIONALLY = {
    "sana wm": "rays turn queries, keys and values by other matrices, all inputs of the block",
}
"""Truths about models compiled block by block that are not reached yet, and why."""


def _cases(entries: Iterable[Entry], unreached: Mapping[str, str]) -> list[ParameterSet]:
    return [
        pytest.param(
            known,
            id=known.name,
            marks=[pytest.mark.xfail(reason=unreached[known.name], strict=True)]
            if known.name in unreached
            else [],
        )
        for known in entries
    ]


WHOLE = _cases((known for known in ENTRIES if known not in FIRST), {})
BLOCKS = _cases(
    {known.model: known for known in reversed(ENTRIES) if known.model and known.sites}.values(),
    OPEN_REGIONALLY,
)
"""One variant of each class."""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    torch.compiler.reset()
    veda_compile.reset_report()


@pytest.mark.parametrize("known", WHOLE)
def test_whole_models_are_as_the_zoo_says(known: Entry) -> None:
    outcome = measure(known, Setup(known.fit(GRID), known.batch), sparse=False)
    assert outcome.problems == []
    assert (outcome.rewritten, outcome.wrong) == (known.sites, 0)


@pytest.mark.parametrize("known", BLOCKS)
def test_blocks_are_as_the_zoo_says(known: Entry) -> None:
    outcome = measure(known, Setup(known.fit(GRID), known.batch, regional=True), sparse=False)
    assert outcome.problems == []
    assert (outcome.rewritten, outcome.wrong) == (known.sites, 0)
