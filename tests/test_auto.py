"""Option sidecar="auto": the first calls run dense and are measured, later ones have plans."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from auto_runs import (
    AUTO,
    GRID,
    LARGER,
    LAYERS,
    apart,
    call,
    compiled,
    compiles,
    forget,
    planned,
    settle,
    states,
)
from families import FAMILIES
from small_transformers import EXACT, distance, run, run_by_hand, wan, wan_inputs

import veda_compile
from veda_compile import Sidecar
from veda_compile.calibration_cache import cached_files
from veda_compile.kernels.layout import Layout, Video

__all__ = ["apart"]

pytestmark = pytest.mark.usefixtures("fresh_compiler", "apart")


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_first_calls_are_dense_and_later_ones_have_the_found_plans(regional: bool) -> None:
    plain = wan()
    dense = [run(plain, wan_inputs(GRID, seed)) for seed in range(3)]
    model = compiled(wan(), regional)
    for seed in range(2):
        assert distance(call(model, seed), dense[seed]) <= EXACT
        assert states() == {"calibrating"}
    settle(model)
    graphs = compiles()
    assert distance(call(model, 2), planned(plain, 2)) <= EXACT
    assert distance(call(model, 2), dense[2]) > 100 * EXACT
    assert compiles() == graphs == len(veda_compile.report().graphs)
    (path,) = cached_files()
    sidecar = Sidecar.load(path)
    assert [card.name for card in sidecar.model.layers] == LAYERS
    kept = [d for layer in sidecar.plans[0].density for d in layer]
    # never above; between static modes there is nothing, so that some may be left
    assert 0.27 <= sum(kept) / len(kept) <= 0.3 + 1e-6
    assert len({shape for layer in sidecar.plans[0].tile_shapes for shape in layer}) > 1


def test_the_next_process_starts_sparse() -> None:
    settle(compiled(wan()))
    for regional in (False, True):
        forget()
        model = compiled(wan(), regional)
        assert distance(call(model, 5), planned(wan(), 5)) <= EXACT
        (path,) = cached_files()
        assert states() == {f"sparse (from cache {path})"}
        assert compiles() == len(veda_compile.report().graphs) == 1
        assert "from cache" in str(veda_compile.report())


PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
import torch
from small_transformers import QUICK, run, wan, wan_inputs
import veda_compile
options = dict(QUICK, sidecar="auto", density=0.3)
model = torch.compile(wan(), backend="veda", options=options)
torch.save(run(model, wan_inputs((4, 8, 12), 5)), {out!r})
print(veda_compile.report().sites[0].calibration)
"""


def test_another_process_finds_the_plans(tmp_path: Path) -> None:
    settle(compiled(wan()))
    out = tmp_path / "out.pt"
    text = PROGRAM.format(tests=str(Path(__file__).parent), out=str(out))
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, env=os.environ, check=True
    )
    assert done.stdout.startswith("sparse (from cache ")
    assert distance(torch.load(out), planned(wan(), 5)) <= EXACT


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_two_models_of_one_class_do_not_mix(regional: bool) -> None:
    first, second = compiled(wan(), regional), compiled(wan(seed=7), regional)
    settle(first)
    (mine,) = cached_files()
    dense = run(wan(seed=7), wan_inputs(GRID, 0))
    assert distance(call(second, 0), dense) <= EXACT  # its own calibration begins
    for seed in range(1, 8):
        call(second, seed)
    files = set(cached_files())
    assert len(files) == 2 and mine in files
    (other,) = files - {mine}
    for model, path, plain in ((first, mine, wan()), (second, other, wan(seed=7))):
        sidecar = Sidecar.load(path)
        plans = {name: sidecar.plan_for(name, GRID)[0] for name in LAYERS}
        wanted = run_by_hand(plain, wan_inputs(GRID, 9), Layout.of(Video(*GRID)), plans)
        assert distance(call(model, 9), wanted) <= EXACT
    assert Sidecar.load(mine).model != Sidecar.load(other).model


def test_other_density_is_other_plans() -> None:
    settle(compiled(wan()))
    torch.compiler.reset()
    veda_compile.reset_report()
    settle(compiled(wan(), density=0.5))
    assert len(list(cached_files())) == 2


@pytest.mark.parametrize("family", ["cogvideox", "hunyuan"])
@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_text_beside_the_video(family: str, regional: bool) -> None:
    known = FAMILIES[family]
    plain, inputs = known.build(), known.inputs(GRID)
    dense = run(plain, inputs)
    model = compiled(known.build(), regional)
    for _ in range(2):
        assert distance(run(model, inputs), dense) <= EXACT
    for _ in range(5):
        found = run(model, inputs)
    assert states() == {"sparse (calibrated now)"}
    sidecar = Sidecar.load(next(iter(cached_files())))
    plans = {card.name: sidecar.plan_for(card.name, GRID)[0]
             for card in sidecar.model.layers}  # fmt: skip
    assert distance(found, run_by_hand(plain, inputs, known.layout(GRID), plans)) <= EXACT


def test_a_grid_met_later_takes_the_nearest_plan(caplog: pytest.LogCaptureFixture) -> None:
    model = compiled(wan(), regional=True)
    settle(model)
    with caplog.at_level(logging.WARNING, "veda_compile"):
        found = call(model, 3, LARGER)
    assert "using the nearest" in caplog.text
    assert distance(found, planned(wan(), 3, LARGER)) <= EXACT
    assert states() == {"sparse (calibrated now)"}
    assert Sidecar.load(next(iter(cached_files()))).grids == (GRID,)


def test_a_grid_that_changes_while_calibrating() -> None:
    model = compiled(wan(), regional=True)
    for seed in range(12):
        call(model, seed, (GRID, LARGER)[seed % 2])
    assert states() == {"sparse (calibrated now)"}
    for grid in (GRID, LARGER):
        assert distance(call(model, 9, grid), planned(wan(), 9, grid)) <= EXACT


def test_it_is_the_default_where_layers_can_be_calibrated() -> None:
    """A model's first calls are measured; density 1.0 and CUDA graphs leave nothing to measure."""
    model = wan()
    options = {name: value for name, value in AUTO.items() if name != "sidecar"}
    fn = torch.compile(model, backend="veda", options=options)
    call(fn, 0)
    assert states() == {"calibrating"}
    for other, state in (
        ({"density": 1.0}, None),
        ({"inner": "inductor", "mode": "reduce-overhead"}, "sparse (not calibrated)"),
    ):
        forget()
        call(torch.compile(model, backend="veda", options={**options, **other}), 0)
        assert states() == {state}
