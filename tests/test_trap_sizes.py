"""Real models with sizes that could mislead: text as long as the video, equal sides, one frame."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiling import compiled, sparse_calls
from odd_attention import H, W
from torch import nn
from toys import GRID, TOKENS

import veda_compile
from benchmarks.zoo import call, entry

pytestmark = pytest.mark.usefixtures("fresh_compiler")

MODELS = ["wan t2v", "hunyuan", "cogvideox 5b", "ltx"]
SIZES: list[tuple[str, tuple[int, int, int], int]] = [
    *((name, (4, 4, 4), 4) for name in MODELS),  # T = H = W = B
    ("wan t2v", (2, 2, 6), 2),  # T = H = B = heads
    ("wan t2v", (3, 4, 6), 1),  # H * W = head_dim
    ("ltx", (3, 4, 6), 3),  # T = B, H * W = head_dim
    ("hunyuan", (2, 6, 2), 2),  # T = W = B = heads, T * H = text
]


def check(name: str, grid: tuple[int, int, int], inputs: dict[str, Any], model: nn.Module) -> None:
    """The model's sites are rewritten with the true grid, and nothing else is."""
    with torch.no_grad(), sparse_calls() as calls:
        out = call(compiled(model), inputs)
    sites = veda_compile.report().sites
    assert [site.layer for site in sites if site.rewritten] == list(entry(name).layers)
    assert {c.layout.videos[0][1].grid for c, _ in calls} == {grid}
    with torch.no_grad():
        torch.testing.assert_close(out, call(model, inputs), atol=3e-5, rtol=0.0)


@pytest.mark.parametrize(("name", "grid", "batch"), SIZES)
def test_equal_sizes(name: str, grid: tuple[int, int, int], batch: int) -> None:
    model, inputs = entry(name).make(grid, batch)
    check(name, grid, inputs, model)


@pytest.mark.parametrize(
    ("name", "length"), [*((name, TOKENS) for name in MODELS), ("hunyuan", H * W)]
)
def test_text_as_long_as_the_video_or_a_frame(name: str, length: int) -> None:
    model, inputs = entry(name).make(GRID, 1)
    text = inputs["encoder_hidden_states"]
    inputs["encoder_hidden_states"] = torch.randn(1, length, text.shape[-1])
    mask = inputs.get("encoder_attention_mask")
    if mask is not None:
        inputs["encoder_attention_mask"] = torch.ones(1, length, dtype=mask.dtype)
    check(name, GRID, inputs, model)


@pytest.mark.parametrize("name", MODELS)
def test_one_frame_is_an_image(name: str) -> None:
    model, inputs = entry(name).make((1, 6, 10), 2)
    with torch.no_grad():
        out = call(compiled(model, density=0.3), inputs)
        assert torch.equal(out, call(model, inputs))
    sites = veda_compile.report().sites
    assert [site for site in sites if site.rewritten] == []
    usual = {"ONE_FRAME", "CROSS_ATTENTION", "TEXT_ONLY"}
    assert {site.reason for site in sites} <= usual
