"""`veda explain`: what would become of a model, told from its shapes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import veda_compile
from veda_compile.cli import app

WAN_14B = {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.35.0",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 13824,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "num_attention_heads": 40,
    "num_layers": 40,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
SPARSE = '{"min_tokens": 0, "executor": "reference"}'


def explain(*arguments: str) -> Result:
    torch.compiler.reset()
    veda_compile.reset_report()
    return CliRunner().invoke(app, ["explain", *arguments], env={"COLUMNS": "120"})


def config(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**WAN_14B, **changes}))
    return file


def test_fourteen_billion_parameters_from_a_config(tmp_path: Path) -> None:
    start = time.perf_counter()
    result = explain(str(config(tmp_path)), "--height", "720", "--width", "1280", "--json")
    assert time.perf_counter() - start < 120  # a third of it on an idle machine
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["totals"] == {
        "sites": 80, "rewritten": 40, "left": {"CROSS_ATTENTION": 40}, "missed": 0,
    }  # fmt: skip
    assert found["stopped"] is None
    sparse = [s for s in found["graphs"][0]["sites"] if s["verdict"] == "rewritten"]
    assert {tuple(site["grid"]) for site in sparse} == {(21, 45, 80)}
    assert sparse[0]["executor"] == "triton" and sparse[0]["density"] == pytest.approx(
        0.2, abs=0.05
    )


def test_sizes_of_the_latent_and_a_model_folder(tmp_path: Path) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    config(folder, num_layers=2)
    sizes = ["--latent", "--frames", "5", "--height", "60", "--width", "104"]
    result = explain(str(tmp_path), *sizes, "--options", SPARSE)
    assert result.exit_code == 0, result.output
    assert "5x30x52" in result.stdout and "blocks.0..1.attn1 x2" in result.stdout


def test_dense_layers_and_their_remedy(tmp_path: Path) -> None:
    file = config(tmp_path, num_layers=1, attention_head_dim=80)
    result = explain(str(file))
    assert result.exit_code == 1
    assert "HEAD_DIM" in result.stdout and "-> " in result.stdout


def test_attention_outside_the_graph_and_the_setting_that_helps(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"_class_name": "MochiTransformer3DModel", "num_layers": 2}))
    result = explain(str(file), "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert {entry["layer"] for entry in found["missed"]} == {
        f"transformer_blocks.{place}.attn1" for place in range(2)
    }
    assert all("capture_dynamic" in entry["remedy"] for entry in found["missed"])
    assert "nonzero" in found["stopped"]
    found = json.loads(explain(str(file), "--json", "--dynamic-ops").stdout)
    assert found["missed"] == [] and found["stopped"] is None


def test_a_callable() -> None:
    result = explain("explained_models:good", "--options", SPARSE, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "2 of 2 attention calls rewritten" in result.stdout
    result = explain("explained_models:good", "--device", "cpu")
    assert result.exit_code == 1 and "min_tokens" in result.stdout
    result = explain("explained_models:broken", "--options", SPARSE)
    assert result.exit_code == 1 and "torch.compiler.disable" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explained_models:not_a_model"], ["int", "(model, inputs)"]),
        (["explained_models:failing"], ["calling Model failed", "IndexError"]),
        (["explained_models:nothing"], ["nothing"]),
        (["no_such_module_here:model"], ["no_such_module_here"]),
        (["/no/such/folder"], ["/no/such/folder", "config.json"]),
        (["explained_models:good", "--options", "[1]"], ["--options", "object"]),
        (["explained_models:good", "--options", '{"denstiy": 1}'], ["density"]),
        (["explained_models:good", "--dtype", "float8"], ["--dtype", "bfloat16"]),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: list[str]) -> None:
    result = explain(*arguments)
    assert result.exit_code == 2
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert all(word in result.stderr for word in words), result.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["not a JSON file"]),
        ('{"_class_name": "UNet2DModel"}', ["UNet2DModel", "package.module:callable"]),
        ('{"_class_name": "WanTransformer3DModel", "num_layers": "two"}', ["cannot be built"]),
        ("[]", ["_class_name is None"]),
    ],
)
def test_bad_configs(tmp_path: Path, content: str, words: list[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    result = explain(str(file))
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert all(word in result.stderr for word in words), result.stderr


def test_sides_in_pixels_must_fit(tmp_path: Path) -> None:
    result = explain(str(config(tmp_path, num_layers=1)), "--height", "481")
    assert result.exit_code == 2 and "481" in result.stderr and "16" in result.stderr
