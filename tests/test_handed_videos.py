"""Text attention in a graph that makes the tokens of a video and hands them on to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from compiling import QUICK, compiled
from torch import Tensor, nn

import veda_compile
from benchmarks.zoo import call, entry

GRID = (3, 4, 5)
TOKENS = 60


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    veda_compile.reset_report()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["framepack", "framepack batch 2", "hunyuan 1.5"])
def test_strict_accepts_models_with_a_text_refiner_before_the_break(name: str) -> None:
    known = entry(name)
    model, inputs = known.make(GRID)
    fn = torch.compile(model, backend="veda", options={**QUICK, "density": 1.0, "strict": True})
    with torch.no_grad():
        wanted = call(model, inputs)
        for _ in range(4):  # what is missed raises later than what is dense
            torch.testing.assert_close(call(fn, inputs), wanted, atol=2e-5, rtol=0.0)
    veda_compile.report().require()
    dense = [site for site in veda_compile.report().sites if not site.rewritten]
    assert [site.reason for site in dense] == ["TEXT_ONLY"]
    assert "hands on a video of 60" in str(dense[0].explanation)


def self_attention(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


def handed_on(x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    return x.flatten(2).transpose(1, 2) * 2.0, self_attention(text)


def not_as_tokens(x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    return x * 2.0, self_attention(text)


def in_windows(x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    halves = text.unflatten(1, (2, -1)).flatten(0, 1)
    return x.flatten(2).transpose(1, 2) * 2.0, self_attention(halves)


def over_rows_of_the_video(x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    columns = x.mean((2, 3)).transpose(1, 2)
    return x.flatten(2).transpose(1, 2) * 2.0, self_attention(columns)


def beside_unknown_tokens(x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    unknown = torch.linalg.qr(text)[1]
    return x.flatten(2).transpose(1, 2) * 2.0, self_attention(torch.cat([text, unknown], 1))


class Cut(nn.Module):
    """One graph up to a break, then a second one that attends to nothing."""

    def __init__(self, first: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        tokens, words = self.first(x, text)
        torch._dynamo.graph_break()
        return tokens.sum() + words.sum()


@pytest.mark.parametrize(
    ("first", "words", "reason"),
    [
        (handed_on, TOKENS - 1, "TEXT_ONLY"),
        (handed_on, TOKENS, "NO_GRID"),  # it may be a second video
        (not_as_tokens, 12, "NO_GRID"),
        (in_windows, 12, "NO_GRID"),
        (over_rows_of_the_video, 12, "NO_GRID"),
        (beside_unknown_tokens, 12, "NO_GRID"),
    ],
)
def test_only_what_cannot_be_the_video_is_text(
    first: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], words: int, reason: str
) -> None:
    fn = compiled(Cut(first))
    with torch.no_grad():
        fn(torch.randn(2, 12, *GRID), torch.randn(2, words, 12))
    assert [site.reason for site in veda_compile.report().sites] == [reason]
