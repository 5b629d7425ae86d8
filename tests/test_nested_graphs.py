"""Attention inside higher-order operators: checkpointed blocks and compiled regions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from compiling import run, sparse_calls
from distinct_sidecars import distinct_plans, save_sidecar
from small_transformers import EXACT, distance
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import GRID, Attend, Video, latents

from veda_compile import Layout, Plan, sparse_attention
from veda_compile import Video as VideoTokens

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


class Inner(Video):
    """What is nested holds no parameters of its own."""

    def step(self, block: nn.Module, x: Tensor) -> Tensor:
        return x + block(x)


def _nested_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = checkpoint(F.scaled_dot_product_attention, q, k, v, use_reentrant=False)
    return out


class Grouped(Video):
    """Two blocks in one region, called once in their order and once the other way round."""

    def step(self, block: nn.Module, x: Tensor) -> Tensor:
        first, second, _ = self.blocks
        if block is first:
            return _pair(first, second, x)
        return _pair(second, first, x) if block is second else x


@torch.compiler.nested_compile_region
def _pair(one: nn.Module, other: nn.Module, x: Tensor) -> Tensor:
    x = x + one(x)
    return x + other(x)


BIG = (4, 8, 8)
LAYERS = ["blocks.0", "blocks.1", "blocks.2"]


@pytest.mark.parametrize(
    ("kind", "attend", "names"),
    [
        (Checkpointed, F.scaled_dot_product_attention, [0, 1, 2]),
        (Region, F.scaled_dot_product_attention, [0, 1, 2]),
        (Inner, _nested_sdpa, [0, 1, 2]),
        (Grouped, F.scaled_dot_product_attention, [0, 1, 1, 0]),
    ],
)
def test_plans_by_the_names_of_nested_layers(
    tmp_path: Path, kind: type[Video], attend: Attend, names: list[int]
) -> None:
    torch.manual_seed(0)
    model = kind(attend, layers=3).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    x, plans = latents(BIG), distinct_plans(3)
    shuffled = [plans[2], plans[0], plans[1]]
    cards = [
        save_sidecar(tmp_path / f"{name}.veda.safetensors", model, LAYERS, given, [BIG], 16)
        for name, given in (("right", plans), ("shuffled", shuffled))
    ]
    right, wrong = (_by_hand(model, x, [given[i] for i in names]) for given in (plans, shuffled))
    assert distance(right, wrong) > 100 * EXACT
    for card, wanted in zip(cards, (right, wrong), strict=True):
        torch._dynamo.reset()
        out, sites = run(model, x, density=None, sidecar=card)
        assert [site.layer for site in sites] == [LAYERS[i] for i in names]
        assert distance(out, wanted) <= EXACT


def _by_hand(model: Video, x: Tensor, plans: list[Plan]) -> Tensor:
    """The model with sparse attention by these plans, call by call."""
    given = iter(plans)
    layout = Layout.of(VideoTokens(*BIG))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(q, k, v, layout=layout, plan=next(given))

    held = [block.attend for block in model.blocks]
    with torch.no_grad():
        for block in model.blocks:
            block.attend = attend
        out: Tensor = model(x)
    for block, original in zip(model.blocks, held, strict=True):
        block.attend = original
    return out
