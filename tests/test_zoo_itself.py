"""The zoo tells right from wrong, and knows every class of diffusers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import typer
from typer.testing import CliRunner

import veda_compile
from benchmarks.catalogue import NOT_VIDEO, catalogue, installed_classes
from benchmarks.coverage import main
from benchmarks.zoo import ENTRIES, Entry, Grid, entry
from benchmarks.zoo.measure import Setup, measure
from veda_compile.kernels.layout import Layout, Video
from veda_compile.passes.reasons import Reason

GRID: Grid = (3, 4, 5)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    torch.compiler.reset()
    veda_compile.reset_report()


def test_every_installed_class_is_known() -> None:
    known = catalogue()
    assert known.not_covered == [] and known.gone == []
    assert set(known.covered).isdisjoint(NOT_VIDEO)
    assert len(known.covered) + len(known.not_video) == len(installed_classes())


def test_a_new_class_is_reported() -> None:
    known = catalogue([*installed_classes(), "NewVideoTransformer3DModel"])
    assert known.not_covered == ["NewVideoTransformer3DModel"]
    assert catalogue(["WanTransformer3DModel"]).not_covered == []


def test_a_class_that_is_gone_is_reported() -> None:
    present = [name for name in installed_classes() if name != "FluxTransformer2DModel"]
    assert catalogue(present).gone == ["FluxTransformer2DModel"]


def test_entries_are_consistent() -> None:
    assert len({known.name for known in ENTRIES}) == len(ENTRIES)
    for known in ENTRIES:
        grid = known.fit(GRID)
        assert all(side >= wanted for side, wanted in zip(grid, GRID, strict=True)) or known.frames
        assert len(known.layouts(grid)) == known.sites, known.name
        assert known.batch in known.batches, known.name
        for reasons in known.left:
            assert all(reason in Reason.__members__ for reason in reasons.split(" or "))


def test_the_same_model_every_time() -> None:
    known = entry("wan t2v")
    (first, inputs), (second, again) = known.make(GRID), known.make(GRID)
    assert torch.equal(inputs["hidden_states"], again["hidden_states"])
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def problems(known: Entry) -> str:
    return "; ".join(measure(known, Setup(known.fit(GRID), known.batch), sparse=False).problems)


def test_what_is_not_as_it_should_be_is_said() -> None:
    known = entry("wan t2v")
    assert problems(known) == ""
    assert "wrongly rewritten: 2 x video 3x4x5" in problems(replace(known, layers=()))
    assert "not rewritten" in problems(replace(known, layers=(*known.layers, "blocks.2.attn1")))
    assert "rewritten under other names" in problems(replace(known, layers=("a", "b")))
    assert "left dense as CROSS_ATTENTION: 2, not 0" in problems(replace(known, left={}))
    assert "CAUSAL: 0, not 2" in problems(replace(known, left={"CAUSAL": 2}))
    other = (Layout.of(Video(3, 5, 4)),) * 2
    said = problems(replace(known, special=lambda grid: other))
    assert "not rewritten: 2 x video 3x5x4" in said and "wrongly rewritten" in said


def test_the_command_line() -> None:
    app = typer.Typer()
    app.command()(main)
    done = CliRunner().invoke(app, ["--model", "plain einsum", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.output.splitlines()[-1])
    (row,) = report["rows"]
    assert (report["right"], report["wrong"], row["model"]) == (True, 0, "plain einsum")
    assert (row["expected"], row["rewritten"]) == (2, 2)
    assert row["true_grids"] == row["grids"] == [[5, 6, 10]]
    assert CliRunner().invoke(app, ["--model", "no such"]).exit_code == 2
