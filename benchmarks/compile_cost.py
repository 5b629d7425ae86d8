"""What the passes cost at compile time: `python -m benchmarks.compile_cost [--json]`.

Two measurements. A small Wan of many layers is compiled with Inductor: how much of the backend's
time is ours. And the graph of the real Wan2.1-14B, traced without weights, is analysed: seconds and
memory. Exits with status 1 if a bar is missed.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from rich.console import Console
from rich.table import Table
from torch import fx

from veda_compile.backend import veda
from veda_compile.options import Options
from veda_compile.passes.analyse import analyse
from veda_compile.passes.owned_graph import own_copy
from veda_compile.planner import Planner

SHARE_BAR = 0.05
"""Most of Inductor's compile time that the passes may add."""

SECONDS_BAR, GIGABYTES_BAR = 3.0, 1.0
"""For the analysis of Wan2.1-14B."""

RUNS = 3
"""What takes little time is measured so often; the least counts. Inductor is measured once."""


@dataclass(frozen=True)
class Cost:
    """Seconds of one compilation. rewrite: with plans and report. inductor: all the rest."""

    layers: int
    rewritten: int
    copy: float
    analysis: float
    rewrite: float
    inductor: float
    share: float


@dataclass(frozen=True)
class Analysis:
    """The analysis of a real model's graph. gigabytes: None where the system does not tell."""

    layers: int
    tokens: int
    nodes: int
    rewritten: int
    seconds: float
    gigabytes: float | None


def wan(layers: int, heads: int, head_dim: int, ffn: int, text: int) -> WanTransformer3DModel:
    """Wan 2.1 with these sizes, in eval mode."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=head_dim,
        in_channels=16, out_channels=16, text_dim=text, freq_dim=256, ffn_dim=ffn,
        num_layers=layers, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    return model.eval().requires_grad_(False)


def inputs(grid: tuple[int, int, int], text: int, length: int) -> dict[str, Any]:
    """Arguments of one call for a grid of tokens."""
    t, h, w = grid
    return {
        "hidden_states": torch.zeros(1, 16, t, 2 * h, 2 * w),
        "timestep": torch.full((1,), 500),
        "encoder_hidden_states": torch.zeros(1, length, text),
        "return_dict": False,
    }


def trace(model: torch.nn.Module, given: dict[str, Any], visit: Callable[..., None]) -> None:
    """Hand the graph that Dynamo makes of a call to `visit(graph, example inputs)`."""

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        visit(gm, example_inputs)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(**given)


def compile_cost(layers: int) -> Cost:
    """Compile a small Wan with Inductor and no caches."""
    found: list[Cost] = []

    def visit(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        options = {"min_tokens": 0, "sidecar": None, "executor": "reference"}
        copied, owned = timed(lambda: own_copy(gm), RUNS)
        policy = Planner(Options(min_tokens=0, executor="reference")).policy()
        analysed, findings = timed(lambda: analyse(owned, example_inputs, policy), RUNS)
        alone = {**options, "inner": "eager"}
        ours, _ = timed(lambda: veda(gm, example_inputs, options=alone), RUNS)
        whole, _ = timed(lambda: veda(gm, example_inputs, options=options))
        rewritten = sum(finding.refusal is None for finding in findings)
        rewrite = max(ours - copied - analysed, 0.0)
        inductor = whole - ours
        found.append(Cost(layers, rewritten, copied, analysed, rewrite, inductor, ours / inductor))

    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        trace(wan(layers, 2, 24, 64, 16), inputs((5, 6, 10), 16, 12), visit)
    return found[0]


def analyse_14b() -> Analysis:
    """Analyse the graph of Wan2.1-14B for 81 frames of 720 x 1280: 21 x 45 x 80 tokens."""
    grid = (21, 45, 80)
    found: list[Analysis] = []

    def visit(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        policy = Planner(Options(min_tokens=0, executor="reference")).policy()
        owned = own_copy(gm)
        gc.collect()
        before = reset_peak()
        seconds, findings = timed(lambda: analyse(owned, example_inputs, policy), RUNS)
        after = peak()
        used = None if before is None or after is None else (after - before) / 1e9
        layouts = [finding.layout for finding in findings if finding.refusal is None]
        tokens = sum(run.length for run in layouts[0].videos) if layouts and layouts[0] else 0
        nodes = len(list(owned.graph.nodes))
        found.append(Analysis(40, tokens, nodes, len(layouts), seconds, used))

    with torch.device("meta"):
        model, given = wan(40, 40, 128, 13824, 4096), inputs(grid, 4096, 512)
    trace(model, given, visit)
    return found[0]


def timed(work: Callable[[], Any], runs: int = 1) -> tuple[float, Any]:
    """Seconds a call takes, the least of some runs, and its result."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def reset_peak() -> int | None:
    """Start a new high-water mark of this process's memory; bytes in use. None if not Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return peak()


def peak() -> int | None:
    """The most bytes of memory in use since the last reset; None if not Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(lines[0].split()[1]) * 1024


def table(cost: Cost, analysis: Analysis) -> Table:
    """Both measurements for people."""
    shown = Table(title="What the passes cost")
    for column in ("what", "measured", "bar"):
        shown.add_column(column)
    shown.add_row(f"Wan, {cost.layers} layers: copy", f"{cost.copy:.2f} s", "")
    shown.add_row("analysis", f"{cost.analysis:.2f} s", "")
    shown.add_row("rewrite, plans, report", f"{cost.rewrite:.2f} s", "")
    shown.add_row("Inductor", f"{cost.inductor:.1f} s", "")
    shown.add_row("ours / Inductor", f"{cost.share:.1%}", f"{SHARE_BAR:.0%}")
    what = f"Wan2.1-14B, {analysis.tokens} tokens, {analysis.nodes} nodes: analysis"
    shown.add_row(what, f"{analysis.seconds:.2f} s", f"{SECONDS_BAR:.0f} s")
    memory = "unknown" if analysis.gigabytes is None else f"{analysis.gigabytes:.2f} GB"
    shown.add_row("its peak memory", memory, f"{GIGABYTES_BAR:.0f} GB")
    return shown


def main(
    only_json: Annotated[bool, typer.Option("--json", help="No table.")] = False,
    layers: Annotated[int, typer.Option(help="Layers of the small Wan.")] = 40,
) -> None:
    """Measure both; the last line is one JSON object."""
    analysis = analyse_14b()
    cost = compile_cost(layers)
    if not only_json:
        Console().print(table(cost, analysis))
    right = (
        cost.rewritten == layers
        and cost.share <= SHARE_BAR
        and analysis.rewritten == analysis.layers
        and analysis.seconds <= SECONDS_BAR
        and (analysis.gigabytes is None or analysis.gigabytes <= GIGABYTES_BAR)
    )
    result = {"compile": asdict(cost), "analysis": asdict(analysis), "right": right}
    sys.stdout.write(json.dumps(result) + "\n")
    raise typer.Exit(0 if right else 1)


if __name__ == "__main__":
    typer.run(main)
