"""Tokens in another order than raster: carried into the op and back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compiling import compiled, run, sparse_calls
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from toys import GRID, TOKENS, Video, latents, toy

import veda_compile
from veda_compile.kernels.layout import Layout
from veda_compile.kernels.layout import Video as VideoSegment

pytestmark = pytest.mark.usefixtures("fresh_compiler")

Flatten = Callable[[Tensor], Tensor]


def space_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 4, 2, 1).flatten(1, 3)


def columns_first(x: Tensor) -> Tensor:
    return x.permute(0, 2, 4, 3, 1).flatten(1, 3)


def blocks(x: Tensor) -> Tensor:
    """Frame by frame in blocks of 2 x 3 tokens."""
    x = x.unflatten(3, (2, 2)).unflatten(5, (2, 3))  # B C T H/2 2 W/3 3
    return x.permute(0, 2, 3, 5, 4, 6, 1).flatten(1, 5)


def mirrored(x: Tensor) -> Tensor:
    return x.flip(4).flatten(2).transpose(1, 2)


def shuffled(x: Tensor) -> Tensor:
    order = (torch.arange(TOKENS, device=x.device) * 7) % TOKENS  # 7 and 72 share no factor
    return x.flatten(2).transpose(1, 2)[:, order]


ORDERS = [space_first, columns_first, blocks, mirrored, shuffled]


class Reordered(Video):
    """`Video` with its tokens in another order."""

    flatten: Flatten = staticmethod(columns_first)

    def tokens(self, x: Tensor) -> Tensor:
        return self.flatten(x)


def reordered(flatten: Flatten) -> Reordered:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Reordered(F.scaled_dot_product_attention)
    model.flatten = flatten
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("flatten", ORDERS)
def test_sparse_attention_does_not_depend_on_the_order_of_tokens(flatten: Flatten) -> None:
    x = latents(batch=2)
    raster, _ = run(toy(), x, density=0.3)
    with sparse_calls() as calls:
        out, sites = run(reordered(flatten), x, density=0.3)
    assert all(site.rewritten and site.grid == GRID for site in sites)
    assert {call.layout for call, _ in calls} == {Layout.of(VideoSegment(*GRID))}
    places = torch.arange(TOKENS).view(1, 1, *GRID).float()
    order = flatten(places.expand(1, 4, *GRID))[0, :, 0].long()
    torch.testing.assert_close(out, raster[:, order], atol=2e-5, rtol=0.0)
    assert (out - reordered(flatten)(x)).abs().max() > 1e-3  # it is sparse


def test_raster_order_is_not_gathered() -> None:
    with sparse_calls() as calls:
        run(toy(layers=1), latents())
    q = calls[0][0].q
    assert not q.is_contiguous()  # still the model's own (B, N, H, D) view


def test_text_and_its_mask_go_along() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None, :])

    def model(x: Tensor, text: Tensor, valid: Tensor) -> Tensor:
        tokens = torch.cat([text, blocks(x)], 1).unflatten(-1, (1, -1)).transpose(1, 2)
        return attend(tokens * 3, tokens, tokens, valid)

    generator = torch.Generator().manual_seed(3)
    text = torch.randn(1, 6, 4, generator=generator)
    valid = torch.ones(1, TOKENS + 6, dtype=torch.bool)
    valid[:, 4:6] = False
    valid[:, 9] = False
    with sparse_calls() as calls:
        out, (site,) = run(model, latents(), text, valid)
    assert site.rewritten and str(calls[0][0].layout) == "[extra 6, video 3x4x6]"
    torch.testing.assert_close(out, model(latents(), text, valid), atol=2e-5, rtol=0.0)


def test_nested_graphs_take_the_order_too() -> None:

    class Checkpointed(Reordered):
        def step(self, block: torch.nn.Module, x: Tensor) -> Tensor:
            return x + checkpoint(block, x, use_reentrant=False)

    torch.manual_seed(0)
    model = Checkpointed(F.scaled_dot_product_attention).eval().requires_grad_(False)
    out, sites = run(model, latents())
    assert sites and all(site.rewritten for site in sites)
    torch.testing.assert_close(out, model(latents()), atol=2e-5, rtol=0.0)


def test_symbolic_sizes_and_another_order_stay_dense() -> None:
    model = reordered(columns_first)
    fn = compiled(model)

    with torch.no_grad():
        for grid in (GRID, (4, 4, 6)):
            x = latents(grid)
            torch.testing.assert_close(fn(x), model(x), atol=2e-5, rtol=0.0)
    static, dynamic = veda_compile.report().graphs
    assert all(site.rewritten for site in static.sites)
    assert {site.reason for site in dynamic.sites} == {"TOKEN_ORDER"}
    assert all("dynamic=False" in str(site.explanation) for site in dynamic.sites)


def test_every_batch_element_in_its_own_order_stays_dense() -> None:
    def model(x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.stack([tokens[0], tokens[1].flip(0)]).unsqueeze(1)
        return F.scaled_dot_product_attention(tokens, tokens, tokens)

    out, (site,) = run(model, latents(batch=2))
    assert site.reason == "TOKEN_ORDER"
    assert torch.equal(out, model(latents(batch=2)))


def test_every_head_with_its_own_tokens_stays_dense() -> None:
    def model(x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        q = torch.stack([tokens, tokens.flip(1)], 1)
        v = tokens.unsqueeze(1).expand(-1, 2, -1, -1)
        return F.scaled_dot_product_attention(q, q, v)

    out, (site,) = run(model, latents())
    assert not site.rewritten
    assert torch.equal(out, model(latents()))
