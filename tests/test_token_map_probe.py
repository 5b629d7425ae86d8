"""Token codes against the numbers: a NaN in one element of an input reaches exactly the named rows.

One model of every class; `python -m benchmarks.token_map` takes them all, at every batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.catalogue import catalogue
from benchmarks.token_map import GRID, UNSEEN, row
from benchmarks.zoo import ENTRIES, Entry, entry
from benchmarks.zoo.graph_chain import GraphChain
from benchmarks.zoo.token_check import MIXING, NOT_FAR, probe
from veda_compile.passes import windows
from veda_compile.passes.compute import RULES
from veda_compile.passes.origins import Part

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


@pytest.mark.parametrize("name", ["wan animate 2 cached", "sana wm frames"])
def test_other_models_that_dynamo_cuts_are_followed_across_graphs(name: str) -> None:
    shown = row(entry(name), 1, elements=1, seed=1)
    assert shown.probed.faults == []
    assert shown.right
    assert shown.probed.hits >= 6 * shown.probed.elements  # q, k and v of two calls


class Cut(nn.Module):
    """Projections in one graph, attention in the next."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Conv3d(4, 16, (1, 2, 2), (1, 2, 2))
        self.qkv = nn.Linear(16, 48)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.inside(hidden_states).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2)
        torch._dynamo.graph_break()
        q, k, v = (side.transpose(1, 2) for side in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v)


def _cut_model(grid: tuple[int, int, int], batch: int) -> tuple[nn.Module, dict[str, Tensor]]:
    t, h, w = grid
    return Cut(), {"hidden_states": torch.randn(batch, 4, t, 2 * h, 2 * w)}


CUT = Entry("cut", _cut_model, ("qkv",), cut=True)


@pytest.mark.parametrize("batch", CUT.batches)
def test_a_nan_in_one_graph_is_looked_for_in_the_next(batch: int) -> None:
    chain = GraphChain(CUT, GRID, batch)
    (call,) = chain.calls
    (entrance,) = call.sources
    assert (entrance.call, call.number) == (0, 1)
    shown = row(CUT, batch, elements=5, seed=1)
    assert shown.right
    assert (shown.probed.calls, shown.probed.hits) == (1, 5 * 3)


def _next_row(codes: Tensor) -> Tensor:
    return codes.roll(1, 1)


def _swapped_sides(codes: Tensor) -> Tensor:
    t, h, w = GRID
    return codes.unflatten(1, (t, w, h)).transpose(2, 3).flatten(1, 3)


def _other_sample(codes: Tensor) -> Tensor:
    return codes.roll(1, 0)


@pytest.mark.parametrize("wrong", [_next_row, _swapped_sides, _other_sample])
def test_wrong_codes_of_handed_on_tensors_are_seen(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Tensor], Tensor]
) -> None:
    right = Part.codes.fget
    assert right is not None
    monkeypatch.setattr(
        Part,
        "codes",
        property(lambda part: right(part) if part.moved is None else wrong(right(part))),
    )
    shown = row(CUT, 2, elements=2, seed=1)
    assert shown.probed.hits
    assert shown.probed.faults
    assert not shown.right


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
