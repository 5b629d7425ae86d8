"""Sequences that hold parts of a video, or more than a video."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from compiling import run
from odd_attention import H, Odd, T, W, left, merged, odd, sdpa
from torch import Tensor
from toys import GRID, TOKENS, latents

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def windows(x: Tensor, size: tuple[int, int, int]) -> Tensor:
    """(B, C, T, H, W) -> (B * windows, tokens, C): boxes of `size`, as Swin makes them."""
    b, c, t, h, w = x.shape
    x = x.view(b, c, t // size[0], size[0], h // size[1], size[1], w // size[2], size[2])
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(-1, math.prod(size), c)


@pytest.mark.parametrize("size", [(3, 2, 3), (1, 2, 2), (3, 4, 2), (1, 4, 6), (3, 1, 1), (3, 1, 6)])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("batch", [1, 2])
def test_windows_in_the_batch(size: tuple[int, int, int], shift: int, batch: int) -> None:
    def attend(model: Odd, x: Tensor) -> Tensor:
        rolled = x.roll((-shift, -shift), (3, 4)) if shift else x
        return sdpa(*model.qkv(model.embed(windows(rolled, size))))

    sites = left(odd(attend), latents(batch=batch))
    assert {site.reason for site in sites} <= {"FACTORISED", "ONE_FRAME", "TOKEN_ORDER"}


@pytest.mark.parametrize("grid", [(3, 4, 6), (4, 4, 4), (4, 2, 2)])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_frames_in_the_batch(grid: tuple[int, int, int], batch: int) -> None:
    def attend(model: Odd, x: Tensor) -> Tensor:
        frames = model.embed(x.permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(0, 1))
        times = model.embed(x.permute(0, 3, 4, 2, 1).flatten(0, 2))
        return sdpa(*model.qkv(frames)).sum() + sdpa(*model.qkv(times))

    sites = left(odd(attend), latents(grid, batch))
    assert {site.reason for site in sites} == {"FACTORISED"}


def test_heads_that_hold_other_tokens() -> None:
    """Tokens dealt out over the heads."""

    def attend(model: Odd, x: Tensor) -> Tensor:
        tokens = model.tokens(x).unflatten(1, (2, -1))  # (B, 2, N / 2, 32)
        return sdpa(tokens, tokens, tokens)

    left(odd(attend), latents())


def registers(model: Odd, x: Tensor) -> Tensor:
    """Learned tokens in front that everything attends to."""
    sinks = model.learned[:, :5].expand(x.shape[0], -1, -1)
    return merged(sdpa(*model.qkv(torch.cat([sinks, model.tokens(x)], 1))))[:, 5:]


def values_of_an_earlier_layer(model: Odd, x: Tensor) -> Tensor:
    first = model.tokens(x)
    second = first + merged(sdpa(*model.qkv(first)))
    return sdpa(*model.qkv(second, second, first))


@pytest.mark.parametrize(
    ("attend", "sites", "layout"),
    [
        (registers, 1, f"extra 5 + video {TOKENS}"),
        (values_of_an_earlier_layer, 2, f"video {TOKENS}"),
    ],
    ids=["registers", "earlier values"],
)
def test_self_attention_in_odd_company(
    attend: Callable[..., Tensor], sites: int, layout: str
) -> None:
    out, found = run(odd(attend), latents(batch=2))
    assert [(site.rewritten, site.grid) for site in found] == [(True, GRID)] * sites
    assert {site.layout for site in found} == {layout}
    torch.testing.assert_close(out, odd(attend)(latents(batch=2)), atol=2e-5, rtol=0.0)


def registers_per_frame(model: Odd, x: Tensor) -> Tensor:
    """A learned token in front of every frame."""
    frames = model.tokens(x).unflatten(1, (T, H * W))
    marks = model.learned[:, :T, None].expand(x.shape[0], -1, -1, -1)
    return sdpa(*model.qkv(torch.cat([marks, frames], 2).flatten(1, 2)))


def test_registers_in_every_frame_are_no_part_of_the_grid() -> None:
    out, (site,) = run(odd(registers_per_frame), latents(), density=1.0)
    assert not site.rewritten or site.grid == GRID
    torch.testing.assert_close(out, odd(registers_per_frame)(latents()), atol=2e-5, rtol=0.0)


@pytest.mark.parametrize("dropped", [1, 7, W])
def test_a_video_with_missing_tokens(dropped: int) -> None:
    """Without its last tokens it is no grid; without a whole row it is none either."""

    def attend(model: Odd, x: Tensor) -> Tensor:
        return sdpa(*model.qkv(model.tokens(x)[:, :-dropped]))

    assert {site.reason for site in left(odd(attend), latents())} == {"TOKEN_ORDER"}
