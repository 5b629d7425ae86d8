"""Masked attention, rewritten: equal to the model's own, queries and rows without keys included."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiling import QUICK, compiled, run
from torch import Tensor
from toys import GRID, TOKENS, Video, latents

import veda_compile

pytestmark = pytest.mark.usefixtures("fresh_compiler")

TEXT = 6
N = TOKENS + TEXT
LOWEST = torch.finfo(torch.float32).min


class Masked(Video):
    """Text after the video; the attention of every block takes the padding of both."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__(attend)
        self.attend = attend

    def forward(self, x: Tensor, text: Tensor, valid: Tensor) -> Tensor:
        """x: latents; text: (B, 6, 32); valid: (B, 78) bool."""
        x = torch.cat([self.embed(self.tokens(x)), text], dim=1)
        for block in self.blocks:
            block.attend = lambda q, k, v: self.attend(q, k, v, valid)  # type: ignore[assignment]
            x = x + block(x)
        return x


def masked(attend: Callable[..., Tensor]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Masked(attend).eval().requires_grad_(False)


def inputs(*counts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of batch element i, `counts[i]` text tokens count."""
    generator = torch.Generator().manual_seed(2)
    text = torch.randn(len(counts), TEXT, 32, generator=generator)
    valid = torch.arange(N)[None] < TOKENS + torch.tensor(counts)[:, None]
    return latents(batch=len(counts)), text, valid


def keys(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, valid[:, None, None])


def outer(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    rows = valid.view(-1, 1, 1, N).repeat(1, 1, N, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=rows & rows.transpose(2, 3))


def queries(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, valid[:, None, :, None].expand(-1, 1, N, N))


def added(low: float) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        mask = torch.zeros_like(valid, dtype=q.dtype).masked_fill(~valid, low)
        return F.scaled_dot_product_attention(q, k, v, mask[:, None, None])

    return attend


def added_outer(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    open_ = valid[:, None, None] & valid[:, None, :, None]
    return F.scaled_dot_product_attention(q, k, v, (1.0 - open_.to(q.dtype)) * LOWEST)


def filled(low: float) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        logits = (q @ k.mT).masked_fill(~valid[:, None, None], low)
        return torch.softmax(logits * q.shape[-1] ** -0.5, -1) @ v

    return attend


def grouped(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    mask = (~valid)[:, None, None].to(q.dtype) * LOWEST
    return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], mask, enable_gqa=True)


ATTENDS = {
    "keys": keys,
    "outer": outer,
    "queries": queries,
    "added -inf": added(-math.inf),
    "added lowest": added(LOWEST),
    "added -1e9": added(-1e9),
    "added outer": added_outer,
    "filled": filled(-1e9),
    "filled -inf": filled(-math.inf),
    "grouped": grouped,
}


@pytest.mark.parametrize("executor", ["reference", "cpu"])
@pytest.mark.parametrize("name", ATTENDS)
def test_masked_calls_are_rewritten_and_equal(name: str, executor: str) -> None:
    model, args = masked(ATTENDS[name]), inputs(4, 0)
    dense = model(*args)
    out, sites = run(model, *args, executor=executor)
    assert [site.grid for site in sites if site.rewritten] == [GRID] * 2, sites
    torch.testing.assert_close(out, dense, atol=2e-5, rtol=0.0)


@pytest.mark.parametrize("executor", ["reference", "cpu"])
@pytest.mark.parametrize("name", ATTENDS)
def test_one_graph_follows_the_masks_of_every_call(name: str, executor: str) -> None:
    """All keys, some, or none at all of a batch element: the values are not part of the graph."""
    model = masked(ATTENDS[name])
    fast = compiled(model, executor=executor)
    cases = [inputs(6, 6), inputs(3, 5), inputs(0, 1)]
    x, text, valid = inputs(2, 4)
    cases.append((x, text, valid & torch.tensor([[True], [False]])))
    scattered = torch.arange(N).expand(2, N) % 3 > 0
    cases.append((x, text, scattered))
    with torch.no_grad():
        for case in cases:
            torch.testing.assert_close(
                fast(*case), model(*case), atol=2e-5, rtol=0.0, equal_nan=True
            )
    assert len(veda_compile.report().graphs) == 1


def test_masks_of_any_resolution() -> None:
    def outer_of_its_size(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        rows = valid.view(valid.shape[0], 1, 1, valid.shape[1]).repeat(1, 1, valid.shape[1], 1)
        return F.scaled_dot_product_attention(q, k, v, rows & rows.transpose(2, 3))

    model = masked(outer_of_its_size)
    fast = torch.compile(
        model, backend="veda", dynamic=True, options={**QUICK, "density": 1.0, "strict": True}
    )
    _, text, _ = inputs(2, 4)
    with torch.no_grad():
        for grid in ((3, 4, 6), (4, 5, 7), (2, 6, 3)):
            length = grid[0] * grid[1] * grid[2]
            valid = torch.arange(length + TEXT)[None] < length + torch.tensor([[2], [4]])
            args = latents(grid, batch=2), text, valid
            torch.testing.assert_close(fast(*args), model(*args), atol=2e-5, rtol=0.0)


def test_a_mask_that_differs_between_queries_stays() -> None:
    def block_causal(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        frame = torch.arange(N) // 24
        return F.scaled_dot_product_attention(q, k, v, frame[:, None] >= frame)

    model, args = masked(block_causal), inputs(4, 0)
    out, sites = run(model, *args)
    assert [site.reason for site in sites] == ["MASK_NOT_A_KEY_LENGTH"] * 2
    assert torch.equal(out, model(*args))


def test_a_mask_that_comes_with_the_call_stays() -> None:
    def own(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask[:, None])

    x, text, valid = inputs(4, 0)
    for mask in (valid[:, None].expand(2, N, N).clone(), torch.zeros(2, N, N)):
        model = masked(own)
        out, sites = run(model, x, text, mask)
        assert [site.reason for site in sites] == ["MASK_NOT_A_KEY_LENGTH"] * 2
        assert "outside the graph" in str(sites[0].explanation)
        assert torch.equal(out, model(x, text, mask))
