"""In-place writes: a write to a view is seen by its base, and the other way round."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compiling import run, sparse_calls
from torch import Tensor
from toys import GRID, TOKENS, latents

from veda_compile.kernels.layout import Extra, Layout, Video

pytestmark = pytest.mark.usefixtures("fresh_compiler")

TEXT = 5


def attend(tokens: Tensor, v: Tensor | None = None) -> Tensor:
    tokens = tokens.unsqueeze(1)
    return F.scaled_dot_product_attention(tokens * 3, tokens, tokens if v is None else v[:, None])


def raster(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


Fill = Callable[[Tensor, Tensor], None]
"""Writes the (B, N, C) tokens of a video to the end of a (B, TEXT + N, C) buffer."""


def by_view(out: Tensor, video: Tensor) -> None:
    out.view(out.shape[0], -1)[:, TEXT * 4 :].view_as(video).copy_(video)


def by_transpose(out: Tensor, video: Tensor) -> None:
    out.transpose(1, 2)[:, :, TEXT:] = video.transpose(1, 2)


def by_split(out: Tensor, video: Tensor) -> None:
    out.split([TEXT, TOKENS], 1)[1].copy_(video)


def by_narrow(out: Tensor, video: Tensor) -> None:
    out.narrow(1, TEXT, TOKENS).add_(video)


def by_selecting(out: Tensor, video: Tensor) -> None:
    out.unbind(0)[0].index_copy_(0, torch.arange(TEXT, TEXT + TOKENS), video[0])


def by_adding(out: Tensor, video: Tensor) -> None:
    out[:, TEXT:] += video


def by_chunks_of_features(out: Tensor, video: Tensor) -> None:
    for part, piece in zip(out.chunk(2, -1), video.chunk(2, -1), strict=True):
        part[:, TEXT:] = piece


def by_unflattening(out: Tensor, video: Tensor) -> None:
    rows = out[:, TEXT:].unflatten(1, (GRID[0], -1))
    for frame in range(GRID[0]):
        rows[:, frame] = video.unflatten(1, (GRID[0], -1))[:, frame]


FILLS = [by_view, by_transpose, by_split, by_narrow, by_selecting, by_adding,
         by_chunks_of_features, by_unflattening]  # fmt: skip


@pytest.mark.parametrize("fill", FILLS)
def test_a_write_to_a_view_is_seen_by_its_base(fill: Fill) -> None:
    def model(x: Tensor) -> Tensor:
        out = x.new_zeros(x.shape[0], TEXT + TOKENS, 4)
        fill(out, raster(x))
        return attend(out)

    with sparse_calls() as calls:
        out, (site,) = run(model, latents())
    assert site.rewritten
    assert calls[0][0].layout == Layout.of(Extra(TEXT), Video(*GRID))
    torch.testing.assert_close(out, model(latents()), atol=2e-5, rtol=0.0)


def test_a_write_to_the_base_is_seen_by_its_views() -> None:
    def model(x: Tensor) -> Tensor:
        out = x.new_zeros(x.shape[0], TEXT + TOKENS, 4)
        view = out[:, TEXT:]
        heads = view.unflatten(1, (GRID[0], -1))
        out[:, TEXT:] = raster(x)
        return attend(heads.flatten(1, 2))

    out, (site,) = run(model, latents())
    assert (site.rewritten, site.grid) == (True, GRID)
    torch.testing.assert_close(out, model(latents()), atol=2e-5, rtol=0.0)


def test_views_that_share_a_base_see_each_others_writes() -> None:
    def model(x: Tensor, other: Tensor) -> Tensor:
        out = raster(x).contiguous()
        flat, frames = out.view(1, -1), out.unflatten(1, (GRID[0], -1))
        flat[:, : 24 * 4] = other.view(1, -1)
        return attend(out, frames.flatten(1, 2))

    other = torch.randn(1, 24, 4, generator=torch.Generator().manual_seed(3))
    out, (site,) = run(model, latents(), other)
    # the first frame is no frame of the latent any more
    assert not site.rewritten or site.grid == (2, 4, 6)
    torch.testing.assert_close(out, model(latents(), other), atol=2e-5, rtol=0.0)


def test_keys_that_a_write_moves_are_no_longer_the_queries() -> None:
    def model(x: Tensor) -> Tensor:
        tokens = raster(x).contiguous()
        q = tokens.clone()
        tokens.transpose(0, 1)[:] = q.flip(1).transpose(0, 1)
        return F.scaled_dot_product_attention(q[:, None], tokens[:, None], tokens[:, None])

    out, (site,) = run(model, latents())
    assert site.reason == "TOKENS_DIFFER"
    assert torch.equal(out, model(latents()))


@torch.library.custom_op("veda_tests::turn_around_", mutates_args=("x",))
def turn_around_(x: Tensor) -> None:
    x.copy_(x.flip(1))


def test_an_op_that_says_it_writes_leaves_nothing_known() -> None:
    def model(x: Tensor) -> Tensor:
        tokens = raster(x).contiguous()
        q = tokens.clone()
        turn_around_(tokens.view(1, TOKENS, 4))
        return F.scaled_dot_product_attention(q[:, None], tokens[:, None], tokens[:, None])

    out, (site,) = run(model, latents())
    assert not site.rewritten
    assert torch.equal(out, model(latents()))


def test_a_write_through_a_view_that_cannot_be_followed() -> None:
    def model(x: Tensor) -> Tensor:
        tokens = raster(x).contiguous()
        q = tokens.clone()
        tokens.as_strided((TOKENS, 4), (4, 1)).copy_(q[0].flip(0))
        return F.scaled_dot_product_attention(q[:, None], tokens[:, None], tokens[:, None])

    out, (site,) = run(model, latents())
    assert not site.rewritten
    assert torch.equal(out, model(latents()))
