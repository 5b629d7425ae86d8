"""How good published ways of choosing tiles are: `python -m benchmarks.quality`.

On the trained reference model, at equal density, on one executor, on clips that nothing was fitted
to (`splits.py`). First attention alone: relative squared error of the output, retained mass, Tile
Recall and time. Then whole clips, every self-attention replaced by the rule: PSNR, SSIM and
temporal difference error against the dense clip of the same seed.

Runs in parts: save each with `--json`, then give the files to `--from` to join them in one table
and one set of figures.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .attention_quality import measure_attention
from .clip_quality import CLIP_SEED, STEPS, measure_clips
from .plots import draw
from .recordings import GRID, record, reference_model
from .registry import NAMES, NEED_CALIBRATION, build, calibration_work
from .rule import TILE_SIZE, Rule
from .splits import CALIBRATION, EVALUATION
from .tables import attention_table, clip_table

DENSITIES = (0.05, 0.10, 0.15, 0.20, 0.30)
PROBES = 8
"""Recorded clips of attention alone: each class at two noise levels, each level twice."""
CALIBRATION_CLIPS = 16
WIDTH = 200
"""Columns to print where standard output is no terminal."""


def main(
    density: Annotated[list[float] | None, typer.Option(help="Densities; default: five.")] = None,
    rules: Annotated[
        list[str] | None, typer.Option(help=f"Only these rules of: {', '.join(NAMES)}.")
    ] = None,
    sidecar: Annotated[
        list[Path] | None, typer.Option(help="A *.veda.safetensors file; its name is its label.")
    ] = None,
    clips: Annotated[int, typer.Option(min=0, help="Sampled clips; 0 for none.")] = 8,
    probes: Annotated[int, typer.Option(min=1, help="Recorded clips of attention.")] = PROBES,
    attention_only: Annotated[bool, typer.Option(help="No sampled clips.")] = False,
    clips_only: Annotated[bool, typer.Option(help="No attention alone.")] = False,
    oracles: Annotated[bool, typer.Option(help="Also the oracles, dense each.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the JSON.")] = None,
    saved: Annotated[
        list[Path] | None, typer.Option("--from", help="Measure nothing, join these files.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Folder of the figures.")] = None,
) -> None:
    """Measure rules; the last line is one JSON object."""
    names = [name for name in rules or NAMES if oracles or not name.startswith("oracle")]
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise typer.BadParameter(f"no such rule: {', '.join(unknown)}; there are {list(NAMES)}")
    densities = sorted(density or DENSITIES)
    if not all(0.0 < each <= 1.0 for each in densities):
        raise typer.BadParameter(f"densities {densities}: must be above 0 and at most 1")
    if saved:
        report = join([json.loads(path.read_text()) for path in saved])
    else:
        report = measure(
            names, sidecar or [], densities, 0 if clips_only else probes,
            0 if attention_only else clips, oracles,
        )  # fmt: skip
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    if report["attention"]:
        console.print(attention_table(report["attention"], report["probes"]))
    if report["clips"]:
        console.print(clip_table(report["clips"], report["sampled_clips"]))
    line = json.dumps(report)
    if json_file:
        json_file.write_text(line + "\n")
    if plot:
        draw(report, plot)
    sys.stdout.write(line + "\n")


def measure(
    names: list[str],
    sidecars: list[Path],
    densities: list[float],
    probes: int,
    clips: int,
    oracles: bool,
) -> dict[str, Any]:
    """Everything, with progress bars. Returns what the JSON line says."""
    model = reference_model()
    layers = len(model.blocks)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:

        def task(name: str, total: int) -> Callable[[], None]:
            return partial(bar.advance, bar.add_task(name, total=total))

        fitted = CALIBRATION_CLIPS if any(name in NEED_CALIBRATION for name in names) else 0
        seen, known = task("record", fitted + probes), []
        for sites in record(model, CALIBRATION, fitted):
            known.append(sites)
            seen()
        work = calibration_work(names, fitted, layers)
        rules = build(names, sidecars, known, task("calibrate", work), oracles)
        known.clear()
        attention = []
        if probes:
            recorded = []
            for sites in record(model, EVALUATION, probes):
                recorded.append(sites)
                seen()
            done = task("attention", probes * layers * len(rules))
            attention = measure_attention(rules, recorded, densities, done)
        sampled = _clips(model, rules, clips, densities, layers, task)
    return {
        "benchmark": "quality",
        "attention": [row.to_dict() for row in attention],
        "clips": sampled,
        "probes": probes,
        "sampled_clips": clips,
        "setting": _setting(probes, layers),
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
    }


def _clips(
    model: Any,
    rules: list[Rule],
    clips: int,
    densities: list[float],
    layers: int,
    task: Callable[[str, int], Callable[[], None]],
) -> list[dict[str, object]]:
    if not clips:
        return []
    done = task("clips", clips * (2 + len(rules) * len(densities)))
    return [row.to_dict() for row in measure_clips(model, rules, clips, densities, layers, done)]


def _setting(probes: int, layers: int) -> dict[str, Any]:
    """What was measured on."""
    return {
        "model": "examples/reference_model",
        "grid": list(GRID),
        "layers": layers,
        "tile_size": TILE_SIZE,
        "dtype": "float32",
        "executor": "cpu",
        "probes": EVALUATION.probes(probes),
        "steps": STEPS,
        "guidance": 1.0,
        "first_clip_seed": CLIP_SEED,
        "clip_classes": list(EVALUATION.classes),
    }


def join(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of several runs; of rows for the same rule and density the last counts.

    Raises BadParameter where they were measured on different numbers of clips.
    """
    joined = dict(reports[0])
    for part, count in (("attention", "probes"), ("clips", "sampled_clips")):
        with_rows = [report for report in reports if report[part]]
        if len({report[count] for report in with_rows}) > 1:
            raise typer.BadParameter(f"the files differ in {count}: run them with as many each")
        rows = {(r["rule"], r["density"]): r for report in with_rows for r in report[part]}
        joined[part] = list(rows.values())
        joined[count] = with_rows[0][count] if with_rows else 0
    return joined


if __name__ == "__main__":
    typer.run(main)
