"""Attention over a video with masks, biases and weights that make it more than plain softmax."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compiling import run
from odd_attention import H, Odd, W, name_of, odd, sdpa
from torch import Tensor
from toys import TOKENS, latents

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def block_causal(model: Odd, x: Tensor) -> Tensor:
    frame = torch.arange(TOKENS) // (H * W)
    return sdpa(*model.qkv(model.tokens(x)), attn_mask=frame[:, None] >= frame[None, :])


def neighbours_in_time(model: Odd, x: Tensor) -> Tensor:
    frame = torch.arange(TOKENS) // (H * W)
    near = (frame[:, None] - frame[None, :]).abs() <= 1
    return sdpa(*model.qkv(model.tokens(x)), attn_mask=near[None, None])


def alibi(model: Odd, x: Tensor) -> Tensor:
    place = torch.arange(TOKENS, dtype=torch.float32)
    slopes = torch.tensor([0.5, 0.25])[None, :, None, None]
    return sdpa(*model.qkv(model.tokens(x)), attn_mask=-slopes * (place[:, None] - place).abs())


def relative_bias(model: Odd, x: Tensor) -> Tensor:
    q, k, v = model.qkv(model.tokens(x))
    bias = model.learned[..., :1] - model.learned[..., :1].mT
    return torch.softmax(q @ k.mT * 0.25 + bias[:, None], -1) @ v


def per_head_mask(model: Odd, x: Tensor) -> Tensor:
    keep = torch.ones(1, 2, 1, TOKENS, dtype=torch.bool)
    keep[:, 1, :, TOKENS // 2 :] = False
    return sdpa(*model.qkv(model.tokens(x)), attn_mask=keep)


def sigmoid_attention(model: Odd, x: Tensor) -> Tensor:
    q, k, v = model.qkv(model.tokens(x))
    return torch.softmax(torch.sigmoid(q @ k.mT), -1) @ v


def softmax_over_queries(model: Odd, x: Tensor) -> Tensor:
    q, k, v = model.qkv(model.tokens(x))
    return torch.softmax(q @ k.mT, -2) @ v


def temperature_per_token(model: Odd, x: Tensor) -> Tensor:
    q, k, v = model.qkv(model.tokens(x))
    return torch.softmax((q @ k.mT) * torch.linspace(0.1, 1.0, TOKENS), -1) @ v


def weights_are_used(model: Odd, x: Tensor) -> Tensor:
    q, k, v = model.qkv(model.tokens(x))
    weights = torch.softmax(q @ k.mT * 0.25, -1)
    return (weights @ v) * weights.amax(-1, keepdim=True)


def sharpened(model: Odd, x: Tensor) -> Tensor:
    q, k, v = model.qkv(model.tokens(x))
    weights = torch.softmax(q @ k.mT * 0.25, -1)
    return (weights / weights.sum(-2, keepdim=True)) @ v


def null_key(model: Odd, x: Tensor) -> Tensor:
    """One more key of logit 0 and value 0: every row may attend to nothing."""
    q, k, v = model.qkv(model.tokens(x))
    logits = F.pad(q @ k.mT * 0.25, (0, 1))
    return torch.softmax(logits, -1)[..., :-1] @ v


def capped_logits(model: Odd, x: Tensor) -> Tensor:
    q, k, v = model.qkv(model.tokens(x))
    return torch.softmax(torch.tanh(q @ k.mT * 0.1) * 2.5, -1) @ v


MASKED = [
    block_causal, neighbours_in_time, alibi, relative_bias, per_head_mask, sigmoid_attention,
    softmax_over_queries, temperature_per_token, sharpened, null_key,
    capped_logits,
]  # fmt: skip


@pytest.mark.parametrize("attend", MASKED, ids=name_of)
def test_more_than_plain_attention(attend: Callable[..., Tensor]) -> None:
    out, sites = run(odd(attend), latents(), density=0.3)
    assert [site for site in sites if site.rewritten] == []
    assert torch.equal(out, odd(attend)(latents()))


def test_weights_with_another_use_stay_what_they_are() -> None:
    out, _ = run(odd(weights_are_used), latents())
    torch.testing.assert_close(out, odd(weights_are_used)(latents()), atol=2e-5, rtol=0.0)
