"""The veda command: what it shows, and one-line errors with exit code 2."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from sidecar_samples import FIRST, GRID, file_parts, small_sidecar, write_parts
from typer.testing import CliRunner

import veda_compile
from veda_compile.cli import app
from veda_compile.sidecar import Sidecar

NAME = "model.veda.safetensors"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    small_sidecar().save(tmp_path / NAME)
    return tmp_path / NAME


def test_version() -> None:
    result = CliRunner().invoke(app, ["version"])
    assert result.exit_code == 0
    assert result.stdout.strip() == veda_compile.__version__


def test_inspect_shows_the_contents(path: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(path)], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for shown in (
        "WanTransformer3DModel",
        "2: blocks.0.attn1 to blocks.1.attn1",
        "3 of 8 in 2 layers",
        "closed_form",
        "128",
        "5x16x24",
        "0.200 (0.050 to 0.400)",
        "4x4x8: 2",
        '{"torch": "2.13.0"}',
    ):
        assert shown in result.stdout


def test_inspect_json(path: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(path), "--json"])
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["model"] == "WanTransformer3DModel"
    assert facts["layers"][0]["name"] == FIRST
    assert facts["score"] == "closed_form" and facts["tile_size"] == 128
    assert facts["layer_independent"] is False and facts["fingerprints_unique"] is True
    grid = facts["grids"][0]
    assert grid["grid"] == list(GRID) and grid["tokens"] == 1920
    assert sum(grid["shapes"].values()) == 6 and grid["shapes"]["4x4x8"] == 2
    assert grid["density"]["mean"] == pytest.approx(0.2)
    assert grid["layer_density"] == pytest.approx([0.2, 0.2])
    assert facts["provenance"]["seed"] == 7


def test_markup_and_control_codes_in_a_file_stay_text(tmp_path: Path) -> None:
    base = small_sidecar()
    Sidecar(
        replace(base.model, model_class="[bold]Wan"),
        base.plans,
        base.score,
        base.tile_size,
        {"note": "\x1b[31mred", "[/]": 1},
    ).save(tmp_path / NAME)
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / NAME)], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "[bold]Wan" in result.stdout
    assert "\\u001b[31mred" in result.stdout and "\x1b[31m" not in result.stdout


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_errors_are_one_line(path: Path, flags: list[str]) -> None:
    document, tensors = file_parts(path)
    document["score"] = "best"
    write_parts(path, document, tensors)
    result = CliRunner().invoke(app, ["inspect", str(path), *flags])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert str(path) in result.stderr and "'best'" in result.stderr
    assert "Traceback" not in result.stderr


def test_missing_file(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / NAME)])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1 and NAME in result.stderr
