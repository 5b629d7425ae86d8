"""flex_attention: rewritten where its block mask and score provably change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import run
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from toys import GRID, TOKENS, Attend, latents, toy

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:flex_attention called without"),
]

CAUSAL = create_block_mask(lambda b, h, q, k: q >= k, None, None, TOKENS, TOKENS, device="cpu")


def everything(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= 0


def with_lse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, lse = flex_attention(q, k, v, return_lse=True)
    return out * torch.sigmoid(lse)[..., None]


def with_lse_unused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = flex_attention(q, k, v, return_lse=True)[0]
    return out


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v: flex_attention(q, k, v),
        lambda q, k, v: flex_attention(q, k, v, scale=0.3, kernel_options={"BLOCK_M": 64}),
        lambda q, k, v: flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score),
        lambda q, k, v: flex_attention(q, k[:, :1], v[:, :1], enable_gqa=True),
        with_lse_unused,
    ],
    ids=["plain", "scale", "identity score", "grouped", "lse unused"],
)
def test_a_trivial_block_mask_hides_nothing(attend: Attend) -> None:
    model, x = toy(attend, layers=3), latents(batch=2)
    dense = model(x)
    out, sites = run(model, x)
    assert [site.grid for site in sites if site.rewritten] == [GRID] * 3, sites
    torch.testing.assert_close(out, dense, atol=2e-5, rtol=0.0)
    sparse, _ = run(model, x, density=0.3, inner="aot_eager")
    assert (sparse - dense).abs().max() > 1e-3


def listed_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The mask function hides nothing, but only the first of three blocks of keys is listed."""
    counts = torch.ones(1, 1, 3, dtype=torch.int32)
    places = torch.zeros(1, 1, 3, 3, dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(counts, places, BLOCK_SIZE=32, seq_lengths=(TOKENS, TOKENS))
    return flex_attention(q, k, v, block_mask=mask)


@pytest.mark.parametrize(
    ("attend", "reason", "words"),
    [
        (lambda q, k, v: flex_attention(q, k, v, block_mask=CAUSAL), "BLOCK_MASK", "mask_mod"),
        (listed_by_hand, "BLOCK_MASK", "blocks"),
        (lambda q, k, v: flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + 0.1 * (i - j)),
         "PLAIN_SOFTMAX", "score_mod"),
        (with_lse, "OUTPUT_USED", "log-sum-exp"),
    ],
)  # fmt: skip
def test_anything_that_may_change_the_weights_stays(
    attend: Callable[..., Any], reason: str, words: str
) -> None:
    model, x = toy(attend), latents()
    out, sites = run(model, x)
    assert [site.reason for site in sites] == [reason] * 2
    assert all(words in str(site.explanation) for site in sites)
    assert torch.equal(out, model(x))
