"""Token codes against the numbers: a NaN in one element of an input reaches exactly the named rows.

One model of every class; `python -m benchmarks.token_map` takes them all, at every batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.catalogue import catalogue
from benchmarks.token_map import GRID, UNSEEN, row
from benchmarks.zoo import ENTRIES, Entry, entry
from benchmarks.zoo.token_check import MIXING, NOT_FAR, probe
from veda_compile.passes import windows
from veda_compile.passes.compute import RULES

pytestmark = pytest.mark.usefixtures("fresh_compiler")

QUICKER = ("anyflow far infer", "sana wm no camera", "consisid rotary", "kandinsky 6 silent")
"""Taken for their classes, as they take less time than the first ones."""

PROBED = {
    entry.model or entry.name: entry
    for entry in (*reversed(ENTRIES), *(entry(name) for name in QUICKER))
    if entry.name not in UNSEEN
}
"""By class, the first entry that shows something; by name, models of our own."""


@pytest.mark.parametrize("entry", PROBED.values(), ids=lambda entry: entry.name)
def test_a_nan_reaches_exactly_the_named_rows(entry: Entry) -> None:
    shown = row(entry, max(entry.batches), elements=2, seed=1)
    assert shown.probed.faults == []
    assert shown.right
    assert shown.probed.sources
    assert shown.probed.hits >= shown.probed.elements  # no element was one that is nowhere


def test_every_class_is_probed() -> None:
    unseen = {entry(name).model for name in UNSEEN}
    assert set(catalogue().covered) == {name for name in PROBED if name[0].isupper()} | (
        unseen - {None}
    )


def test_convolutions_left_in_spread_a_nan_to_the_neighbours_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = entry("sana wm no camera")
    (alone, near), (whole, far) = MIXING[model.model].runs()
    assert (near, far) == (NOT_FAR, (1, 1, 1))
    assert alone.neighbours and not whole.neighbours
    wrong = {model.model: replace(MIXING[model.model], reach=(1, 1, 2))}
    monkeypatch.setattr("benchmarks.zoo.token_check.MIXING", MIXING | wrong)
    faults = probe(model, GRID, 1, elements=1, seed=1).faults
    assert faults and all("(1, 1, 2) around" in fault for fault in faults)


def test_a_rule_that_names_other_tokens_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(out: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        right = windows.convolution(out, x, *args, **kwargs)
        return right.map(out, lambda codes: codes.roll(1, -1))

    monkeypatch.setitem(RULES, "conv3d", shifted)
    assert probe(entry("wan t2v"), GRID, 1, elements=1, seed=1).faults
