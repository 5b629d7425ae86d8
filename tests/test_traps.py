"""Attention that looks like video self-attention: queries and keys are not the same tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compiling import run
from odd_attention import Odd, T, left, name_of, odd, sdpa
from torch import Tensor
from toys import GRID, TOKENS, latents

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def another_video(model: Odd, x: Tensor, y: Tensor) -> Tensor:
    return sdpa(*model.qkv(model.tokens(x), model.tokens(y)))


def values_of_another_video(model: Odd, x: Tensor, y: Tensor) -> Tensor:
    return sdpa(*model.qkv(model.tokens(x), model.tokens(x), model.tokens(y)))


def queries_of_another_video(model: Odd, x: Tensor, y: Tensor) -> Tensor:
    return sdpa(*model.qkv(model.tokens(y), model.tokens(x)))


def keys_see_a_second_video(model: Odd, x: Tensor, y: Tensor) -> Tensor:
    tokens = model.tokens(x)
    return sdpa(*model.qkv(tokens, tokens + model.tokens(y)))


def previous_frame(model: Odd, x: Tensor) -> Tensor:
    return sdpa(*model.qkv(model.tokens(x), model.tokens(x.roll(1, 2))))


def shifted_rows(model: Odd, x: Tensor) -> Tensor:
    tokens = model.tokens(x)
    return sdpa(*model.qkv(tokens, tokens.roll(1, 1)))


def mirrored(model: Odd, x: Tensor) -> Tensor:
    tokens = model.tokens(x)
    return sdpa(*model.qkv(tokens, tokens.flip(1)))


def shuffled(model: Odd, x: Tensor) -> Tensor:
    tokens = model.tokens(x)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))
    return sdpa(*model.qkv(tokens, tokens[:, order]))


def values_shifted(model: Odd, x: Tensor) -> Tensor:
    tokens = model.tokens(x)
    return sdpa(*model.qkv(tokens, tokens, tokens.roll(1, 1)))


def transposed_keys(model: Odd, x: Tensor) -> Tensor:
    return sdpa(*model.qkv(model.tokens(x), model.tokens(x.transpose(3, 4))))


def pooled_keys(model: Odd, x: Tensor) -> Tensor:
    return sdpa(*model.qkv(model.tokens(x), model.tokens(F.avg_pool3d(x, (1, 2, 2)))))


def first_frame_keys(model: Odd, x: Tensor) -> Tensor:
    return sdpa(*model.qkv(model.tokens(x), model.tokens(x[:, :, :1])))


def one_frame_asks_all(model: Odd, x: Tensor) -> Tensor:
    return sdpa(*model.qkv(model.tokens(x[:, :, :1]), model.tokens(x)))


def learned_queries(model: Odd, x: Tensor) -> Tensor:
    return sdpa(*model.qkv(model.learned.expand(x.shape[0], -1, -1), model.tokens(x)))


def keys_of_the_first_sample(model: Odd, x: Tensor) -> Tensor:
    tokens = model.tokens(x)
    return sdpa(*model.qkv(tokens, tokens[:1].expand_as(tokens)))


def keys_of_the_other_sample(model: Odd, x: Tensor) -> Tensor:
    tokens = model.tokens(x)
    return sdpa(*model.qkv(tokens, tokens.flip(0)))


def one_sample_swapped(model: Odd, x: Tensor) -> Tensor:
    """Sample 0 asks itself, samples 1 and 2 each other."""
    tokens = model.tokens(x)
    return sdpa(*model.qkv(tokens, torch.cat([tokens[:1], tokens[1:].flip(0)])))


def keys_of_the_other_half(model: Odd, x: Tensor) -> Tensor:
    """Guidance in one batch, and the conditional half asks the unconditional one."""
    first, second = model.tokens(x).split([1, x.shape[0] - 1])
    return sdpa(*model.qkv(first, second[:1]))


def samples_ask_each_other(model: Odd, x: Tensor) -> Tensor:
    return sdpa(*model.qkv(model.tokens(x).transpose(0, 1)))


def first_frame_repeated(model: Odd, x: Tensor) -> Tensor:
    first = model.tokens(x[:, :, :1])
    return sdpa(*model.qkv(model.tokens(x), first.repeat(1, T, 1)))


def mixed_along_the_sequence(model: Odd, x: Tensor) -> Tensor:
    """Keys are weighted sums of all tokens, as many as there are tokens."""
    tokens = model.tokens(x)
    weights = model.learned[0].mean(-1) * torch.ones(TOKENS, 1)
    return sdpa(*model.qkv(tokens, F.linear(tokens.mT, weights).mT))


def channels_attend(model: Odd, x: Tensor) -> Tensor:
    return sdpa(*(part.mT for part in model.qkv(model.tokens(x))))


def heads_attend(model: Odd, x: Tensor) -> Tensor:
    return sdpa(*(part.transpose(1, 2) for part in model.qkv(model.tokens(x))))


TWO_VIDEOS = [
    another_video, values_of_another_video, queries_of_another_video, keys_see_a_second_video
]  # fmt: skip
OTHER_TOKENS = [
    previous_frame, shifted_rows, mirrored, shuffled, values_shifted, transposed_keys, pooled_keys,
    first_frame_keys, one_frame_asks_all, learned_queries, first_frame_repeated,
    mixed_along_the_sequence, channels_attend, heads_attend,
]  # fmt: skip
OTHER_SAMPLES = [
    keys_of_the_first_sample, keys_of_the_other_sample, one_sample_swapped, keys_of_the_other_half,
    samples_ask_each_other,
]  # fmt: skip


@pytest.mark.parametrize("attend", TWO_VIDEOS, ids=name_of)
@pytest.mark.parametrize("batch", [1, T])
def test_another_video_of_the_same_grid(attend: Callable[..., Tensor], batch: int) -> None:
    sites = left(odd(attend), latents(batch=batch), latents(batch=batch) * 2.0)
    assert {site.reason for site in sites} <= {"CROSS_ATTENTION", "NO_PROVENANCE", "TOKENS_DIFFER"}


@pytest.mark.parametrize("attend", OTHER_TOKENS, ids=name_of)
@pytest.mark.parametrize("batch", [1, T])
def test_keys_are_other_tokens_of_the_same_video(attend: Callable[..., Tensor], batch: int) -> None:
    sites = left(odd(attend), latents(batch=batch))
    known = {"CROSS_ATTENTION", "NO_PROVENANCE", "TOKENS_DIFFER"}
    assert {site.reason for site in sites} <= known | {"ONE_FRAME"}


@pytest.mark.parametrize("attend", OTHER_SAMPLES, ids=name_of)
def test_keys_of_another_sample_of_the_batch(attend: Callable[..., Tensor]) -> None:
    sites = left(odd(attend), latents(batch=3))
    known = {"CROSS_ATTENTION", "NO_PROVENANCE", "TOKENS_DIFFER"}
    assert {site.reason for site in sites} <= known | {"FACTORISED"}


def listed(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A batch made of two inputs, the keys of the second one changed."""

    def attend(model: Odd, x: Tensor, y: Tensor) -> Tensor:
        first, second = model.tokens(x), model.tokens(y)
        return sdpa(*model.qkv(torch.cat([first, second]), torch.cat([first, change(second)])))

    return attend


@pytest.mark.parametrize(
    "change",
    [lambda x: x.roll(1, 1), lambda x: x.flip(1), lambda x: x.mean(1, keepdim=True).expand_as(x)],
    ids=["rolled", "mirrored", "mean"],
)
def test_a_list_of_samples_of_which_one_has_other_keys(change: Callable[[Tensor], Tensor]) -> None:
    left(odd(listed(change)), latents(), latents() * 2.0)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2, 4, 3), (0, 1, 3, 2, 4), (0, 1, 4, 3, 2)])
def test_samples_in_different_token_orders(listed: bool, order: tuple[int, ...]) -> None:
    """All sides are equal, so that only the order tells the samples apart."""

    def attend(model: Odd, x: Tensor, *others: Tensor) -> Tensor:
        first, second = (x, others[0]) if others else (x[:1], x[1:])
        tokens = torch.cat([model.tokens(first), model.tokens(second.permute(order))])
        return sdpa(*model.qkv(tokens))

    cube = latents((4, 4, 4), 1 if listed else 2)
    sites = left(odd(attend), cube, *([cube * 2.0] if listed else []))
    assert {site.reason for site in sites} == {"TOKEN_ORDER"}


def test_text_of_the_video_s_length_with_positions_of_its_own() -> None:
    """Text of T * H * W tokens, rotated by its own positions, beside a video."""

    def attend(model: Odd, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = model.qkv(model.other(text))
        wave = torch.arange(TOKENS, dtype=torch.float32)[:, None] * torch.linspace(0.1, 1, 16)
        words = sdpa(q * wave.cos(), k * wave.cos(), v)
        video = sdpa(*model.qkv(model.tokens(x)))
        return video + sdpa(video, words, words)

    _, sites = run(odd(attend), latents(), torch.randn(1, TOKENS, 4))
    assert [site.reason for site in sites] == ["TEXT_ONLY", None, "CROSS_ATTENTION"]
    assert sites[1].grid == GRID
