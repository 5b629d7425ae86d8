"""Attention inside higher-order operators: checkpointed blocks and compiled regions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiling import run, sparse_calls
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import GRID, Video, latents

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Checkpointed(Video):
    def step(self, block: nn.Module, x: Tensor) -> Tensor:
        return x + checkpoint(block, x, use_reentrant=False)


class Region(Video):
    def step(self, block: nn.Module, x: Tensor) -> Tensor:
        return x + _region(block, x)


@torch.compiler.nested_compile_region
def _region(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", [Checkpointed, Region])
def test_nested_attention_is_rewritten(kind: type[Video], inner: str) -> None:
    torch.manual_seed(0)
    model = kind(F.scaled_dot_product_attention, layers=3).eval().requires_grad_(False)
    x = latents()
    dense = model(x)
    with sparse_calls() as calls:
        out, sites = run(model, x, inner=inner)
    assert sites and all(site.rewritten and site.grid == GRID for site in sites)
    assert len(calls) == 3
    torch.testing.assert_close(out, dense, atol=2e-5, rtol=0.0)
    sparse, _ = run(model, x, density=0.3, inner=inner)
    assert (sparse - dense).abs().max() > 1e-3
    torch._dynamo.reset()
    plain = Video(F.scaled_dot_product_attention, layers=3).eval().requires_grad_(False)
    plain.load_state_dict(model.state_dict())
    flat, _ = run(plain, x, density=0.3)
    torch.testing.assert_close(sparse, flat, atol=2e-5, rtol=0.0)


def test_nested_attention_with_a_refused_call_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = Checkpointed(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    ).eval().requires_grad_(False)  # fmt: skip
    out, sites = run(model, latents())
    assert {site.reason for site in sites} == {"CAUSAL"}
    assert torch.equal(out, model(latents()))
