"""Recorded times of two kernels on equal calls become the table that executor "auto" goes by."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from benchmarks import cost_fit, cost_table, kernel_table
from benchmarks.gpu.results import Results
from veda_compile.kernels.kernel_tables import FASTER, Kind

ABOUT = {"device_type": "cuda", "device": "NVIDIA Z1", "capability": "9.0"}
KIND = Kind(9, "bfloat16", 128, 128)


def beside(gain: float, **changes: Any) -> dict[str, Any]:
    record = {
        "head_dim": 128, "dtype": "bfloat16", "tile": (4, 4, 8), "density": 0.1,
        "hopper": {"median": 2.0, "host": 0.1}, "triton": {"median": 2.0 * gain, "host": 0.1},
    }  # fmt: skip
    return record | changes


@pytest.fixture
def results(tmp_path: Path) -> Iterator[Results]:
    with mock.patch("benchmarks.gpu.results.clocks", lambda: None):
        yield Results(tmp_path / "gpu.json", ABOUT)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """Where the table is written; the shipped files stay as they are."""
    copies = []
    with mock.patch.dict(FASTER, clear=True):
        for module in (cost_fit, kernel_table):
            copies.append(tmp_path / module._FILE.name)
            copies[-1].write_text(module._FILE.read_text())
        with (
            mock.patch.object(cost_fit, "_FILE", copies[0]),
            mock.patch.object(kernel_table, "_FILE", copies[1]),
        ):
            yield copies[1]


def written(file: Path) -> dict[tuple[object, ...], float]:
    """What the command makes of the results beside `file`."""
    cost_table.main(gpu=file.parent, write=True)
    found: dict[tuple[object, ...], float] = runpy.run_path(str(file))["FASTER"]
    return found


def test_the_least_gain_of_each_kind_is_written(results, file) -> None:
    for case, gain in enumerate((1.4, 1.25, 1.3)):
        results.add("attention", f"{case}", "ok", beside(gain))
    results.add("attention", "64", "ok", beside(1.5, tile=(4, 4, 4), head_dim=64))
    results.add("attention", "other", "ok", {"executor": "hopper", "attend": {"median": 0.1}})
    small = Kind(9, "bfloat16", 64, 64)
    assert written(file) == {KIND: 1.25, small: 1.5}
    subprocess.run([sys.executable, "-m", "ruff", "format", "--check", str(file)], check=True)


@pytest.mark.parametrize("gain", [0.8, 1.0, 1.02])
def test_what_is_not_faster_in_every_case_is_not_written(results, file, gain: float) -> None:
    FASTER[KIND] = 1.5  # as an earlier kernel was
    elsewhere = Kind(9, "float16", 64, 64)
    FASTER[elsewhere] = 1.2
    results.add("attention", "a", "ok", beside(1.4))
    results.add("attention", "b", "ok", beside(gain))
    assert written(file) == {elsewhere: 1.2}


def test_launching_counts(results, file) -> None:
    results.add("attention", "a", "ok", beside(1.4, hopper={"median": 2.0, "host": 2.8}))
    assert written(file) == {}


def test_only_results_of_gpus_that_went_well_count(results, file, setting) -> None:
    setting.results.add("attention", "on a CPU", "ok", beside(1.4))
    for status in ("failed", "skipped"):
        results.add("attention", status, status, beside(1.4))
    assert written(file) == {}


@pytest.mark.parametrize(
    ("stage", "case", "requested"),
    [("check", "odd sides", "hopper"), ("attention", "a, hopper beside triton, 0.1", "auto")],
)
def test_a_kernel_that_failed_is_not_chosen(
    results, file, capsys, stage: str, case: str, requested: str
) -> None:
    results.add("attention", "b", "ok", beside(1.4))
    results.add(stage, case, "failed", {"error": "wrong", "requested": requested})
    assert written(file) == {}
    assert f"failed: {case}" in " ".join(capsys.readouterr().out.split())
    results.add(stage, case, "ok", {"requested": requested})  # since then it was mended
    results.add("check", "odd sides", "failed", {"error": "wrong", "requested": "triton"})
    assert written(file) == {KIND: 1.4}


def test_the_newest_record_of_a_case_counts(results, file) -> None:
    for gain in (0.9, 1.3):
        results.add("attention", "a", "ok", beside(gain))
    assert written(file) == {KIND: 1.3}


def test_the_shipped_table_is_what_would_be_written(file) -> None:
    shipped = file.read_text()
    kernel_table.write_table(runpy.run_path(str(file))["FASTER"])
    assert file.read_text() == shipped
