"""Distillation: runs stay as they were, and a sidecar comes out that the backend takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_transformers import QUICK, Grid, distance, run, wan, wan_inputs
from torch import nn

import veda_compile
from veda_compile import DistillError, OptionsError, Sidecar, distill
from veda_compile.distill_state import state_path

pytestmark = pytest.mark.usefixtures("fresh_compiler")

GRID, FLIPPED = (4, 8, 12), (4, 12, 8)
FIND: dict[str, Any] = {"min_tokens": 0, "inner": "eager"}


def generate(model: Any, grid: Grid, seed: int, steps: int = 4) -> list[torch.Tensor]:
    """A run with falling timesteps; the outputs of all steps."""
    inputs, outputs = wan_inputs(grid, seed), []
    for step in range(steps):
        inputs["timestep"] = torch.tensor([1000 - 1000 * step // steps])
        outputs.append(run(model, inputs))
    return outputs


def learn(model: Any, out: Path, runs: int = 4, grids: tuple[Grid, ...] = (GRID,), **given: Any):  # type: ignore[no-untyped-def]
    given = {
        "density": 0.4, "share": 1.0, "options": FIND, "progress": False, "train": True,
    } | given  # fmt: skip
    with distill(model, out, **given) as job:
        for seed in range(runs):
            for grid in grids:
                generate(model, grid, seed)
    return job


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "wan.veda.safetensors"


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_outputs_are_bit_equal_to_a_dense_compile(out: Path, regional: bool) -> None:
    dense, model = wan(), wan()
    if regional:
        for block in [*dense.blocks, *model.blocks]:
            block.compile(backend="inductor")
        wanted = generate(dense, GRID, 0)
    else:
        wanted = generate(torch.compile(dense, backend="inductor"), GRID, 0)
    with distill(model, out, 0.4, share=1.0, options={"min_tokens": 0}) as job:
        found = generate(model, GRID, 0)
    assert job.learned.measured == 4
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_the_sidecar_keeps_its_budget_and_is_taken_by_the_backend(out: Path) -> None:
    model = wan()
    job = learn(model, out)
    sidecar = Sidecar.load(out)
    assert [card.name for card in sidecar.model.layers] == [f"blocks.{i}.attn1" for i in range(3)]
    assert sidecar.model.model_class == "WanTransformer3DModel"
    assert sidecar.grids == (GRID,)
    density = [d for layer in sidecar.plans[0].density for d in layer]
    assert sum(density) / len(density) <= 0.4 + 1e-9
    made = sidecar.provenance
    assert (made["runs"], made["model_calls"], made["complete"]) == (4, 16, True)
    assert made["timesteps"] == [1000.0, 750.0, 500.0, 250.0]
    assert not state_path(out).exists()
    dense = run(model, wan_inputs(GRID, 9))
    torch.compiler.reset()
    sparse = torch.compile(model, backend="veda", options={**QUICK, "sidecar": str(out)})
    got = run(sparse, wan_inputs(GRID, 9))
    assert 1e-6 < distance(got, dense) < 0.5
    veda_compile.report().require()
    assert "3 layers" in job.summary() and "4 x 8 x 12" in job.summary()


def test_held_out_figures_are_of_runs_set_apart(out: Path) -> None:
    learn(wan(), out, runs=8)
    figures = Sidecar.load(out).provenance["held_out"]["4x8x12"]
    assert figures["calls"] == "set apart"
    assert 0.0 <= figures["error"] <= 1.0
    assert figures["density"] <= 0.4 + 1e-6
    assert 0.5 < figures["retained_mass"] <= 1.0 + 1e-6


def test_one_plan_a_grid(out: Path) -> None:
    learn(wan(), out, grids=(GRID, FLIPPED))
    assert Sidecar.load(out).grids == (GRID, FLIPPED)


def test_static_policy_makes_a_pure_static_sidecar(out: Path) -> None:
    learn(wan(), out, policy="static", density=0.5)
    (plan,) = Sidecar.load(out).plans
    assert plan.modes is not None
    assert all(mode is not None for layer in plan.modes for mode in layer)  # type: ignore[union-attr]
    learn(wan(), out, policy="static", density=0.9)
    (plan,) = Sidecar.load(out).plans
    assert any(mode.kind == "full" for layer in plan.modes or () for mode in layer or () if mode)
    learn(wan(), out, policy="scored", density=0.5)
    assert Sidecar.load(out).plans[0].modes is None


def test_the_same_runs_make_the_same_sidecar(out: Path, tmp_path: Path) -> None:
    learn(wan(), out)
    again = tmp_path / "again.veda.safetensors"
    learn(wan(), again)
    first, second = Sidecar.load(out), Sidecar.load(again)
    assert first.plans == second.plans
    assert first.provenance == second.provenance


class Stop(KeyboardInterrupt):
    """Somebody presses Ctrl-C."""


def test_an_interrupted_job_goes_on_where_it_stopped(out: Path) -> None:
    model = wan()
    with pytest.raises(Stop), distill(model, out, 0.4, share=1.0, options=FIND) as job:
        generate(model, GRID, 0)
        generate(model, GRID, 1)
        raise Stop
    assert state_path(out).exists()
    assert Sidecar.load(out).provenance["complete"] is False
    with distill(model, out, 0.4, share=1.0, options=FIND) as second:
        assert second.resumed and second.learned.measured == job.learned.measured == 8
        generate(model, GRID, 2)
    made = Sidecar.load(out).provenance
    assert (made["complete"], made["measured_calls"], made["runs"]) == (True, 12, 3)
    assert not state_path(out).exists()


def test_a_resumed_job_equals_one_in_one_go_while_it_searches(out: Path, tmp_path: Path) -> None:
    model = wan()
    whole = learn(model, tmp_path / "whole.veda.safetensors", runs=1, train=False)
    with pytest.raises(Stop), distill(model, out, 0.4, share=1.0, options=FIND, train=False):
        inputs = wan_inputs(GRID, 0)
        for step in (1000, 750):
            run(model, inputs | {"timestep": torch.tensor([step])})
        raise Stop
    with distill(model, out, 0.4, share=1.0, options=FIND, train=False) as job:
        for step in (500, 250):
            run(model, wan_inputs(GRID, 0) | {"timestep": torch.tensor([step])})
    assert job.learned.choices(GRID) == whole.learned.choices(GRID)


def test_state_of_other_work_is_refused_and_can_be_left_out(out: Path) -> None:
    model = wan()
    with pytest.raises(Stop), distill(model, out, 0.4, share=1.0, options=FIND):
        generate(model, GRID, 0)
        raise Stop
    with pytest.raises(DistillError, match="resume=False"), distill(nn.Linear(2, 2), out, 0.4):
        pass
    state_path(out).write_bytes(b"not a state")
    with pytest.raises(DistillError, match="cannot be read"), distill(model, out, 0.4):
        pass
    learn(model, out, resume=False)
    assert Sidecar.load(out).provenance["runs"] == 4


def test_errors_name_the_value_and_the_remedy(out: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"density": 0.0}, "density is 0.0"),
        ({"share": 2}, "share is 2"),
        ({"policy": "best"}, "must be one of mixed, scored, static"),
        ({"tile_size": 32}, "tile_size is 32"),
    ]
    for given, message in cases:
        with pytest.raises(OptionsError, match=message), distill(wan(), out, **given):
            pass
    for path, message in (("x.bin", "must end in"), ("none/x.veda.safetensors", "does not exist")):
        with pytest.raises(OptionsError, match=message), distill(wan(), tmp_path / path):
            pass
    with pytest.raises(DistillError, match="call the model"), distill(wan(), out):
        pass
    with pytest.raises(DistillError, match="veda explain"):
        model = wan()
        with distill(model, out, options={"min_tokens": 10**6, "inner": "eager"}):
            generate(model, GRID, 0)
    assert list(tmp_path.iterdir()) == []


def test_scores_are_trained_on_request_alone(out: Path) -> None:
    """Five runs: three are searched, the fourth is set apart, the fifth teaches."""
    model = wan()
    with distill(model, out, 0.4, share=1.0, options=FIND, progress=False) as job:
        for seed in range(5):
            generate(model, GRID, seed)
    assert job.learned.shapes and not job.learned.trainers
    assert Sidecar.load(out).score == "closed_form"
    assert learn(wan(), out, runs=5).learned.trainers
