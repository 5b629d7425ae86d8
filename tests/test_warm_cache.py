"""Compiled code from another process: the plans are this process's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distinct_sidecars import distinct_plans, save_sidecar
from small_transformers import distance, run_by_hand, wan, wan_inputs
from warm_cache_program import GRID

from veda_compile.kernels.layout import Layout, Video

LAYERS = [f"blocks.{i}.attn1" for i in range(2)]
TOLERANCE = 1e-4
"""Inductor's fused arithmetic differs a little from eager's."""


def in_a_process(how: str, sidecar: str, folder: Path) -> dict[str, Any]:
    """Outputs, layers and cache counters of a fresh process with the caches of `folder`."""
    program = Path(__file__).with_name("warm_cache_program.py")
    result = folder / "result.pt"
    env = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_FORCE_DISABLE_CACHES"}
    env["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")
    env["TORCHINDUCTOR_FX_GRAPH_CACHE"] = env["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "1"
    done = subprocess.run(
        [sys.executable, program, how, sidecar, result], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded: dict[str, Any] = torch.load(result)
    return loaded


def hits(found: dict[str, Any]) -> int:
    return int(found["counters"]["aot_autograd"].get("autograd_cache_hit", 0))


def misses(found: dict[str, Any]) -> int:
    counted = found["counters"]
    return int(
        counted["aot_autograd"].get("autograd_cache_miss", 0)
        + counted["inductor"].get("fxgraph_cache_miss", 0)
    )


@pytest.mark.parametrize("how", ["whole", "regional"])
def test_a_warm_cache_keeps_layers_and_sidecars_apart(tmp_path: Path, how: str) -> None:
    model = wan(layers=2)
    wanted, paths = [], []
    for place in range(2):
        plans = distinct_plans(2, turn=place)
        path = tmp_path / f"{place}.veda.safetensors"
        paths.append(save_sidecar(path, model, LAYERS, plans, [GRID]))
        named = dict(zip(LAYERS, plans, strict=True))
        wanted.append(run_by_hand(model, wan_inputs(GRID), Layout.of(Video(*GRID)), named))
    assert distance(wanted[0], wanted[1]) > 20 * TOLERANCE

    sidecars = (0, 0, 1) if how == "whole" else (0, 1)
    cold, *warm = [in_a_process(how, paths[place], tmp_path) for place in sidecars]
    assert misses(cold) > 0
    for found in warm:
        assert (hits(found) > 0, misses(found)) == (True, 0)
    for found, place in zip((cold, *warm), sidecars, strict=True):
        assert distance(found["out"], wanted[place]) <= TOLERANCE
        assert found["layers"] == LAYERS
