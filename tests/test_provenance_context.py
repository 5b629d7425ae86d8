"""Queries that are a part of the keys: caches, and text that is only attended to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiling import compiled, run, sparse_calls
from torch import Tensor, nn
from toys import GRID, TOKENS, latents

from veda_compile.kernels.layout import Context, Extra, Layout, Segment, Video

pytestmark = pytest.mark.usefixtures("fresh_compiler")

CACHE = 10


class Cached(nn.Module):
    """Attention of a latent's tokens to themselves and to other keys.

    order: what the keys hold, of "x" for the latent's tokens, "c" for a cache, "t" for more tokens.
    queries: what q holds, likewise.
    """

    def __init__(self, order: str, queries: str = "x") -> None:
        super().__init__()
        self.order, self.queries = order, queries
        self.embed = nn.Linear(4, 32)
        self.to_q, self.to_k, self.to_v = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor, cache: Tensor, text: Tensor) -> Tensor:
        tokens = {"x": self.embed(x.flatten(2).transpose(1, 2)), "t": text}
        q = self.to_q(torch.cat([tokens[part] for part in self.queries], 1))
        k, v = (
            torch.cat([cache[i] if part == "c" else layer(tokens[part]) for part in self.order], 1)
            for i, layer in enumerate((self.to_k, self.to_v))
        )
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in (q * 4, k, v))
        return F.scaled_dot_product_attention(q, k, v)


def cached(order: str, queries: str = "x") -> Cached:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Cached(order, queries).eval().requires_grad_(False)


def others(cache: int = CACHE, text: int = 5) -> tuple[Tensor, Tensor]:
    """A cache of keys and values, and text tokens."""
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(2, 1, cache, 32, generator=generator),
        torch.randn(1, text, 32, generator=generator),
    )


VIDEO = Video(*GRID)


@pytest.mark.parametrize(
    ("order", "queries", "segments"),
    [
        ("cx", "x", (Context(CACHE), VIDEO)),
        ("xc", "x", (VIDEO, Context(CACHE))),
        ("tx", "x", (Context(5), VIDEO)),
        ("txc", "x", (Context(5), VIDEO, Context(CACHE))),
        ("cxt", "xt", (Context(CACHE), VIDEO, Extra(5))),
    ],
)
def test_keys_without_queries_are_context(
    order: str, queries: str, segments: tuple[Segment, ...]
) -> None:
    model, args = cached(order, queries), (latents(), *others())
    with sparse_calls() as calls:
        out, (site,) = run(model, *args)
    assert (site.rewritten, site.grid) == (True, GRID)
    assert calls[0][0].layout == Layout(segments)
    torch.testing.assert_close(out, model(*args), atol=2e-5, rtol=0.0)
    sparse, _ = run(model, *args, density=0.2)
    assert (sparse - out).abs().max() > 1e-3


def test_a_cache_that_grows_under_symbolic_sizes() -> None:
    model = cached("cx")
    fn = compiled(model)
    with torch.no_grad(), sparse_calls() as calls:
        for cache, grid in ((10, GRID), (17, (4, 4, 6)), (30, (5, 6, 8))):
            args = (latents(grid), *others(cache))
            torch.testing.assert_close(fn(*args), model(*args), atol=2e-5, rtol=0.0)
    assert [call.layout.segments[0] for call, _ in calls] == [Context(n) for n in (10, 17, 30)]


def test_some_frames_that_ask_all_frames() -> None:
    """Queries of the last frames, keys of all: the earlier frames are context."""

    def last_frames(x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2).unsqueeze(1)
        return F.scaled_dot_product_attention(tokens[:, :, 24:] * 3, tokens, tokens)

    with sparse_calls() as calls:
        out, (site,) = run(last_frames, latents())
    assert site.rewritten
    assert calls[0][0].layout == Layout.of(Context(24), Video(2, 4, 6))
    torch.testing.assert_close(out, last_frames(latents()), atol=2e-5, rtol=0.0)


@pytest.mark.parametrize(
    ("order", "queries", "reason"),
    [
        ("xx", "x", "TOKENS_DIFFER"),  # which copy is meant?
        ("t", "x", "CROSS_ATTENTION"),
        ("tc", "x", "CROSS_ATTENTION"),
        ("xt", "tx", "TOKENS_DIFFER"),
        ("xct", "xt", "TOKENS_DIFFER"),  # no one part of the keys
    ],
)
def test_queries_that_are_no_part_of_the_keys(order: str, queries: str, reason: str) -> None:
    model, args = cached(order, queries), (latents(), *others(cache=TOKENS))
    out, (site,) = run(model, *args)
    assert site.reason == reason
    assert torch.equal(out, model(*args))


class Turned(nn.Module):
    """A block whose queries and cached keys are turned by tables that enter apart."""

    def __init__(self, share_values: bool = False) -> None:
        super().__init__()
        self.share_values = share_values
        self.to_q, self.to_k, self.to_v = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor, cache: Tensor, of_q: Tensor, of_k: Tensor) -> Tensor:
        k, v = (
            torch.cat([cache[i], layer(x)], 1) for i, layer in enumerate((self.to_k, self.to_v))
        )
        q, k = self.to_q(x) * 4 * of_q, k * of_k
        v = v * of_k if self.share_values else v
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v)


def turned() -> tuple[Tensor, ...]:
    """Tokens, a cache, and the tables of queries and of keys."""
    cache, _ = others()
    places = torch.cartesian_prod(*(torch.arange(side).float() for side in GRID))
    of_x = torch.cos(places.repeat(1, 11)[:, :32])[None]
    of_k = torch.cat([torch.ones(1, CACHE, 32), of_x], 1)
    return torch.randn(1, TOKENS, 32), cache, of_x, of_k


def test_tables_of_their_own_turn_queries_and_keys() -> None:
    model, args = Turned().eval().requires_grad_(False), turned()
    with sparse_calls() as calls:
        out, (site,) = run(model, *args)
    assert (site.rewritten, site.grid) == (True, GRID)
    assert calls[0][0].layout == Layout.of(Context(CACHE), VIDEO)
    torch.testing.assert_close(out, model(*args), atol=2e-5, rtol=0.0)


def test_values_that_hold_more_than_the_queries_are_not_called_harmless() -> None:
    model, args = Turned(share_values=True).eval().requires_grad_(False), turned()
    out, (site,) = run(model, *args)
    assert (site.reason, site.harmless) == ("TOKENS_DIFFER", False)
    assert torch.equal(out, model(*args))


def test_as_many_other_tokens_in_the_place_of_the_cache() -> None:
    model, args = cached("cx", "tx"), (latents(), *others(cache=5))
    out, (site,) = run(model, *args)
    assert site.reason == "TOKENS_DIFFER"
    assert torch.equal(out, model(*args))
