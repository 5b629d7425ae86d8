"""Common models, traced once: the right calls are rewritten, and computed rightly."""

from __future__ import annotations

import pytest
import torch
from compiling import GRID, SETTINGS, Ran, traced

from benchmarks.zoo import FIRST, entry
from veda_compile.kernels.layout import Layout, Video
from veda_compile.kernels.selection import kept_map, select_tiles
from veda_compile.kernels.tiles import tile_table

NAMES = [known.name for known in FIRST if known.name != "hunyuan"]  # it is run in bfloat16


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_video_self_attention_is_rewritten_and_nothing_else(name: str) -> None:
    model, sites = entry(name), traced(name).ran["full cpu"].sites
    assert [site.grid for site in sites if site.rewritten] == [GRID] * model.sites
    left = [site for site in sites if not site.rewritten]
    assert len(left) == model.others
    assert {site.reason for site in left} <= {"CROSS_ATTENTION", "TEXT_ONLY"}
    assert all(site.explanation and site.grid is None for site in left)


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_ran_is_what_was_reported(name: str, setting: str) -> None:
    model, ran = entry(name), traced(name).ran[setting]
    assert len(ran.sparse) == model.sites
    assert ran.dense == model.others
    first, last = (((0, length),) if length else () for length in (model.first, model.last))
    for call, _ in ran.sparse:
        segments = tuple(
            segment.grid if isinstance(segment, Video) else (0, segment.length)
            for segment in call.layout.segments
        )
        assert segments == (*first, GRID, *last)
        assert call.plan.density[0] == SETTINGS[setting]["density"]


@pytest.mark.parametrize("setting", ["full cpu", "full reference"])
def test_density_1_is_dense_attention(name: str, setting: str) -> None:
    trace = traced(name)
    torch.testing.assert_close(trace.ran[setting].out, trace.dense, atol=2e-5, rtol=0.0)


def test_density_03_is_sparse_attention(name: str) -> None:
    trace = traced(name)
    cpu, reference = trace.ran["sparse cpu"], trace.ran["sparse reference"]
    assert (cpu.out - trace.dense).abs().max() > 1e-2
    torch.testing.assert_close(cpu.out, reference.out, atol=2e-5, rtol=0.0)
    for ran in (cpu, reference):
        _check_calls(ran)


def _check_calls(ran: Ran) -> None:
    """Each sparse call equals torch's own attention under a token mask of the kept tiles."""
    for call, out in ran.sparse:
        kept = torch.ones(call.q.shape[0], call.q.shape[1], *2 * call.q.shape[2:3]).bool()
        selection = select_tiles(call)
        for head, shape in enumerate(call.plan.tile_shapes):
            tile = _tile_of_token(call.layout, shape)
            table = tile_table(call.layout, shape, call.q.device)
            tiles = kept_map(selection, [head], table.tiles)[:, 0]
            both = (tile[:, None] >= 0) & (tile[None, :] >= 0)
            safe = tile.clamp(min=0)
            kept[:, head] = tiles[:, safe][:, :, safe] | ~both
        if call.key_valid is not None:
            kept &= call.key_valid[:, None, None, :]
        dense = torch.nn.functional.scaled_dot_product_attention(
            call.q, call.k, call.v, attn_mask=kept, scale=call.scale
        )
        torch.testing.assert_close(out, dense, atol=2e-5, rtol=0.0)
        pairs = kept[:, :, ~(tile < 0)][..., ~(tile < 0)]
        assert 0.1 < pairs.float().mean() < 0.6


def _tile_of_token(layout: Layout, shape: tuple[int, int, int]) -> torch.Tensor:
    """(N,) number of each token's tile, -1 for extra tokens: tiles in raster order."""
    places = []
    for segment in layout.segments:
        if not isinstance(segment, Video):
            places.append(torch.full((segment.length,), -1))
            continue
        t, h, w = (
            torch.arange(side) // edge for side, edge in zip(segment.grid, shape, strict=True)
        )
        counts = [int(axis.max()) + 1 for axis in (t, h, w)]
        number = (t[:, None, None] * counts[1] + h[:, None]) * counts[2] + w
        places.append(number.flatten())
    return torch.cat(places)


@pytest.mark.parametrize("name", ["wan t2v", "hunyuan", "plain float32"])
def test_bfloat16(name: str) -> None:
    trace = traced(name, torch.bfloat16)
    for setting in ("full cpu", "full reference"):
        ran = trace.ran[setting]
        assert len(ran.sparse) == entry(name).sites
        assert all(call.q.dtype == torch.bfloat16 for call, _ in ran.sparse)
        error = (ran.out.float() - trace.dense.float()).abs().max() / trace.dense.abs().max()
        assert error <= 2e-2
