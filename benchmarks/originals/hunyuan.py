"""The style of the original HunyuanVideo code.

Blocks of two streams, then of one; q, k and v from one projection, rearranged "B L (K H D) -> K B L
H D"; rotary positions as a pair of cosines and sines on the video part alone; one `attention`
function whose mode is flash attention over packed segments, torch's attention, or a written-out
softmax with a bias.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.originals.flash import flash_attn_varlen_func
from benchmarks.originals.parts import (
    TEXT,
    Built,
    Grid,
    Original,
    RMSNorm,
    axis_rates,
    default_scale,
    feed_forward,
    plain_norm,
    sinusoids,
)

WIDTH, HEADS, HEAD_DIM = 48, 2, 24
AXES = (8, 8, 8)
VALID = TEXT - 3
"""Text tokens that are no padding."""

Turns = tuple[Tensor, Tensor]


def rotary(grid: Grid) -> Turns:
    """Cosines and sines (T * H * W, D), every frequency twice in a row."""
    axes = torch.meshgrid(*(torch.arange(n).double() for n in grid), indexing="ij")
    angles = torch.cat(
        [
            torch.outer(axis.reshape(-1), axis_rates(width, 256.0)).repeat_interleave(2, dim=1)
            for axis, width in zip(axes, AXES, strict=True)
        ],
        dim=1,
    )
    return angles.cos().float(), angles.sin().float()


def rotate(q: Tensor, k: Tensor, turns: Turns) -> tuple[Tensor, Tensor]:
    """(B, N, H, D) queries and keys, rotated in float32."""
    cos, sin = (x.view(1, x.shape[0], 1, x.shape[1]) for x in turns)

    def turn(x: Tensor) -> Tensor:
        real, imag = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
        quarter = torch.stack([-imag, real], dim=-1).flatten(3)
        return (x.float() * cos + quarter * sin).type_as(x)

    return turn(q), turn(k)


def offsets(text_mask: Tensor, video: int) -> Tensor:
    """(2 B + 1,) bounds of the packed batch: video with valid text, then padding, per sample."""
    batch, length = text_mask.shape
    valid = text_mask.sum(dim=1)
    bounds = torch.zeros([2 * batch + 1], dtype=torch.int32)
    for i in range(batch):
        bounds[2 * i + 1] = i * (video + length) + video + valid[i]
        bounds[2 * i + 2] = (i + 1) * (video + length)
    return bounds


def attention(
    q: Tensor, k: Tensor, v: Tensor, mode: str, bounds: Tensor | None, longest: int
) -> Tensor:
    """(B, N, H, D) -> (B, N, H * D)."""
    batch, tokens = q.shape[:2]
    if mode == "flash":
        assert bounds is not None
        packed = (x.view(batch * tokens, *x.shape[2:]) for x in (q, k, v))
        out = flash_attn_varlen_func(*packed, bounds, bounds, longest, longest)
        return out.view(batch, tokens, -1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if mode == "torch":
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0)
    else:
        bias = torch.zeros(batch, q.size(1), tokens, tokens, dtype=q.dtype)
        logits = (q @ k.transpose(-2, -1)) * default_scale(q.size(-1))
        logits += bias
        out = torch.dropout(logits.softmax(dim=-1), p=0.0, train=True) @ v
    return out.transpose(1, 2).reshape(batch, tokens, -1)


def split_heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ "B L (K H D) -> K B L H D" with K = 3."""
    parts = qkv.view(*qkv.shape[:2], 3, HEADS, -1).permute(2, 0, 1, 3, 4)
    return parts[0], parts[1], parts[2]


class Modulation(nn.Module):
    """Shifts, scales and gates from the conditioning vector."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(WIDTH, factor * WIDTH)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        """`factor` tensors (B, 1, C)."""
        return self.linear(F.silu(vec)).unsqueeze(1).chunk(self.factor, dim=-1)  # type: ignore[no-any-return]


class Stream(nn.Module):
    """What a two-stream block has once for video and once for text."""

    def __init__(self) -> None:
        super().__init__()
        self.mod = Modulation(6)
        self.norm1, self.norm2 = plain_norm(WIDTH), plain_norm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = RMSNorm(HEAD_DIM), RMSNorm(HEAD_DIM)
        self.mlp = feed_forward(WIDTH)

    def project(self, x: Tensor, mod: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of shape (B, N, H, D)."""
        q, k, v = split_heads(self.qkv(self.norm1(x) * (1 + mod[1]) + mod[0]))
        return self.q_norm(q).to(v), self.k_norm(k).to(v), v

    def finish(self, x: Tensor, attended: Tensor, mod: tuple[Tensor, ...]) -> Tensor:
        """x after attention and feed-forward, both gated."""
        x = x + self.proj(attended) * mod[2]
        return x + self.mlp(self.norm2(x) * (1 + mod[4]) + mod[3]) * mod[5]


class DoubleBlock(nn.Module):
    """Video and text with weights of their own, attending together."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.img, self.txt = Stream(), Stream()

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, bounds: Tensor | None, turns: Turns
    ) -> tuple[Tensor, Tensor]:
        """img: (B, N, C), txt: (B, L, C)."""
        img_mod, txt_mod = self.img.mod(vec), self.txt.mod(vec)
        img_q, img_k, img_v = self.img.project(img, img_mod)
        img_q, img_k = rotate(img_q, img_k, turns)
        txt_q, txt_k, txt_v = self.txt.project(txt, txt_mod)
        q = torch.cat((img_q, txt_q), dim=1)
        k = torch.cat((img_k, txt_k), dim=1)
        v = torch.cat((img_v, txt_v), dim=1)
        out = attention(q, k, v, self.mode, bounds, q.shape[1])
        img_out, txt_out = out[:, : img.shape[1]], out[:, img.shape[1] :]
        return (
            self.img.finish(img, img_out, img_mod),
            self.txt.finish(txt, txt_out, txt_mod),
        )


class SingleBlock(nn.Module):
    """One stream; attention and feed-forward side by side, out of one projection into one."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.linear1 = nn.Linear(WIDTH, 5 * WIDTH)
        self.linear2 = nn.Linear(3 * WIDTH, WIDTH)
        self.q_norm, self.k_norm = RMSNorm(HEAD_DIM), RMSNorm(HEAD_DIM)
        self.pre_norm, self.modulation = plain_norm(WIDTH), Modulation(3)

    def forward(
        self, x: Tensor, vec: Tensor, text: int, bounds: Tensor | None, turns: Turns
    ) -> Tensor:
        """x: (B, N + L, C); text: L."""
        shift, scale, gate = self.modulation(vec)
        hidden = self.linear1(self.pre_norm(x) * (1 + scale) + shift)
        qkv, mlp = torch.split(hidden, [3 * WIDTH, 2 * WIDTH], dim=-1)
        q, k, v = split_heads(qkv)
        q, k = self.q_norm(q).to(v), self.k_norm(k).to(v)
        img_q, txt_q = q[:, :-text], q[:, -text:]
        img_k, txt_k = k[:, :-text], k[:, -text:]
        img_q, img_k = rotate(img_q, img_k, turns)
        q, k = torch.cat((img_q, txt_q), dim=1), torch.cat((img_k, txt_k), dim=1)
        out = attention(q, k, v, self.mode, bounds, q.shape[1])
        return x + gate * self.linear2(torch.cat((out, F.gelu(mlp, approximate="tanh")), 2))


class Refiner(nn.Module):
    """Self-attention over the prompt, masked between every two tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: (B, L, C), mask: (B, L)."""
        valid = mask.view(mask.shape[0], 1, 1, -1).repeat(1, 1, mask.shape[1], 1).bool()
        both = valid & valid.transpose(2, 3)
        both[:, :, :, 0] = True
        q, k, v = (part.transpose(1, 2) for part in split_heads(self.qkv(x)))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=both)
        return x + self.proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class HunyuanStyle(nn.Module):
    """The model; latents are (B, 4, T, 2 H, 2 W)."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.img_in = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.txt_in, self.refiner = nn.Linear(16, WIDTH), Refiner()
        self.time_in = feed_forward(WIDTH)
        self.double_blocks = nn.ModuleList(DoubleBlock(mode) for _ in range(2))
        self.single_blocks = nn.ModuleList(SingleBlock(mode) for _ in range(2))
        self.final = nn.Linear(WIDTH, 16)

    def forward(
        self, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """Returns latents of the input's size."""
        batch, _, frames, height, width = x.shape
        vec = self.time_in(sinusoids(WIDTH, t).float())
        img = self.img_in(x).flatten(2).transpose(1, 2)
        txt = self.refiner(self.txt_in(text), text_mask)
        tokens = img.shape[1]
        bounds = offsets(text_mask, tokens) if self.mode == "flash" else None
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, bounds, (cos, sin))
        both = torch.cat((img, txt), 1)
        for block in self.single_blocks:
            both = block(both, vec, txt.shape[1], bounds, (cos, sin))
        patches = (batch, frames, height // 2, width // 2, 4, 1, 2, 2)
        out = self.final(both[:, :tokens]).reshape(patches)
        out = torch.einsum("nthwcopq->nctohpwq", out)
        return out.reshape(batch, 4, frames, height, width)


def _build(grid: Grid, mode: str, batch: int = 1, valid: int = VALID) -> Built:
    t, h, w = grid
    mask = torch.zeros(batch, TEXT, dtype=torch.long)
    mask[:, :valid] = 1
    cos, sin = rotary(grid)
    return HunyuanStyle(mode), {
        "x": torch.randn(batch, 4, t, 2 * h, 2 * w),
        "t": torch.full((batch,), 500.0),
        "text": torch.randn(batch, TEXT, 16),
        "text_mask": mask,
        "cos": cos,
        "sin": sin,
    }


STYLES = (
    Original("hunyuan original, torch", partial(_build, mode="torch"), 4, {"TEXT_ONLY": 1},
             last=TEXT),
    Original("hunyuan original, torch batch 2", partial(_build, mode="torch", batch=2), 4,
             {"TEXT_ONLY": 1}, last=TEXT),
    Original("hunyuan original, vanilla", partial(_build, mode="vanilla"), 4, {"TEXT_ONLY": 1},
             last=TEXT),
    Original("hunyuan original, flash", partial(_build, mode="flash"), 4, {"TEXT_ONLY": 1},
             last=TEXT),
    Original("hunyuan original, flash batch 2", partial(_build, mode="flash", batch=2), 4,
             {"TEXT_ONLY": 1}, last=TEXT),
)  # fmt: skip
