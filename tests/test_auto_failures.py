"""Option sidecar="auto": what goes wrong, what it costs, and what is said of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from auto_runs import (
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
from small_transformers import (
    EXACT,
    distance,
    run,
    run_by_hand,
    wan,
    wan_inputs,
)
from typer.testing import CliRunner

import veda_compile
from veda_compile import Sidecar, auto_backend, layer_search, time_account
from veda_compile.calibration import CALIBRATIONS
from veda_compile.calibration_cache import cached_files
from veda_compile.cli import app
from veda_compile.kernels.layout import Layout, Video
from veda_compile.kernels.observe_op import waiting
from veda_compile.kernels.plan import Plan

__all__ = ["apart"]

pytestmark = pytest.mark.usefixtures("fresh_compiler", "apart")


def test_a_damaged_file_is_ignored_with_a_warning_and_replaced(
    caplog: pytest.LogCaptureFixture,
) -> None:
    settle(compiled(wan()))
    (path,) = cached_files()
    good = path.read_bytes()
    other = Sidecar.load(path)
    for damage in (b"not a sidecar", good[: len(good) // 2]):
        path.write_bytes(damage)
        _replaced(path, caplog)
    Sidecar(other.model, other.plans, other.score, other.tile_size, {"key": "x"}).save(path)
    _replaced(path, caplog)


def _replaced(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    forget()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "veda_compile"):
        settle(compiled(wan()))
    assert caplog.text.count("will be replaced") == 1
    assert Sidecar.load(path).provenance["made_by"] == "veda_compile.calibration"


class Stop(KeyboardInterrupt):
    """Somebody presses Ctrl-C."""


def test_an_interrupt_leaves_no_file_and_calibration_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = compiled(wan())
    call(model, 0)
    call(model, 1)
    step = layer_search.LayerSearch.step

    def stopping(search: Any, sample: Any) -> None:
        step(search, sample)
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(layer_search.LayerSearch, "step", stopping)
        call(model, 2)
    assert waiting() == 0 and not (tmp_path / "cache").exists()
    settle(model)
    assert distance(call(model, 9), planned(wan(), 9)) <= EXACT


def test_a_failing_measurement_never_fails_the_model(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(layer_search.LayerSearch, "step", failing)
    model = compiled(wan())
    for seed in range(3):
        found = call(model, seed)
    plan = Plan.uniform(2, (4, 4, 4), 0.3)
    assert "cannot be calibrated" in caplog.text and "no memory left" in caplog.text
    assert states() == {"sparse (not calibrated)"}
    found = call(model, 3)
    layout = Layout.of(Video(*GRID))
    wanted = run_by_hand(wan(), wan_inputs(GRID, 3), layout, dict.fromkeys(LAYERS, plan))
    assert distance(found, wanted) <= EXACT
    assert not list(cached_files())


def test_a_folder_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VEDA_CACHE_DIR", str(tmp_path / "file" / "inside"))
    settle(compiled(wan()))
    assert "VEDA_CACHE_DIR" in caplog.text


def test_two_writers_leave_one_whole_file() -> None:
    first, second = compiled(wan()), wan()
    call(first, 0)
    CALIBRATIONS.clear()  # the second is calibrated as if in a process of its own
    second = compiled(second)
    call(second, 0)
    settle(first)
    veda_compile.reset_report()
    for seed in range(6):
        call(second, seed)
    (path,) = cached_files()
    assert Sidecar.load(path).grids == (GRID,)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_measuring_keeps_to_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense call takes 1 s and a unit 0.03 s: at no time is more than a tenth spent."""
    clock, dense, spent = Clock(), [0.0], [0.0]
    compile_inner, step = auto_backend.compile_inner, layer_search.LayerSearch.step

    def slow_inner(*given: Any) -> Any:
        inner = compile_inner(*given)

        def run_slowly(*args: Any) -> Any:
            clock.now += 1.0
            dense[0] += 1.0
            return inner(*args)

        return run_slowly

    def slow_step(search: Any, sample: Any) -> None:
        step(search, sample)
        clock.now += 0.03
        spent[0] += 0.03

    monkeypatch.setattr(time_account, "perf_counter", clock)
    monkeypatch.setattr(time_account, "SHARE", 0.1)
    monkeypatch.setattr(auto_backend, "compile_inner", slow_inner)
    monkeypatch.setattr(layer_search.LayerSearch, "step", slow_step)
    model = compiled(wan(layers=1))
    for seed in range(8):
        before = spent[0]
        call(model, seed)
        assert spent[0] <= 0.1 * (dense[0] - 1.0) + 1e-9  # the first call compiles: no credit
        assert spent[0] - before <= 0.2
    assert spent[0] > 0.3


def test_the_account_refuses_what_does_not_fit() -> None:
    clock = Clock()
    account = time_account.TimeAccount(0.1, 0.2, clock)
    cpu = torch.device("cpu")

    def model_call(timed: bool = True) -> int:
        account.next_call()
        units = 0
        with account.run(cpu, timed):
            clock.now += 100.0 if not timed else 10.0
            while account.allows():
                with account.unit():
                    clock.now += 0.6
                units += 1
        return units

    assert model_call(timed=False) == 0 and account.dense == 0.0
    assert model_call() == 0  # how long a call takes is not known before its end
    counts = [model_call() for _ in range(10)]
    assert account.dense == pytest.approx(110.0)
    assert counts[0] == 3 and max(counts) <= 3  # 2 s, a fifth of a call, at most
    assert 0.05 * account.dense < account.spent <= 0.1 * account.dense
    account.next_call()
    assert not account.allows()  # outside of a run


def test_what_was_spent_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "veda_compile"):
        settle(compiled(wan()))
    (line,) = [r.message for r in caplog.records if "calibrated WanTransformer3DModel" in r.message]
    assert "measuring took" in line and "%" in line and "kept in" in line
    assert "attention calls calibrating" in caplog.text


def test_strict_accepts_layers_that_are_calibrating() -> None:
    model = compiled(wan(), strict=True)
    for seed in range(8):
        call(model, seed)
        veda_compile.report().require()
    assert states() == {"sparse (calibrated now)"}


def test_dense_timesteps_stay_dense() -> None:
    model = compiled(wan(), dense_timesteps=0.3)
    settle(model)
    noisy = wan_inputs(GRID, 5) | {"timestep": torch.tensor([900])}
    assert distance(run(model, noisy), run(wan(), noisy)) <= EXACT
    assert distance(call(model, 5), planned(wan(), 5)) <= EXACT


def test_dense_layers_stay_dense() -> None:
    model = compiled(wan(), dense_layers=("blocks.1.attn1",))
    settle(model)
    names = [card.name for card in Sidecar.load(next(iter(cached_files()))).model.layers]
    assert names == ["blocks.0.attn1", "blocks.2.attn1"]
    assert distance(call(model, 5), planned(wan(), 5)) <= EXACT


def test_equal_layers_are_told_apart_by_identity() -> None:
    """Norms as they are made, all ones: no content tells the layers apart."""
    model = wan()
    with torch.no_grad():
        for block in model.blocks:
            for parameter in block.attn1.parameters():
                if parameter.dim() == 1:
                    parameter.fill_(1.0)
    state = model.state_dict()
    plain = wan()
    plain.load_state_dict(state)
    model = compiled(model, regional=True)
    settle(model)
    assert distance(call(model, 5), planned(plain, 5)) <= EXACT


def test_inductor_compiles_both(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = wan(layers=2)
    dense = run(plain, wan_inputs(GRID, 0))
    model = compiled(wan(layers=2), inner="inductor", executor="auto")
    assert distance(call(model, 0), dense) <= EXACT
    settle(model)
    graphs = compiles()
    assert distance(call(model, 5), planned(plain, 5)) <= EXACT
    for seed in range(2):  # other sizes: the guards hold for both
        assert distance(call(model, seed, LARGER), planned(plain, seed, LARGER)) <= EXACT
    assert compiles() == graphs + 1


def test_the_cache_command(monkeypatch: pytest.MonkeyPatch) -> None:
    settle(compiled(wan()))
    (path,) = cached_files()
    path.with_name("x.veda.safetensors").write_text("no sidecar")
    shown = CliRunner().invoke(app, ["cache"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert (
        f"{path.name}: WanTransformer3DModel, 3 layers, density 0.3, grids 4x8x12" in shown.stdout
    )
    assert "damaged" in shown.stdout
    cleared = CliRunner().invoke(app, ["cache", "--clear"])
    assert cleared.exit_code == 0 and "removed: 2" in cleared.stdout
    assert not list(cached_files())


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"XDG_CACHE_HOME": "/x"}, "/x/veda-compile"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/veda-compile"),
        ({"HOME": "/h"}, "/h/.cache/veda-compile"),
    ],
)
def test_where_the_cache_is(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], wanted: str
) -> None:
    from veda_compile.calibration_cache import cache_folder

    for name in ("VEDA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(cache_folder()) == wanted
