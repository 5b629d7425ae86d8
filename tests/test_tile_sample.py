"""Errors added up from partial outputs are those of running sparse attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from veda_compile import Context, Extra, Layout, Plan, Video, sparse_attention
from veda_compile.keep_maps import LADDER, keep_maps
from veda_compile.kernels.call import AttentionCall
from veda_compile.kernels.scores import key_features, query_features, tile_scores
from veda_compile.kernels.statistics import tile_statistics
from veda_compile.kernels.tiles import tile_table
from veda_compile.tile_sample import tile_samples

CASES = [
    pytest.param(Layout.of(Video(4, 6, 8)), (2, 4, 8), id="video"),
    pytest.param(Layout.of(Video(5, 7, 9), Extra(11)), (4, 4, 4), id="ragged, text last"),
    pytest.param(Layout.of(Extra(5), Video(3, 5, 7), Video(1, 5, 7)), (1, 8, 8), id="two videos"),
    pytest.param(Layout.of(Video(3, 8, 8), Context(6)), (1, 8, 8), id="context"),
]


def qkv(layout: Layout, heads: int, kv_heads: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return (
        2 * torch.randn(2, heads, layout.query_length, 16, generator=generator),
        torch.randn(2, kv_heads, layout.length, 16, generator=generator),
        torch.randn(2, kv_heads, layout.length, 16, generator=generator),
    )


@pytest.mark.parametrize(("layout", "shape"), CASES)
@pytest.mark.parametrize("hidden", [False, True], ids=["", "key_valid"])
def test_errors_are_those_of_sparse_attention(
    layout: Layout, shape: tuple[int, int, int], hidden: bool
) -> None:
    q, k, v = qkv(layout, 4, 2)
    valid = None
    if hidden:
        valid = torch.rand(2, layout.length, generator=torch.Generator().manual_seed(2)) < 0.8
        k = k.masked_fill(~valid[:, None, :, None], torch.nan)
        v = v.masked_fill(~valid[:, None, :, None], torch.nan)
    table = tile_table(layout, shape, q.device)
    everything = torch.arange(layout.query_length)[table.tile_of_query >= 0]
    densities = (0.2, 0.5)
    plan = Plan.uniform(4, shape, 0.5)
    scores = _scores(AttentionCall(q, k, v, layout, plan, 0.25, valid), table)
    for density_at, density in enumerate(densities):
        plan = Plan.uniform(4, shape, density)
        sparse = sparse_attention(
            q, k, v, layout=layout, plan=plan, scale=0.25, key_valid=valid, executor="reference"
        )
        dense = sparse_attention(
            q, k, v, layout=layout, plan=Plan.uniform(4, shape, 1.0), scale=0.25, key_valid=valid,
            executor="reference",
        )  # fmt: skip
        wrong = (sparse - dense)[:, :, everything].square().sum((2, 3))
        energy = dense[:, :, everything].square().sum((2, 3))
        found, norm = torch.zeros(2, 4), torch.zeros(2, 4)
        for batch, head, sample in tile_samples(q, k, v, layout, shape, everything, 0.25, valid):
            keep = keep_maps(scores[batch, head, sample.tiles], sample.tiles, layout, shape,
                             densities)  # fmt: skip
            found[batch, head] += sample.errors(keep)[density_at]
            norm[batch, head] += sample.energy
        torch.testing.assert_close(found, wrong, rtol=2e-4, atol=1e-6)
        torch.testing.assert_close(norm, energy, rtol=2e-4, atol=1e-6)


def _scores(call: AttentionCall, table: object) -> torch.Tensor:
    heads = list(range(call.plan.heads))
    q_stats = tile_statistics(call.q, table.query_rows, None, False)  # type: ignore[attr-defined]
    keys = call.k[:, [head // call.kv_repeat for head in heads]]
    k_stats = tile_statistics(keys, table.rows, call.key_valid, False)  # type: ignore[attr-defined]
    return tile_scores(
        query_features(q_stats, call.plan, heads, call.scale),
        key_features(k_stats, call.plan, heads),
        k_stats.count,
        call.plan,
    )


def test_mass_and_extremes() -> None:
    layout = Layout.of(Video(4, 8, 8), Extra(7))
    q, k, v = qkv(layout, 2, 2)
    dense = torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1)
    table = tile_table(layout, (1, 8, 8), q.device)
    for batch, head, sample in tile_samples(
        q, k, v, layout, (1, 8, 8), torch.tensor([3, 70, 200]), 0.25
    ):
        for place, tile in enumerate(sample.tiles.tolist()):
            rows = dense[batch, head, table.query_rows[tile].long()]
            for other in range(4):
                block = rows[:, table.rows[other].long()]
                assert torch.allclose(sample.mass[place, other], block.sum(1).mean(), atol=1e-6)
                assert torch.allclose(sample.highest[place, other], block.max(), atol=1e-6)
        assert torch.allclose(sample.mass.sum(1) + sample.rest_weight.mean(1), torch.ones(3))


def test_keeping_everything_is_dense() -> None:
    layout = Layout.of(Video(3, 5, 6), Extra(4))
    q, k, v = qkv(layout, 1, 1)
    for _, _, sample in tile_samples(q, k, v, layout, (1, 8, 8), torch.tensor([0, 50]), 0.25):
        scores = torch.randn(len(sample.tiles), sample.mass.shape[1])
        errors = sample.errors(keep_maps(scores, sample.tiles, layout, (1, 8, 8)))
        assert errors[-1] < 1e-10
        assert LADDER[-1] == 1.0
        assert (errors[:-1].diff() <= 1e-6).all() or errors[0] > 0


def test_a_chosen_tile_is_sampled_once() -> None:
    layout = Layout.of(Video(1, 8, 16))
    q, k, v = qkv(layout, 1, 1)
    tokens = torch.tensor([0, 1, 2, 20])
    counts = [len(s.tiles) for _, _, s in tile_samples(q, k, v, layout, (1, 8, 8), tokens, 0.25)]
    assert counts == [1, 1]  # one for each batch element
    out = F.scaled_dot_product_attention(q, k, v, scale=0.25)
    for batch, _, sample in tile_samples(q, k, v, layout, (1, 8, 8), tokens, 0.25):
        table = tile_table(layout, (1, 8, 8), q.device)
        rows = table.query_rows[sample.tiles[0]].long()
        assert torch.allclose(sample.energy, out[batch, 0, rows].square().sum(), rtol=1e-4)
