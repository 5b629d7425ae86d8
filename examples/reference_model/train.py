# SPDX-License-Identifier: Apache-2.0
"""Train the reference model on a CPU: flow matching, a size curriculum, a budget in minutes.

The learning rate and the curriculum follow the *active* seconds spent in steps. A step that took
far longer than its kind usually takes (the process was stopped meanwhile) is not charged in full.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from dataset import NULL_CLASS, NUM_CLASSES, TEXT_DIM, class_embeddings, make_clips
from diffusers import WanTransformer3DModel
from muon import BatchedMuon
from sampling import WEIGHTS, contact_sheet, sample
from torch import Tensor, nn

log = logging.getLogger("reference_model")

MODEL_CONFIG: Final[dict[str, Any]] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": TEXT_DIM,
    "freq_dim": 64,
    "ffn_dim": 768,
    "num_layers": 6,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 64,
}
Kind = tuple[int, int, int, int]
"""Batch, frames, height and width of a training step."""
SMALL: Final[tuple[Kind, ...]] = (
    (10, 4, 20, 20), (8, 4, 24, 24), (6, 4, 24, 32), (6, 4, 32, 24), (5, 8, 20, 20),
    (4, 8, 20, 28), (4, 8, 28, 20),
)  # fmt: skip
MEDIUM: Final[tuple[Kind, ...]] = (
    (3, 8, 24, 24), (3, 8, 24, 32), (3, 8, 32, 24), (3, 12, 20, 24), (2, 16, 20, 20),
    (2, 16, 20, 24), (2, 12, 24, 24),
)  # fmt: skip
LARGE: Final[tuple[Kind, ...]] = (
    (1, 16, 32, 32), (1, 16, 32, 32), (1, 13, 32, 40), (1, 13, 40, 32), (1, 16, 24, 44),
)  # fmt: skip
STAGES: Final[tuple[tuple[float, tuple[float, float, float]], ...]] = (
    (0.28, (1.0, 0.0, 0.0)),
    (0.58, (0.25, 0.75, 0.0)),
    (1.01, (0.05, 0.2, 0.75)),
)
"""Up to this fraction of the budget: chance of a small, a medium and a full-size step."""


@dataclass
class Progress:
    """What a resumed run needs besides tensors."""

    step: int = 0
    active_seconds: float = 0.0
    tokens: int = 0
    clips: int = 0


def build_model(seed: int) -> WanTransformer3DModel:
    """A freshly initialised model: Xavier linears, zero output head and time projection."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(**MODEL_CONFIG)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.condition_embedder.time_proj.weight)
    return model


def build_optimisers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all other parameters."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        hidden = name.startswith("blocks.") and parameter.ndim == 2
        (matrices if hidden else others).append(parameter)
    muon = BatchedMuon(matrices, lr=lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=lr, weight_decay=0.0, betas=(0.9, 0.98), fused=True)
    return [muon, adam]


def learning_rate(fraction: float, step: int, peak: float, warmup: int = 50) -> float:
    """Linear warm-up in steps, flat for a fifth of the budget, then cosine to zero."""
    decay = max(0.0, min(1.0, (fraction - 0.2) / 0.8))
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1.0 + math.cos(math.pi * decay))


def choose_kind(fraction: float, rng: random.Random) -> Kind:
    """Size of the next step, by the stage of the curriculum."""
    weights = next(w for end, w in STAGES if fraction < end)
    group = rng.choices((SMALL, MEDIUM, LARGE), weights=weights)[0]
    return rng.choice(group)


def noise_level(gen: torch.Generator, batch: int, shift: float) -> Tensor:
    """Shifted logit-normal levels with one uniform in eight: float32 ``(batch,)`` in (0, 1)."""
    s = torch.sigmoid(torch.randn(batch, generator=gen))
    s = shift * s / (1.0 + (shift - 1.0) * s)
    uniform = torch.rand(batch, generator=gen)
    return torch.where(torch.rand(batch, generator=gen) < 0.125, uniform, s).clamp(1e-3, 1.0)


def flow_loss(model: nn.Module, kind: Kind, seed: int, autocast: bool) -> Tensor:
    """Mean squared error of the velocity on fresh clips.

    Args:
        model: the transformer.
        kind: batch and size of the clips.
        seed: decides clips, classes, noise and noise levels.
        autocast: run the model under bfloat16 autocast.
    """
    batch, frames, height, width = kind
    gen = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, NUM_CLASSES, (batch,), generator=gen)
    clean = make_clips(classes, (frames, height, width), seed)
    dropped = torch.rand(batch, generator=gen) < 0.1
    text = class_embeddings(torch.where(dropped, NULL_CLASS, classes))
    tokens = frames * height * width // 4
    s = noise_level(gen, batch, 1.6 if tokens < 1500 else 2.2)
    noise = torch.randn(clean.shape, generator=gen)
    level = s.view(-1, 1, 1, 1, 1)
    noisy = (1.0 - level) * clean + level * noise
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        velocity = model(noisy, 1000.0 * s, text, return_dict=False)[0]
    return nn.functional.mse_loss(velocity.float(), noise - clean)


class Clock:
    """Active time: each step counts at most half as much again as its kind usually takes."""

    def __init__(self) -> None:
        """Start without knowing any kind."""
        self._usual: dict[Kind, float] = {}

    def count(self, kind: Kind, seconds: float) -> float:
        """Seconds to charge for a step of this kind that took ``seconds`` on the wall."""
        usual = self._usual.get(kind)
        if usual is None:
            usual = min(seconds, 6.0)
        charged = min(seconds, 1.5 * usual)
        self._usual[kind] = 0.9 * usual + 0.1 * charged
        return charged


def save_checkpoint(
    path: Path,
    model: nn.Module,
    ema: nn.Module,
    optimisers: list[torch.optim.Optimizer],
    progress: Progress,
) -> None:
    """Write the whole training state, and replace the previous one only when it is complete."""
    state = {
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "optimisers": [o.state_dict() for o in optimisers],
        "progress": asdict(progress),
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def export_weights(ema: WanTransformer3DModel, folder: Path) -> None:
    """Save the averaged weights in bfloat16 with ``save_pretrained``."""
    copy = WanTransformer3DModel(**MODEL_CONFIG)
    copy.load_state_dict(ema.state_dict())
    nn.Module.to(copy, torch.bfloat16)
    copy.save_pretrained(str(folder))


def preview(ema: nn.Module, path: Path, size: tuple[int, int, int], steps: int) -> None:
    """Write a contact sheet with one sample of every class."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        clips = sample(ema, range(NUM_CLASSES), size, steps, seed=7)
    contact_sheet(clips, path)
    log.info("preview %s", path)


def train(args: argparse.Namespace) -> None:
    """Run or resume a training until its budget of active minutes is spent."""
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    model = build_model(args.seed)
    ema = build_model(args.seed).requires_grad_(False)
    optimisers = build_optimisers(model, args.lr)
    progress, clock, checkpoint = Progress(), Clock(), work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        progress = Progress(**state["progress"])
        log.info("resumed at step %d", progress.step)
    if args.compile:
        for block in model.blocks:
            block.compile(dynamic=True, fullgraph=True)
    log.info("%d parameters", sum(p.numel() for p in model.parameters()))
    budget = 60.0 * args.minutes
    saved_at = previewed_at = progress.active_seconds
    averaged = list(zip(ema.parameters(), model.parameters(), strict=True))
    with (work / "training_log.jsonl").open("a") as lines:
        while progress.active_seconds < budget:
            began = time.perf_counter()
            fraction = progress.active_seconds / budget
            seed = args.seed * 10_000_000 + progress.step
            kind = choose_kind(fraction, random.Random(seed))
            rate = learning_rate(fraction, progress.step, args.lr)
            for optimiser in optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = rate
            loss = flow_loss(model, kind, seed, args.autocast)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            decay = min(args.ema, (1.0 + progress.step) / (10.0 + progress.step))
            with torch.no_grad():
                torch._foreach_lerp_(
                    [e for e, _ in averaged], [p for _, p in averaged], 1.0 - decay
                )
            progress.step += 1
            progress.clips += kind[0]
            progress.tokens += math.prod(kind) // 4
            progress.active_seconds += clock.count(kind, time.perf_counter() - began)
            entry = {
                "step": progress.step,
                "active_seconds": round(progress.active_seconds, 2),
                "tokens": progress.tokens,
                "size": list(kind),
                "loss": round(loss.item(), 5),
                "grad_norm": round(float(norm), 4),
                "lr": rate,
            }
            lines.write(json.dumps(entry) + "\n")
            if progress.step % 25 == 0:
                lines.flush()
                log.info("%s", entry)
            if progress.active_seconds - saved_at > 60.0 * args.save_minutes:
                save_checkpoint(checkpoint, model, ema, optimisers, progress)
                saved_at = progress.active_seconds
            if progress.active_seconds - previewed_at > 60.0 * args.preview_minutes:
                size = (8, 24, 24) if fraction < 0.6 else (16, 32, 32)
                preview(ema, work / f"preview_{progress.step:06d}.png", size, 16)
                previewed_at = progress.active_seconds
    save_checkpoint(checkpoint, model, ema, optimisers, progress)
    export_weights(ema, args.output)
    log.info("done: %s", asdict(progress))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints, log, previews")
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="folder of the weights")
    parser.add_argument("--minutes", type=float, default=95.0, help="budget of active minutes")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--ema", type=float, default=0.997)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-minutes", type=float, default=4.0)
    parser.add_argument("--preview-minutes", type=float, default=15.0)
    parser.add_argument("--compile", action="store_true", help="compile the transformer blocks")
    parser.add_argument("--no-autocast", dest="autocast", action="store_false")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    warnings.filterwarnings("ignore", message=".*fused implementation.*")
    train(args)


if __name__ == "__main__":
    main()
