# SPDX-License-Identifier: Apache-2.0
"""Figures and numbers of the model card, made from the exported weights and the training log.

Writes ``curve.png`` (loss against active minutes), ``samples.png`` (samples of every class next to
clips of the data) and logs the held-out velocity error at fixed noise levels.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from dataset import CLASS_NAMES, NUM_CLASSES, class_embeddings, make_clips
from sampling import DEFAULT_SIZE, FOLDER, WEIGHTS, contact_sheet, load_reference_model, sample

log = logging.getLogger("reference_model")

HELD_OUT_SEED: Final[int] = 4_000_000_000
"""Far above every seed that training draws clips from."""
LEVELS: Final[tuple[float, ...]] = (0.1, 0.3, 0.5, 0.7, 0.9)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Entries of a training log by step; where a resumed run repeats a step, the later entry."""
    entries: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        entries[entry["step"]] = entry
    return [entries[step] for step in sorted(entries)]


def draw_curve(entries: list[dict[str, Any]], path: Path) -> None:
    """Write the loss of small, medium and full-size steps, smoothed, and the learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups: dict[str, Callable[[int], bool]] = {
        "under 1000 tokens a clip": lambda n: n < 1000,
        "1000 to 3000": lambda n: 1000 <= n < 3000,
        "over 4000": lambda n: n >= 3000,
    }
    figure, axis = plt.subplots(figsize=(7.5, 4.0), layout="constrained")
    for label, member in groups.items():
        chosen = [e for e in entries if member(e["size"][1] * e["size"][2] * e["size"][3] // 4)]
        if not chosen:
            continue
        minutes, smooth, average = [], [], chosen[0]["loss"]
        for i, entry in enumerate(chosen):
            average += (entry["loss"] - average) * max(0.02, 1.0 / (i + 1))
            minutes.append(entry["active_seconds"] / 60.0)
            smooth.append(average)
        axis.plot(minutes, smooth, label=label, linewidth=1.4)
    axis.set(xlabel="active minutes", ylabel="velocity error (running mean)", yscale="log")
    axis.grid(True, which="both", alpha=0.25)
    rate = axis.twinx()
    rate.plot(
        [e["active_seconds"] / 60.0 for e in entries],
        [e["lr"] for e in entries],
        color="0.6",
        linewidth=1.0,
        linestyle=":",
    )
    rate.set(ylabel="learning rate (dotted)", ylim=(0.0, None))
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@torch.no_grad()
def held_out_error(
    model: torch.nn.Module, size: tuple[int, int, int], clips: int = 8
) -> dict[float, float]:
    """Velocity error on clips that training never saw.

    Args:
        model: the transformer.
        size: ``(T, H, W)`` in pixels.
        clips: number of clips, the classes in turn.

    Returns:
        Mean squared error of the velocity for each noise level of ``LEVELS``.
    """
    classes = torch.arange(clips) % NUM_CLASSES
    clean = make_clips(classes, size, HELD_OUT_SEED)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(HELD_OUT_SEED + 1))
    text = class_embeddings(classes)
    errors = {}
    for level in LEVELS:
        total = 0.0
        for i in range(clips):
            noisy = (1.0 - level) * clean[i : i + 1] + level * noise[i : i + 1]
            timestep = torch.full((1,), 1000.0 * level)
            out = model(noisy, timestep, text[i : i + 1], return_dict=False)[0]
            total += float((out - (noise - clean)[i : i + 1]).square().mean())
        errors[level] = total / clips
    return errors


def draw_samples(model: torch.nn.Module, path: Path, steps: int, guidance: float) -> None:
    """Write samples of every class, each above a clip of the data of the same class.

    The model runs under bfloat16 autocast here, as in training.
    """
    real = make_clips(torch.arange(NUM_CLASSES), DEFAULT_SIZE, HELD_OUT_SEED)
    rows, labels = [], []
    for index, name in enumerate(CLASS_NAMES):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            drawn = sample(model, [index], DEFAULT_SIZE, steps, seed=100 + index, guidance=guidance)
        rows += [drawn[0], real[index]]
        labels += [f"{name}, sample", f"{name}, data"]
        log.info("sampled %s", name)
    contact_sheet(torch.stack(rows), path, frames=8, labels=labels)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path, required=True, help="training_log.jsonl")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the figures")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--only-curve", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    draw_curve(read_log(args.log), args.output / "curve.png")
    if args.only_curve:
        return
    model = load_reference_model(weights=args.weights)
    log.info("%d parameters", sum(p.numel() for p in model.parameters()))
    draw_samples(model, args.output / "samples.png", args.steps, args.guidance)
    log.info("held-out error at %s: %s", DEFAULT_SIZE, held_out_error(model, DEFAULT_SIZE))


if __name__ == "__main__":
    main()
