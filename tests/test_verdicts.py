"""Why attention stays dense: one test a reason, through the backend and its report."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiling import run
from torch import Tensor, nn
from toys import GRID, TOKENS, Attention, Video, latents, toy

import veda_compile
from veda_compile.passes.reasons import Reason
from veda_compile.report import SiteRecord

pytestmark = pytest.mark.usefixtures("fresh_compiler")

sdpa = F.scaled_dot_product_attention


def left(model: nn.Module, *args: Tensor, **options: Any) -> list[SiteRecord]:
    """The calls of a model that must all stay dense, bit for bit."""
    out, sites = run(model, *args, **options)
    with torch.no_grad():
        assert torch.equal(out, model(*args))
    assert not any(site.rewritten for site in sites)
    for site in sites:
        assert site.explanation and Reason[str(site.reason)].value in site.explanation
    return sites


class TextVideo(Video):
    """Cross-attention to as many text tokens as there are video tokens, and a text refiner."""

    def __init__(self) -> None:
        super().__init__(sdpa)
        self.text = nn.Linear(5, 32)
        self.refiner, self.cross = Attention(sdpa), Attention(sdpa)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        text = self.text(text)
        text = text + self.refiner(text)
        x = self.embed(self.tokens(x))
        return self.cross(x + self.blocks[0](x), text)


def test_cross_attention_and_text_of_the_video_s_length() -> None:
    model = TextVideo().eval().requires_grad_(False)
    _, sites = run(model, latents(), torch.randn(1, TOKENS, 5))
    assert [(site.layer, site.reason) for site in sites] == [
        ("refiner", "TEXT_ONLY"),
        ("blocks.0", None),
        ("cross", "CROSS_ATTENTION"),
    ]
    assert sites[1].grid == GRID


class Factorised(Video):
    """Attention within frames, then along time."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.movedim(1, -1))  # (B, T, H, W, C)
        space = x.flatten(2, 3).flatten(0, 1)
        space = space + self.blocks[0](space)
        batch, t, h, w, width = x.shape
        time = space.view(batch, t, h * w, width).transpose(1, 2).flatten(0, 1)
        return time + self.blocks[1](time)


@pytest.mark.parametrize("batch", [1, 2, GRID[0]])
def test_factorised(batch: int) -> None:
    model = Factorised(sdpa).eval().requires_grad_(False)
    assert [s.reason for s in left(model, latents(batch=batch))] == ["FACTORISED"] * 2


def test_one_frame() -> None:
    assert {s.reason for s in left(toy(), latents((1, 8, 9)))} == {"ONE_FRAME"}


def additive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, attn_mask=torch.arange(TOKENS)[None] * -0.1)


def pairwise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    near = (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs() < 20
    return sdpa(q, k, v, attn_mask=near[None, None])


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, dropout_p=0.25)


def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT + torch.arange(TOKENS) * -0.1, -1) @ v


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (partial(sdpa, is_causal=True), "CAUSAL"),
        (additive, "MASK_NOT_A_KEY_LENGTH"),
        (pairwise, "MASK_NOT_A_KEY_LENGTH"),
        (biased, "MASK_NOT_A_KEY_LENGTH"),
    ],
)
def test_more_than_plain_attention(attend: Callable[..., Tensor], reason: str) -> None:
    assert {s.reason for s in left(toy(attend), latents())} == {reason}


def test_dropout() -> None:
    _, sites = run(toy(dropped).train(), latents())
    assert {site.reason for site in sites} == {"DROPOUT"}


def test_gradients() -> None:
    model = toy().requires_grad_(True)
    x = latents()
    compiled = torch.compile(
        model, backend="veda", options={"min_tokens": 0, "sidecar": None, "inner": "aot_eager"}
    )
    compiled(x).sum().backward()
    gradients = [p.grad for p in model.parameters()]
    assert {s.reason for s in veda_compile.report().sites} == {"REQUIRES_GRAD"}
    model.zero_grad()
    model(x).sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_too_few_tokens_by_default() -> None:
    sites = left(toy(), latents(), min_tokens="auto")
    assert {s.reason for s in sites} == {"TOO_FEW_TOKENS"}
    assert "72 video tokens" in str(sites[0].explanation)


@pytest.mark.parametrize("names", [("blocks.1",), (1,), ("1",)])
def test_dense_layers_by_name_and_number(names: tuple[str | int, ...]) -> None:
    _, sites = run(toy(layers=3), latents(), dense_layers=names)
    assert [site.reason for site in sites] == [None, "DENSE_LAYER", None]


def test_dtype() -> None:
    sites = left(toy().double(), latents(dtype=torch.float64))
    assert {s.reason for s in sites} == {"DTYPE"}
    assert "float64" in str(sites[0].explanation)


class Shuffled(Video):
    """Tokens in an order that depends on the data."""

    def tokens(self, x: Tensor) -> Tensor:
        x = super().tokens(x)
        return x[:, x[0].sum(-1).argsort()]


def test_tokens_that_cannot_be_followed() -> None:
    model = Shuffled(sdpa).eval().requires_grad_(False)
    sites = left(model, latents())
    assert {s.reason for s in sites} == {"NO_PROVENANCE"}
    assert "getitem" in str(sites[0].explanation)


class WidthMajor(Video):
    """Tokens numbered w slowest, or frame by frame in columns."""

    order: tuple[int, ...] = (0, 1, 2, 4, 3)

    def tokens(self, x: Tensor) -> Tensor:
        return super().tokens(x.permute(self.order))


@pytest.mark.parametrize("order", [(0, 1, 2, 4, 3), (0, 1, 3, 2, 4), (0, 1, 4, 3, 2)])
@pytest.mark.parametrize("grid", [GRID, (4, 4, 4)])
def test_other_token_orders(order: tuple[int, ...], grid: tuple[int, int, int]) -> None:
    model = WidthMajor(sdpa).eval().requires_grad_(False)
    model.order = order
    out, sites = run(model, latents(grid))
    assert {site.grid for site in sites if site.rewritten} == {grid}
    torch.testing.assert_close(out, model(latents(grid)), atol=2e-5, rtol=0.0)


@pytest.mark.parametrize("grid", [(4, 4, 4), (2, 6, 6), (6, 2, 2)])
@pytest.mark.parametrize("batch", [1, 2, 4, 6])
def test_equal_sides_confuse_nothing(grid: tuple[int, int, int], batch: int) -> None:
    model, x = toy(), latents(grid, batch)
    out, sites = run(model, x)
    assert [site.grid for site in sites if site.rewritten] == [grid] * 2
    torch.testing.assert_close(out, model(x), atol=2e-5, rtol=0.0)
