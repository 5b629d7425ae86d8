"""Attention backends of diffusers: whichever is chosen, the same calls become sparse."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from compiling import compiled
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from small_transformers import distance, hunyuan, hunyuan_inputs, run, wan, wan_inputs

import veda_compile

pytestmark = pytest.mark.usefixtures("fresh_compiler", "default_backend")

GRID = (3, 4, 6)


@pytest.fixture
def default_backend() -> Iterator[None]:
    """Choosing a backend for one model chooses it for all: put it back."""
    chosen = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = chosen


@pytest.mark.parametrize("name", ["native", "_native_math", "_native_flash", "flex"])
def test_video_attention_is_sparse_under_every_backend(name: str) -> None:
    model, inputs = wan(layers=2), wan_inputs(GRID)
    dense = run(model, inputs)
    model.set_attention_backend(name)
    out = run(compiled(model), inputs)
    sites = veda_compile.report().sites
    assert [site.reason for site in sites] == [None, "CROSS_ATTENTION"] * 2, sites
    assert [site.grid for site in sites if site.rewritten] == [GRID] * 2
    assert distance(out, dense) < 2e-5


@pytest.mark.parametrize("name", ["_native_math", "flex"])
def test_masked_attention_under_other_backends(name: str) -> None:
    """flex attention gets its mask as a block mask made in the graph."""
    model, inputs = hunyuan(), hunyuan_inputs(GRID)
    dense = run(model, inputs)
    model.set_attention_backend(name)
    out = run(compiled(model), inputs)
    video = [site for site in veda_compile.report().sites if site.grid is not None]
    assert [site.reason for site in video] == [None] * 4
    assert distance(out, dense) < 2e-5


def test_global_state_is_as_before() -> None:
    model = wan(layers=1)
    model.set_attention_backend("_native_math")
    run(compiled(model), wan_inputs(GRID))
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()
