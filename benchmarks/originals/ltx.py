"""The style of the original LTX-Video code.

Video arrives as packed tokens with their coordinates (B, 3, N); rotary frequencies are computed
from them in the model; an attention processor chooses among kernels; a mask per layer can skip the
attention of some samples; blocks can run under activation checkpointing.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.originals.parts import (
    TEXT,
    Built,
    Grid,
    Original,
    RMSNorm,
    feed_forward,
    sinusoids,
)

WIDTH, HEADS = 48, 2


def rotary(coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3, N) fractional coordinates -> cosines and sines (B, N, C), axes interleaved."""
    largest = (20.0, 2048.0, 2048.0)
    fractions = torch.stack([coordinates[:, i] / largest[i] for i in range(3)], dim=-1)
    rates = torch.linspace(0.0, 1.0, WIDTH // 6, dtype=torch.float32)
    rates = 10000.0**rates * torch.pi / 2
    angles = (rates * (fractions.unsqueeze(-1) * 2 - 1)).transpose(-1, -2).flatten(2)
    return angles.cos().repeat_interleave(2, dim=-1), angles.sin().repeat_interleave(2, dim=-1)


def rotate(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """(B, N, C) rotated over all heads at once."""
    cos, sin = turns
    pairs = x.view(*x.shape[:-1], -1, 2)
    first, second = pairs.unbind(dim=-1)
    quarter = torch.stack((-second, first), dim=-1).flatten(-2)
    return x * cos + quarter * sin


class Processor:
    """How attention is computed: by torch, as nothing else is at hand."""

    tpu = False

    def __call__(
        self,
        attn: Attention,
        x: Tensor,
        context: Tensor | None,
        mask: Tensor | None,
        turns: tuple[Tensor, Tensor] | None,
        skip: Tensor | None,
    ) -> Tensor:
        """(B, N, C) -> (B, N, C). skip: (B,), 0 where a sample keeps its values instead."""
        batch = x.shape[0]
        if mask is not None and not self.tpu:
            mask = mask.repeat_interleave(HEADS, dim=0).view(batch, HEADS, -1, mask.shape[-1])
        source = x if context is None else context
        q, k, v = attn.q_norm(attn.to_q(x)), attn.k_norm(attn.to_k(source)), attn.to_v(source)
        if turns is not None:
            q, k = rotate(q, turns), rotate(k, turns)
        values = v
        shape = (batch, -1, HEADS, WIDTH // HEADS)
        q, k, v = (part.view(shape).transpose(1, 2) for part in (q, k, v))
        if self.tpu:
            raise NotImplementedError("flash attention of TPUs")
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False
        )
        out = out.transpose(1, 2).reshape(batch, -1, WIDTH).to(q.dtype)
        if skip is not None:
            keep = skip.view(batch, 1, 1)
            out = out * keep + values * (1.0 - keep)
        return attn.to_out(out)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Projections of an attention, computed by a processor."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.q_norm, self.k_norm = RMSNorm(WIDTH), RMSNorm(WIDTH)
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0))
        self.processor = Processor()

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        turns: tuple[Tensor, Tensor] | None = None,
        skip: Tensor | None = None,
    ) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.processor(self, x, context, mask, turns, skip)


class Block(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward; one table of modulation."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2, self.ff = Attention(), Attention(), feed_forward(WIDTH)
        self.table = nn.Parameter(torch.randn(6, WIDTH) / WIDTH**0.5)

    def forward(
        self,
        x: Tensor,
        turns: tuple[Tensor, Tensor],
        prompt: Tensor,
        prompt_bias: Tensor,
        time: Tensor,
        skip: Tensor | None,
    ) -> Tensor:
        """x: (B, N, C); time: (B, 1 or N, 6 C)."""
        ada = self.table[None, None] + time.reshape(x.shape[0], time.shape[1], 6, -1)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = ada.unbind(dim=2)
        y = F.rms_norm(x, (WIDTH,)) * (1 + scale) + shift
        x = self.attn1(y, turns=turns, skip=skip) * gate + x
        x = self.attn2(x, context=prompt, mask=prompt_bias) + x
        y = F.rms_norm(x, (WIDTH,)) * (1 + ff_scale) + ff_shift
        return self.ff(y) * ff_gate + x  # type: ignore[no-any-return]


class LTXStyle(nn.Module):
    """The model; latents are packed (B, N, 4)."""

    def __init__(self, checkpointed: bool, layers: int = 2) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.patchify_proj = nn.Linear(4, WIDTH)
        self.caption_projection = nn.Linear(16, WIDTH)
        self.time_embed = nn.Linear(32, 6 * WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.proj_out = nn.Linear(WIDTH, 4)

    def forward(
        self,
        x: Tensor,
        coordinates: Tensor,
        prompt: Tensor,
        prompt_mask: Tensor,
        time: Tensor,
        skip: Tensor | None = None,
    ) -> Tensor:
        """x: (B, N, 4); coordinates: (B, 3, N); skip: (layers, B) or None."""
        bias = ((1 - prompt_mask.to(x.dtype)) * -10000.0).unsqueeze(1)
        x = self.patchify_proj(x)
        turns = rotary(coordinates)
        waves = sinusoids(32, time.flatten()).to(x.dtype)
        ada = self.time_embed(waves).view(x.shape[0], -1, 6 * WIDTH)
        prompt = self.caption_projection(prompt).view(x.shape[0], -1, WIDTH)
        for i, block in enumerate(self.blocks):
            given = (x, turns, prompt, bias, ada, None if skip is None else skip[i])
            if self.checkpointed:
                x = checkpoint(lambda *inputs, b=block: b(*inputs), *given, use_reentrant=False)
            else:
                x = block(*given)
        return self.proj_out(F.layer_norm(x, (WIDTH,)))  # type: ignore[no-any-return]


def _build(grid: Grid, batch: int = 1, checkpointed: bool = False, skipping: bool = False) -> Built:
    t, h, w = grid
    axes = torch.meshgrid(*(torch.arange(n).float() for n in grid), indexing="ij")
    coordinates = torch.stack([axis.reshape(-1) for axis in axes])
    scaled = coordinates * torch.tensor([8 / 25, 32.0, 32.0])[:, None]
    mask = torch.ones(batch, TEXT)
    mask[:, TEXT - 3 :] = 0
    inputs = {
        "x": torch.randn(batch, t * h * w, 4),
        "coordinates": scaled.expand(batch, 3, -1).contiguous(),
        "prompt": torch.randn(batch, TEXT, 16),
        "prompt_mask": mask,
        "time": torch.full((batch,), 500.0),
    }
    if skipping:
        inputs["skip"] = torch.tensor([[1.0] * batch, [1.0] * (batch - 1) + [0.0]])
    return LTXStyle(checkpointed), inputs


_CROSS = {"CROSS_ATTENTION": 2}

STYLES = (
    Original("ltx original", _build, 2, _CROSS),
    Original("ltx original, skipped layers", partial(_build, batch=2, skipping=True), 2, _CROSS),
    Original("ltx original, checkpointed", partial(_build, checkpointed=True), 2, _CROSS),
)
