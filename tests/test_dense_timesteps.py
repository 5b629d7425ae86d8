"""Option dense_timesteps: exact attention at the noisy end, by the model's own timestep."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import QUICK, capture, sparse_calls
from small_transformers import (
    EXACT,
    Inputs,
    cogvideox,
    cogvideox_inputs,
    distance,
    hunyuan,
    hunyuan_inputs,
    ltx,
    ltx_inputs,
    run,
    wan,
    wan_inputs,
)
from timed_toys import Positioned, Summed, checkpointed, in_region, timed
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from toys import latents

import veda_compile
from benchmarks.zoo import entry
from veda_compile import OptionsError, backend
from veda_compile.passes.layers import source_name
from veda_compile.passes.timestep import TimestepInput, find_timestep, insert_keep_all
from veda_compile.told import Told, enter, leave
from veda_compile.told_timestep import told_keep_all

pytestmark = pytest.mark.usefixtures("fresh_compiler", "fresh_counters")

GRID = (4, 8, 12)
OPTIONS: dict[str, Any] = {**QUICK, "density": 0.3}


@pytest.fixture
def fresh_counters() -> None:
    counters.clear()


def at(inputs: Inputs, timestep: float) -> Inputs:
    """The inputs with another timestep."""
    return {**inputs, "timestep": torch.full_like(inputs["timestep"], timestep)}


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="veda", options={**OPTIONS, **options})


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_one_graph_is_dense_early_and_sparse_late(inner: str) -> None:
    model, inputs = wan(layers=1), wan_inputs(GRID)
    always_sparse = run(compiled(model), at(inputs, 100))
    torch._dynamo.reset()
    counters.clear()
    veda_compile.reset_report()
    found = compiled(model, dense_timesteps=0.3, inner=inner)
    assert distance(run(found, at(inputs, 900)), run(model, at(inputs, 900))) <= EXACT
    late = run(found, at(inputs, 100))
    assert distance(late, always_sparse) <= EXACT
    assert distance(late, run(model, at(inputs, 100))) > 1e-3
    assert counters["stats"]["unique_graphs"] == 1
    assert len(veda_compile.report().graphs) == 1


def placeholder_name(found: TimestepInput | str) -> str:
    assert isinstance(found, TimestepInput), found
    return source_name(found.node._dynamo_source)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (wan, wan_inputs),
        (hunyuan, hunyuan_inputs),
        (ltx, ltx_inputs),
        (cogvideox, cogvideox_inputs),
    ],
    ids=["wan", "hunyuan", "ltx", "cogvideox"],
)
def test_the_timestep_of_models(model: Callable[[], Any], inputs: Callable[[Any], Inputs]) -> None:
    captured = capture(model(), **inputs((2, 3, 4)))
    name = placeholder_name(find_timestep(captured.gm, captured.inputs, 1))
    assert name.endswith("['timestep']")


@pytest.mark.parametrize("name", ["cosmos", "cosmos 2", "wan ti2v", "mochi"])
def test_the_timestep_of_more_models(name: str) -> None:
    model, inputs = entry(name).make((2, 4, 4))
    found: list[TimestepInput | str] = []

    def look(gm: fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        found.append(find_timestep(gm, example, 1))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=look, dynamic=False)(**inputs)
    (only,) = [one for one in found if isinstance(one, TimestepInput)]
    assert placeholder_name(only).endswith("['timestep']")


def flags(model: Any, **scalars: Tensor) -> list[bool | None]:
    """What the op was told in each attention call."""
    with torch.no_grad(), sparse_calls() as calls:
        model(latents(), **scalars)
    return [None if call.keep_all is None else bool(call.keep_all) for call, _ in calls]


@pytest.mark.parametrize(
    ("factor", "noisy", "clean"),
    [
        (1.0, 701.0, 699.0),  # in thousandths
        (1.0, 0.701, 0.699),  # a share, as Cosmos 2 has it
        (1.0, 1.095, -1.55),  # 0.25 * log(sigma), the first and last of Cosmos 1
        (1000.0, 0.701, 0.699),
        (0.001, 701.0, 1.5),
    ],
)
def test_units(factor: float, noisy: float, clean: float) -> None:
    model = compiled(timed(factor), dense_timesteps=0.3)
    assert flags(model, timestep=torch.tensor([noisy])) == [True, True]
    assert flags(model, timestep=torch.tensor([clean])) == [False, False]
    assert counters["stats"]["unique_graphs"] == len(veda_compile.report().graphs) == 1


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_bound_itself_is_dense_and_all_of_the_schedule_is_everything(share: float) -> None:
    model = compiled(timed(), dense_timesteps=share)
    assert flags(model, timestep=torch.tensor([750])) == [True, True]
    expected = share == 1.0
    assert flags(model, timestep=torch.tensor([-2])) == [expected, expected]


@pytest.mark.parametrize("shape", [(), (2,), (2, 1)])
def test_the_noisiest_of_several_timesteps_counts(shape: tuple[int, ...]) -> None:
    timestep = torch.zeros(shape)
    timestep.view(-1)[-1] = 800.0
    model = compiled(timed(), dense_timesteps=0.3)
    with torch.no_grad(), sparse_calls() as calls:
        model(latents(batch=2), timestep=timestep)
    assert [bool(call.keep_all) for call, _ in calls if call.keep_all is not None] == [True, True]


@pytest.mark.parametrize("run_block", [checkpointed, in_region])
def test_inside_nested_graphs(run_block: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = compiled(timed(run_block=run_block), dense_timesteps=0.3)
    assert flags(model, timestep=torch.tensor([900.0])) == [True, True]
    assert flags(model, timestep=torch.tensor([100.0])) == [False, False]


def test_names_tell_apart_what_is_embedded_alike() -> None:
    guidance, fps, t = torch.tensor([900.0]), torch.tensor([24.0]), torch.tensor([100.0])
    model = compiled(timed(), dense_timesteps=0.3)
    assert flags(model, guidance=guidance, fps=fps, t=t) == [False, False]
    torch._dynamo.reset()
    model = compiled(timed(), dense_timesteps=0.3)
    assert flags(model, guidance=guidance, when=t, fps=fps) == [False, False]


def without_effect(model: Any, caplog: pytest.LogCaptureFixture, **scalars: Tensor) -> str:
    """The warning, checked against the report."""
    with caplog.at_level(logging.WARNING):
        assert set(flags(compiled(model, dense_timesteps=0.3), **scalars)) == {None}
    (message,) = [r.message for r in caplog.records if "dense_timesteps" in r.message]
    assert "no effect on 2 attention calls" in message
    for site in veda_compile.report().sites:
        assert site.rewritten and site.explanation is not None
        assert message.rpartition("attention calls: ")[2] in site.explanation
    return message


@pytest.mark.parametrize("added", [False, True], ids=["rotary", "added"])
def test_positions_are_not_taken(added: bool, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Positioned(added).eval().requires_grad_(False)
    message = without_effect(model, caplog, place=torch.arange(72.0))
    assert "no input of the graph is embedded as a timestep" in message
    assert "compile the whole model in one graph" in message


@pytest.mark.parametrize(
    ("scalars", "message"),
    [
        ({"guidance": torch.tensor([900.0])}, "no input of the graph"),
        (
            {"one": torch.tensor([1.0]), "two": torch.tensor([2.0])},
            r"several inputs .*\(one, two\)",
        ),
        ({"places": torch.ones(1, 3)}, "no input of the graph"),
        ({}, "no input of the graph"),
    ],
    ids=["guidance", "two", "neither one nor one each", "none"],
)
def test_without_a_timestep_it_is_said(
    scalars: dict[str, Tensor], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Summed(timed()) if "places" in scalars else timed()
    assert re.search(message, without_effect(model, caplog, **scalars))


def test_nothing_is_added_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = _inner_graphs(monkeypatch)
    assert set(flags(compiled(timed()), timestep=torch.tensor([900.0]))) == {None}
    torch._dynamo.reset()
    assert set(flags(compiled(timed(), dense_timesteps=0.0), timestep=torch.tensor([9.0]))) == {
        None
    }
    assert graphs[0].code == graphs[1].code
    assert "threshold" not in graphs[0].code and "amax" not in graphs[0].code


def test_another_share_is_the_same_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = _inner_graphs(monkeypatch)
    for share, expected in ((0.2, False), (0.5, True)):
        torch._dynamo.reset()
        model = compiled(timed(), dense_timesteps=share)
        assert flags(model, timestep=torch.tensor([600.0])) == [expected, expected]
    assert graphs[0].code == graphs[1].code


def _inner_graphs(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The graphs that reach the inner compiler."""
    seen: list[fx.GraphModule] = []
    real = backend.compile_inner

    def compile_inner(gm: fx.GraphModule, *rest: Any) -> Any:
        seen.append(gm)
        return real(gm, *rest)

    monkeypatch.setattr(backend, "compile_inner", compile_inner)
    return seen


def test_blocks_compiled_alone_are_told() -> None:
    model = wan(layers=2)
    inputs = wan_inputs(GRID)
    dense = {time: run(model, at(inputs, time)) for time in (900, 100, 950)}
    attachment = veda_compile.attach(model)
    for block in model.blocks:
        block.compile(backend="veda", options={**OPTIONS, "dense_timesteps": 0.3})
    for time, expected in ((900, True), (100, False), (950, True)):
        with sparse_calls() as calls:
            out = run(model, at(inputs, time))
        assert [bool(c.keep_all) for c, _ in calls if c.keep_all is not None] == [expected] * 2
        assert (distance(out, dense[time]) <= EXACT) is expected
    assert counters["stats"]["unique_graphs"] == 1
    attachment.remove()
    with pytest.raises(OptionsError, match=r"dense_timesteps: .* tells none"):
        run(model, inputs)


def test_blocks_that_are_not_told_name_the_remedy(caplog: pytest.LogCaptureFixture) -> None:
    model = wan(layers=2)
    model.blocks[0].compile(backend="veda", options={**OPTIONS, "dense_timesteps": 0.3})
    run(model, wan_inputs(GRID))
    (message,) = [r.message for r in caplog.records if "dense_timesteps" in r.message]
    assert "veda_compile.attach(model)" in message
    assert "veda_compile.attach(model)" in str(veda_compile.report().sites[0].explanation)


def test_told_timesteps_nest() -> None:
    enter("outer", Told(timestep=torch.tensor(900.0)))
    enter("inner", Told(timestep=torch.tensor([100.0, 50.0])))
    assert not bool(told_keep_all(0.7, torch.device("cpu")))
    leave("inner")
    assert bool(told_keep_all(0.7, torch.device("cpu")))
    assert not bool(told_keep_all(0.95, torch.device("cpu")))
    leave("outer")
    with pytest.raises(OptionsError, match="tells none"):
        told_keep_all(0.7, torch.device("cpu"))


def test_a_timestep_on_another_device_is_copied_without_waiting() -> None:
    """The bound lies where attention runs; "meta" stands for that device."""
    gm = capture(timed(), latents(), timestep=torch.tensor([900.0])).gm
    timestep = next(n for n in gm.graph.find_nodes(op="placeholder") if "timestep" in n.name)
    bound = gm.graph.find_nodes(op="placeholder")[0]
    insert_keep_all(gm, TimestepInput(timestep, None), bound, torch.device("meta"))
    (copy,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.to.device)
    assert copy.args == (timestep, torch.device("meta"), torch.float32, True)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan, True, "0.3", None])
def test_shares_that_cannot_be(share: Any) -> None:
    with pytest.raises(OptionsError, match=r"dense_timesteps is .*: must be a number from 0 to 1"):
        veda_compile.options.Options.from_dict({"dense_timesteps": share})
