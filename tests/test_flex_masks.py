"""flex_attention under block masks made in the graph: padding is understood, patterns are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiling import run, sparse_calls
from torch import Tensor, nn
from torch.nn.attention.flex_attention import (
    BlockMask,
    create_block_mask,
    flex_attention,
)
from toys import latents

from veda_compile import Extra, Layout, Video, sparse_attention

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:flex_attention called without"),
]

GRID, TEXT = (5, 6, 10), 12
VIDEO, TOKENS = 300, 312  # three blocks of 128 tokens, the last one ragged
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Model(nn.Module):
    """Two layers over a (B, 4, T, H, W) video and the text behind it."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.embed, self.text = nn.Linear(4, 32), nn.Linear(4, 32)
        self.qkv = nn.ModuleList(nn.Linear(32, 96) for _ in range(2))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        video = self.embed(x.flatten(2).transpose(1, 2))
        tokens = torch.cat([video, self.text(text)], 1)
        valid = F.pad(mask, (VIDEO, 0), value=True)
        for layer in self.qkv:
            heads = layer(F.layer_norm(tokens, (32,))).unflatten(-1, (3, 2, 16))
            q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
            tokens = tokens + self.attend(q * 3.0, k, v, valid).transpose(1, 2).flatten(2)
        return tokens


def model(attend: Attend) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model(attend).eval().requires_grad_(False)


def inputs(*counts: int) -> tuple[Tensor, Tensor, Tensor]:
    words = torch.randn(len(counts), TEXT, 4, generator=torch.Generator().manual_seed(2))
    return (
        latents(GRID, batch=len(counts)),
        words,
        torch.arange(TEXT) < torch.tensor(counts)[:, None],
    )


def over(make: Callable[[Tensor], Any], **sizes: Any) -> Attend:
    """flex_attention by the mask function that `make` returns for (B, N) valid tokens."""

    def attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        given = {"B": q.shape[0], "H": None, "Q_LEN": TOKENS, "KV_LEN": TOKENS, **sizes}
        blocks = create_block_mask(make(valid), device="cpu", **given)
        return flex_attention(q, k, v, block_mask=blocks)

    return attend


def as_diffusers_does(valid: Tensor) -> Any:
    mask = valid[:, None, None].expand(valid.shape[0], 2, TOKENS, TOKENS)
    return lambda b, h, i, j: mask[b, h, i, j]


def by_row(valid: Tensor) -> Any:
    return lambda b, h, i, j: valid[b, j]


def by_two(valid: Tensor) -> Any:
    even, wide = torch.arange(TOKENS) % 2 == 0, valid[:, None, None]
    always = even | ~even
    return lambda b, h, i, j: wide[b, 0, 0, j] & always[j]


def by_both(valid: Tensor) -> Any:
    return lambda b, h, i, j: valid[b, i] & valid[b, j]


PADDING = {
    "as diffusers does": over(as_diffusers_does),
    "row": over(by_row),
    "all heads": over(by_row, H=2),
    "small blocks": over(by_row, BLOCK_SIZE=64),
    "two tensors": over(by_two),
    "queries too": over(by_both),
}


@pytest.mark.parametrize("attend", PADDING.values(), ids=PADDING)
def test_padding_is_key_validity(attend: Attend) -> None:
    x = inputs(9, 0)
    with sparse_calls() as calls:
        out, sites = run(model(attend), *x)
    assert [(s.grid, s.layout) for s in sites] == [(GRID, "video 300 + extra 12")] * 2, sites
    for call, _ in calls:
        assert call.key_valid is not None
        assert call.key_valid.sum(1).tolist() == [VIDEO + 9, VIDEO]
    torch.testing.assert_close(out, model(attend)(*x), atol=2e-5, rtol=0.0)


@pytest.mark.parametrize("executor", ["cpu", "reference"])
def test_sparse_is_the_sparse_reference_on_the_true_grid(executor: str) -> None:
    x, attend = inputs(9, 4), over(as_diffusers_does)
    with sparse_calls() as calls:
        out, _ = run(model(attend), *x, density=0.3, executor=executor, inner="aot_eager")
    plan = calls[0][0].plan

    def reference(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        layout = Layout.of(Video(*GRID), Extra(TEXT))
        return sparse_attention(
            q, k, v, layout=layout, plan=plan, key_valid=valid, executor="reference"
        )

    torch.testing.assert_close(out, model(reference)(*x), atol=2e-5, rtol=0.0)
    assert (out - model(attend)(*x)).abs().max() > 1e-3


def window(valid: Tensor) -> Any:
    return lambda b, h, i, j: (i - j).abs() < 100


def window_and_padding(valid: Tensor) -> Any:
    return lambda b, h, i, j: valid[b, j] & ((i - j).abs() < 100)


def causal(valid: Tensor) -> Any:
    return lambda b, h, i, j: i >= j


def near_frames(valid: Tensor) -> Any:
    frame = torch.arange(TOKENS) // 60
    near = (frame[:, None] - frame).abs() < 2
    return lambda b, h, i, j: near[i, j]


def itself_always(valid: Tensor) -> Any:
    return lambda b, h, i, j: valid[b, j] | (i == j)


def video_keys_by_place(valid: Tensor) -> Any:
    return lambda b, h, i, j: j >= 60


def other_per_head(valid: Tensor) -> Any:
    mask = torch.stack([valid, torch.ones_like(valid)], 1)
    return lambda b, h, i, j: mask[b, h, j]


def the_next_one(valid: Tensor) -> Any:
    return lambda b, h, i, j: valid[b, (j + 1) % TOKENS]


def listed_for_other_keys(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """Blocks of the first 200 keys, and a mask function for all."""
    first = valid & (torch.arange(TOKENS) < 200)
    made = create_block_mask(
        lambda b, h, i, j: first[b, j], q.shape[0], None, TOKENS, TOKENS, "cpu"
    )
    blocks = BlockMask.from_kv_blocks(
        made.kv_num_blocks, made.kv_indices, made.full_kv_num_blocks, made.full_kv_indices,
        mask_mod=lambda b, h, i, j: valid[b, j], seq_lengths=(TOKENS, TOKENS),
    )  # fmt: skip
    return flex_attention(q, k, v, block_mask=blocks)


def written_since(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    held = valid & (torch.arange(TOKENS) < 200)
    made = create_block_mask(lambda b, h, i, j: held[b, j], q.shape[0], None, TOKENS, TOKENS, "cpu")
    held.fill_(True)
    return flex_attention(q, k, v, block_mask=made)


TRAPS = {
    "window": over(window),
    "window and padding": over(window_and_padding),
    "causal": over(causal),
    "near frames": over(near_frames),
    "itself": over(itself_always),
    "place": over(video_keys_by_place),
    "per head": over(other_per_head),
    "next": over(the_next_one),
    "lists of the first sample": over(by_row, B=None),
    "other lists": listed_for_other_keys,
    "written": written_since,
}


@pytest.mark.parametrize("attend", TRAPS.values(), ids=TRAPS)
def test_other_patterns_stay(attend: Attend) -> None:
    x = inputs(9, 0)
    out, sites = run(model(attend), *x, density=0.3)
    assert {site.reason for site in sites} <= {"BLOCK_MASK", "MASK_NOT_A_KEY_LENGTH"}, sites
    assert len(sites) == 2
    assert torch.equal(out, model(attend)(*x))
