"""One process of the warm cache test: compile with Inductor, run, save what came out.

Arguments: how ("whole" or "regional"), the sidecar, the file for the outputs and the report.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from small_transformers import run, wan, wan_inputs
from torch._dynamo.utils import counters

import veda_compile

GRID = (4, 8, 12)


def main(how: str, sidecar: str, result: str) -> None:
    model: Any = wan(layers=2)
    options = {"sidecar": sidecar, "min_tokens": 0, "executor": "reference"}
    if how == "whole":
        call = torch.compile(model, backend="veda", options=options)
    else:
        model.compile_repeated_blocks(backend="veda", options=options)
        call = model
    out = run(call, wan_inputs(GRID))
    sparse = [site for site in veda_compile.report().sites if site.rewritten]
    layers = [name for site in sparse for name in site.layers]
    found = {name: dict(counters[name]) for name in ("inductor", "aot_autograd")}
    torch.save({"out": out, "layers": layers, "counters": found}, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
