"""Dense against veda on the reference model: the same seeds, timed, measured and pictured.

Both models go through torch.compile with the same inner compiler. The last line on standard output
is one JSON object.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _demo_attention import AttentionTimes, record_attention, time_attention
from _demo_media import write_contact_sheet, write_side_by_side
from _demo_plans import write_plans
from _demo_sampling import Setup, TimedModel, generate_both, warm_up
from reference_model.dataset import CLASS_NAMES
from reference_model.sampling import DEFAULT_SIZE, FOLDER, WEIGHTS, load_reference_model
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

import veda_compile
from veda_compile.kernels.break_even import break_even_tokens
from veda_compile.metrics import psnr, ssim, temporal_difference_error
from veda_compile.options import Options
from veda_compile.report import SiteRecord

SIDECAR = FOLDER / "distilled.veda.safetensors"
"""Per-head plans of the reference model, written by distill_reference.py."""

FIRST_SEED = 5000
"""Distillation took seeds below."""

DENSITY = 0.3
STEPS = 20
CLIPS = 3
GUIDANCE = 1.0
"""1 takes the condition as it is: one forward pass a step, as in distilled models."""

WIDTH_OF_FILES = 120
"""Columns to print where standard output is no terminal."""


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON line alone.")] = False,
    density: Annotated[float, typer.Option(help="Share of key tiles kept, mean.")] = DENSITY,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps per clip.")] = STEPS,
    clips: Annotated[int, typer.Option(min=1, help="Clips to generate.")] = CLIPS,
    device: Annotated[str, typer.Option(help="cpu or cuda; auto takes cuda if there.")] = "auto",
    sidecar: Annotated[
        str,
        typer.Option(help="A *.veda.safetensors file; auto: the reference model's own; none."),
    ] = "auto",
    output: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("demo_output"),
    model: Annotated[Path, typer.Option(help="Folder of a diffusers Wan transformer.")] = WEIGHTS,
    size: Annotated[
        tuple[int, int, int], typer.Option(help="Frames, height and width in pixels.")
    ] = DEFAULT_SIZE,
    seed: Annotated[int, typer.Option(help="Seed of the first clip.")] = FIRST_SEED,
    inner: Annotated[
        str, typer.Option(help="Inner compiler of both: inductor, aot_eager or eager.")
    ] = "inductor",
) -> None:
    """Generate the same clips dense and with veda, and show what differs in time and in picture."""
    if not (model / "config.json").is_file():
        raise typer.BadParameter(f"{model} holds no config.json: give a model's folder as --model")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    on = torch.device(device)
    setup = Setup(
        size, steps, clips, seed, GUIDANCE, on,
        torch.bfloat16 if on.type == "cuda" else torch.float32,
    )  # fmt: skip
    if sidecar == "auto":
        sidecar = str(SIDECAR) if model == WEIGHTS else "none"
    options: dict[str, Any] = {
        "inner": inner,
        "density": density,
        "sidecar": None if sidecar == "none" else sidecar,
    }
    console = Console(quiet=as_json)
    if not console.is_terminal:
        console.width = WIDTH_OF_FILES
    result = run(setup, model, options, output, console)
    Console().out(json.dumps(result), highlight=False)


def run(
    setup: Setup, folder: Path, options: dict[str, Any], output: Path, console: Console
) -> dict[str, Any]:
    """The whole demo. Returns what the JSON line says."""
    torch.manual_seed(setup.seed)
    network = load_reference_model(setup.dtype, setup.device, folder)
    tokens = _tokens(network, setup.size)
    console.print(
        f"{setup.clips} clips of {'x'.join(map(str, setup.size))} pixels, {tokens} video tokens, "
        f"{setup.steps} steps, guidance {setup.guidance}, {setup.dtype} on {setup.device.type}"
    )
    least = break_even_tokens(setup.device.type)
    if tokens < least:
        options["min_tokens"] = 0
        console.print(
            f"[yellow]{tokens} tokens are below the break-even of {least} on {setup.device.type}, "
            "where the backend would stay dense; min_tokens=0 makes it go sparse all the same."
        )
    console.print(f"torch.compile(model, backend='veda', options={options})")

    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, disable=console.quiet,
    )  # fmt: skip
    with bar:
        compiling = bar.add_task("compile and warm up", total=2)
        sampling = bar.add_task(
            "sample, a dense and a veda step in turn", total=2 * setup.clips * setup.steps
        )
        measuring = bar.add_task("attention alone", total=None)

        def advance(task: TaskID) -> None:
            bar.advance(task)

        dense = TimedModel(
            torch.compile(network, backend=options["inner"]), setup.device, keep=setup.steps // 2
        )
        compile_dense = warm_up(dense.model, setup)
        advance(compiling)
        veda_compile.reset_report()
        sparse = TimedModel(torch.compile(network, backend="veda", options=options), setup.device)
        compile_sparse = warm_up(sparse.model, setup)
        advance(compiling)

        pictures, drafts = generate_both(dense, sparse, setup, lambda: advance(sampling))
        sites = _self_attention()
        calls = record_attention(network, dense.kept)
        bar.update(measuring, total=len(sites))
        attention = time_attention(
            calls, sites, Options.from_dict(options), lambda: advance(measuring)
        )

    console.print(veda_compile.report().table())
    result = summarise(dense, sparse, attention, sites, pictures, drafts)
    result |= {
        "compile_dense_s": round(compile_dense, 1),
        "compile_veda_s": round(compile_sparse, 1),
        "video_tokens": tokens,
        "size": setup.size,
        "steps": setup.steps,
        "clips": setup.clips,
        "device": setup.device.type,
        "options": options,
    }
    console.print(results_table(result))
    names = [CLASS_NAMES[setup.class_of(clip)] for clip in range(setup.clips)]
    written = [
        write_side_by_side(pictures, drafts, output / "side_by_side.mp4"),
        write_contact_sheet(pictures, drafts, names, output / "contact_sheet.png"),
    ]
    if any(site.rewritten for site in sites):
        chosen = Options.from_dict(options)
        written.append(write_plans(calls, sites, chosen, output / "plans.png"))
    for path in written:
        console.print(f"wrote {path}")
    return result


def summarise(
    dense: TimedModel,
    sparse: TimedModel,
    attention: AttentionTimes,
    sites: list[SiteRecord],
    pictures: torch.Tensor,
    drafts: torch.Tensor,
) -> dict[str, Any]:
    """Times, speed-ups and quality; null for a PSNR without any error.

    pictures: the dense clips, drafts: veda's, both (B, 3, T, H, W).
    """
    kept = [site.density for site in sites if site.density is not None]
    totals = veda_compile.report().to_dict()["totals"]
    decibels = psnr(drafts, pictures)
    return {
        "sites": totals["sites"],
        "rewritten": totals["rewritten"],
        "density": round(sum(kept) / len(kept), 4) if kept else 1.0,
        "executor": next((site.executor for site in sites if site.rewritten), None),
        "step_dense_s": round(dense.step, 5),
        "step_veda_s": round(sparse.step, 5),
        "speedup_step": round(dense.step / sparse.step, 3),
        "attention_dense_s": round(attention.dense, 5),
        "attention_veda_s": round(attention.sparse, 5),
        "speedup_attention": round(attention.dense / attention.sparse, 3),
        "attention_share": round(attention.dense / dense.step, 3),
        "psnr_db": _finite(float(decibels.mean())),
        "psnr_db_worst": _finite(float(decibels.min())),
        "ssim": round(float(ssim(drafts, pictures).mean()), 4),
        "temporal_difference_error": round(
            float(temporal_difference_error(drafts, pictures).mean()), 5
        ),
    }


def results_table(result: dict[str, Any]) -> Table:
    """What `summarise` found, for people."""
    table = Table(
        title="dense against veda: medians over all steps, compiling left out",
        caption="the dense model compiles first, so its first call also starts the compiler",
    )
    for column in ("", "dense", "veda", "speed-up"):
        table.add_column(column, justify="left" if not column else "right")
    for label, key in (("step", "step"), ("attention alone, all layers", "attention")):
        dense, sparse = (f"{1e3 * result[f'{key}_{side}_s']:.1f} ms" for side in ("dense", "veda"))
        table.add_row(label, dense, sparse, f"{result[f'speedup_{key}']:.2f}x")
    table.add_row(
        "first call, with compiling",
        f"{result['compile_dense_s']:.1f} s",
        f"{result['compile_veda_s']:.1f} s",
    )
    table.add_section()
    table.add_row("attention's share of a dense step", f"{result['attention_share']:.0%}")
    table.add_row("density", "1", f"{result['density']:.3f}")
    table.add_row("PSNR against dense, mean", "", _decibels(result["psnr_db"]))
    table.add_row("PSNR against dense, worst clip", "", _decibels(result["psnr_db_worst"]))
    table.add_row("SSIM against dense", "", f"{result['ssim']:.4f}")
    table.add_row("temporal difference error", "", f"{result['temporal_difference_error']:.4f}")
    return table


def _tokens(network: Any, size: tuple[int, int, int]) -> int:
    """Video tokens of a clip."""
    return math.prod(
        side // patch for side, patch in zip(size, network.config.patch_size, strict=True)
    )


def _self_attention() -> list[SiteRecord]:
    """The report's attention calls without those to the text."""
    return [site for site in veda_compile.report().sites if site.reason != "CROSS_ATTENTION"]


def _finite(value: float) -> float | None:
    return round(value, 2) if math.isfinite(value) else None


def _decibels(value: float | None) -> str:
    return "equal" if value is None else f"{value:.2f} dB"


if __name__ == "__main__":
    typer.run(main)
