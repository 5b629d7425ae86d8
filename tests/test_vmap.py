"""Attention whose queries and keys went through torch.vmap."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compiling import compiled, run, sparse_calls
from torch import Tensor, nn
from toys import GRID, TOKENS, latents, toy

import veda_compile
from veda_compile.functional import sparse_attention
from veda_compile.kernels.layout import Layout, Video

pytestmark = pytest.mark.usefixtures("fresh_compiler")

Apply = Callable[[Tensor], Tensor]
"""(B, heads, N, D) queries or keys to the same."""

FRAMES = (GRID[0], TOKENS // GRID[0])
BATCH = 2
WEIGHT = nn.Parameter(torch.linspace(0.5, 1.5, 16), requires_grad=False)
MIXING = nn.Parameter(torch.linspace(-1.0, 1.0, 512).sin().view(2, 16, 16), requires_grad=False)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def table(x: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D) tables, as most models compute them from the places of a sequence."""
    angles = torch.arange(x.shape[2], device=x.device)[:, None] * torch.linspace(0.1, 1.0, 8)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotary_of_heads(x: Tensor) -> Tensor:
    return torch.vmap(rotary, in_dims=(1, None, None), out_dims=1)(x, *table(x))


def rotary_of_samples(x: Tensor) -> Tensor:
    return torch.vmap(rotary, in_dims=(0, None, None))(x, *table(x))


def rotary_of_frames(x: Tensor) -> Tensor:
    cos, sin = (y.unflatten(0, FRAMES) for y in table(x))
    frames = x.unflatten(2, FRAMES)
    return torch.vmap(rotary, in_dims=(2, 0, 0), out_dims=2)(frames, cos, sin).flatten(2, 3)


def rotary_of_tokens(x: Tensor) -> Tensor:
    return torch.vmap(rotary, in_dims=(-2, 0, 0), out_dims=-2)(x, *table(x))


def rotary_of_samples_and_heads(x: Tensor) -> Tensor:
    of_heads = torch.vmap(rotary, in_dims=(0, None, None))
    return torch.vmap(of_heads, in_dims=(0, None, None))(x, *table(x))


def rotary_of_heads_and_frames(x: Tensor) -> Tensor:
    cos, sin = (y.unflatten(0, FRAMES) for y in table(x))
    of_frames = torch.vmap(rotary, in_dims=(1, 0, 0), out_dims=1)
    of_heads = torch.vmap(of_frames, in_dims=(1, None, None), out_dims=2)
    return of_heads(x.unflatten(2, FRAMES), cos, sin).transpose(1, 2).flatten(2, 3)


def norm_of_heads(x: Tensor) -> Tensor:
    return torch.vmap(lambda y: F.rms_norm(y, (16,), WEIGHT), in_dims=1, out_dims=1)(x)


def norm_of_tokens(x: Tensor) -> Tensor:
    norm = torch.vmap(lambda y: y * y.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * WEIGHT)
    return torch.vmap(norm)(x)


def scale_of_heads(x: Tensor) -> Tensor:
    scales = torch.linspace(0.5, 1.5, x.shape[1])
    return torch.vmap(torch.mul, in_dims=(1, 0), out_dims=1)(x, scales)


def features_of_heads(x: Tensor) -> Tensor:
    return torch.vmap(torch.matmul, in_dims=(1, 0), out_dims=1)(x, MIXING)


def in_chunks(x: Tensor) -> Tensor:
    return torch.vmap(F.silu, in_dims=2, out_dims=2, chunk_size=10)(x)


def written_inside(x: Tensor) -> Tensor:
    def scale(y: Tensor) -> Tensor:
        y = y.clone()
        y[:, ::2] *= 1.5
        y.narrow(-1, 0, 4).mul_(0.5)
        return y

    return torch.vmap(scale)(x)


def written_through(x: Tensor) -> Tensor:
    x = x.clone()
    torch.vmap(lambda y: y.mul_(2.0), in_dims=1)(x)
    return x


def written_afterwards(x: Tensor) -> Tensor:
    x = x.clone()
    torch.vmap(lambda y: y.transpose(0, 1), in_dims=2, out_dims=1)(x).mul_(2.0)
    return x


def flipped_twice(x: Tensor) -> Tensor:
    return torch.vmap(lambda y: y.flip(-2).mul(2).flip(-2))(x)


def moved_and_back(x: Tensor) -> Tensor:
    return torch.vmap(torch.neg, in_dims=2, out_dims=3)(x).transpose(2, 3)


FOLLOWED: list[Apply] = [
    rotary_of_heads, rotary_of_samples, rotary_of_frames, rotary_of_tokens,
    rotary_of_samples_and_heads, rotary_of_heads_and_frames, norm_of_heads, norm_of_tokens,
    scale_of_heads, features_of_heads, in_chunks, written_inside, written_through,
    written_afterwards, flipped_twice, moved_and_back,
]  # fmt: skip


def model(apply: Apply, layers: int = 2) -> nn.Module:
    return toy(lambda q, k, v: F.scaled_dot_product_attention(apply(q), apply(k), v), layers)


@pytest.mark.parametrize("apply", FOLLOWED)
def test_tokens_are_followed_through_vmap(apply: Apply) -> None:
    x = latents(batch=BATCH)
    with sparse_calls() as calls:
        out, sites = run(model(apply), x, density=1.0)
    assert [site.grid for site in sites if site.rewritten] == [GRID, GRID]
    assert [call.layout for call, _ in calls] == [Layout.of(Video(*GRID))] * 2
    torch.testing.assert_close(out, model(apply)(x), atol=2e-5, rtol=0.0)


@pytest.mark.parametrize("apply", FOLLOWED)
def test_what_is_sparse_is_the_same_attention_without_compiling(apply: Apply) -> None:
    x = latents(batch=BATCH)
    with sparse_calls() as calls:
        out, _ = run(model(apply, 1), x, density=0.3, executor="reference")
    ((call, _),) = calls

    def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(
            apply(q), apply(k), v, layout=call.layout, plan=call.plan, executor="reference"
        )

    expected = toy(sparse, 1)(x)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=0.0)
    assert not torch.allclose(out, model(apply, 1)(x), atol=1e-4)


def mirrored_inside(x: Tensor) -> Tensor:
    return torch.vmap(lambda y: y.flip(-2))(x)


def rolled_inside_frames(x: Tensor) -> Tensor:
    frames = x.unflatten(2, FRAMES)
    return torch.vmap(lambda y: y.roll(1, 2), in_dims=2, out_dims=2)(frames).flatten(2, 3)


def mirrored_in_one_frame(x: Tensor) -> Tensor:
    frames, last = x.unflatten(2, FRAMES), torch.arange(GRID[0]) == GRID[0] - 1
    swap = torch.vmap(lambda y, is_last: torch.where(is_last, y.flip(2), y), (2, 0), 2)
    return swap(frames, last).flatten(2, 3)


def summed_tokens(x: Tensor) -> Tensor:
    return torch.vmap(lambda y: y + y.flip(-2), in_dims=0)(x.cumsum(2).roll(3, 2))


def summed_inside_rows(x: Tensor) -> Tensor:
    rows = x.unflatten(2, (-1, GRID[2]))
    total = torch.vmap(lambda y: y.sum(2, keepdim=True).expand_as(y), in_dims=2, out_dims=2)
    return total(rows).flatten(2, 3)


def frames_to_another_side(x: Tensor) -> Tensor:
    frames = x.unflatten(2, (TOKENS // GRID[0], GRID[0]))
    return torch.vmap(torch.neg, in_dims=2, out_dims=3)(frames).flatten(2, 3)


def samples_swapped(x: Tensor) -> Tensor:
    return torch.vmap(lambda y: y.flip(0), in_dims=1, out_dims=1)(x)


def mirrored_by_writing_inside(x: Tensor) -> Tensor:
    x = x.clone()
    torch.vmap(lambda y: y.copy_(y.flip(-2)))(x)
    return x


def assigned_inside(x: Tensor) -> Tensor:
    x = x.clone()

    def swap(y: Tensor) -> Tensor:
        y[:, :36] = y[:, 36:].clone()
        return y

    torch.vmap(swap)(x)
    return x


def written_by_the_inner_of_two(x: Tensor) -> Tensor:
    x = x.clone()
    torch.vmap(torch.vmap(lambda y: y.copy_(y.roll(1, 0)), in_dims=0), in_dims=0)(x)
    return x


def written_where_vmap_returned_a_view(x: Tensor) -> Tensor:
    x = x.clone()
    view = torch.vmap(lambda y: y[:, 4:40], in_dims=1, out_dims=1)(x)
    view.copy_(view.flip(2))
    return x


MOVED: list[Apply] = [
    mirrored_inside, rolled_inside_frames, mirrored_in_one_frame, summed_tokens,
    summed_inside_rows, frames_to_another_side, samples_swapped, mirrored_by_writing_inside,
    assigned_inside, written_by_the_inner_of_two, written_where_vmap_returned_a_view,
]  # fmt: skip
"""Keys that are other tokens than the queries in their place."""


@pytest.mark.parametrize("apply", MOVED)
def test_keys_that_vmap_moved_are_not_the_queries(apply: Apply) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, apply(k), v)

    x = latents(batch=BATCH)
    out, sites = run(toy(attend), x, density=0.3)
    assert [site.rewritten for site in sites] == [False, False]
    assert torch.equal(out, toy(attend)(x))


def test_an_order_made_inside_vmap_is_undone_for_the_op() -> None:
    """Columns come first in what attention sees; the op gets rows first."""

    def turned(tokens: Tensor) -> Tensor:
        grid = tokens.unsqueeze(1).unflatten(2, GRID)
        columns = torch.vmap(lambda y: y.transpose(2, 3), in_dims=1, out_dims=1)(grid)
        return columns.flatten(2, 4)

    def layer(x: Tensor) -> Tensor:
        tokens = turned(x.flatten(2).transpose(1, 2).repeat(1, 1, 4))
        return F.scaled_dot_product_attention(tokens * 3, tokens, tokens)

    x = latents()
    with sparse_calls() as calls:
        out, (site,) = run(layer, x)
    assert site.rewritten
    assert calls[0][0].layout == Layout.of(Video(*GRID))
    assert torch.equal(calls[0][0].k[:, 0, :, :4], x.flatten(2).transpose(1, 2))
    torch.testing.assert_close(out, layer(x), atol=2e-5, rtol=0.0)


def test_attention_inside_vmap_stays_as_it_is() -> None:
    inside = torch.vmap(F.scaled_dot_product_attention)
    out, sites = run(toy(lambda q, k, v: inside(q, k, v)), latents(batch=BATCH), density=0.3)
    assert not any(site.rewritten for site in sites)
    expected = toy(lambda q, k, v: inside(q, k, v))(latents(batch=BATCH))
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=0.0)


def test_what_is_not_followed_inside_vmap_is_named() -> None:
    def sort(x: Tensor) -> Tensor:
        return torch.vmap(lambda y: y.sort(1).values)(x)

    _, sites = run(model(sort), latents(batch=BATCH))
    assert not any(site.rewritten for site in sites)
    assert "sort" in str(veda_compile.report())


def test_other_sizes_of_one_dynamic_graph() -> None:
    fn = compiled(model(rotary_of_heads, 1), density=1.0)
    plain = model(rotary_of_heads, 1)
    for grid in (GRID, (3, 6, 4), (4, 4, 8), (5, 6, 6)):
        x = latents(grid, BATCH)
        with torch.no_grad(), sparse_calls() as calls:
            out = fn(x)
        assert [call.layout for call, _ in calls] == [Layout.of(Video(*grid))]
        torch.testing.assert_close(out, plain(x), atol=2e-5, rtol=0.0)
