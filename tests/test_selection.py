"""Which tiles are kept, rule by rule, for every executor's own selection."""

import math

import pytest
import torch
from naive_attention import naive_score
from running_executors import EXECUTORS_HERE

from veda_compile.kernels.budget import tiles_to_keep
from veda_compile.kernels.call import AttentionCall, Selection
from veda_compile.kernels.executors import get_executor
from veda_compile.kernels.layout import Extra, Layout, Video
from veda_compile.kernels.plan import Plan
from veda_compile.kernels.scores import key_features, query_features, tile_scores
from veda_compile.kernels.selection import kept_map, lists_of, select_tiles
from veda_compile.kernels.statistics import tile_statistics
from veda_compile.kernels.tiles import tile_table

CPU = torch.device("cpu")
EVERY_EXECUTOR = pytest.mark.parametrize("executor", EXECUTORS_HERE)
ROW = (1, 1, 64)
"""A tile of one row of 64 columns: Video(1, n, 64) holds n of them, one after the other."""


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lists(selection: Selection, batch=0, head=0):
    """The kept key tiles of every query tile, of heads with as many tiles as there are rows."""
    keep = kept_map(selection, [head], selection.counts.shape[2])[batch, 0]
    return [row.nonzero().flatten().tolist() for row in keep]


def choose(executor, q, k, layout, plan, scale=1.0, key_valid=None):
    call = AttentionCall(q, k, k, layout, plan, scale, key_valid)
    return get_executor(executor).select(call)


def constant_in_tiles(values, rows=64, head_dim=64):
    """(1, 1, rows * tiles, head_dim): channel 0 holds `values[tile]`, the others 0."""
    x = torch.zeros(1, 1, rows * len(values), head_dim)
    x[..., 0] = torch.tensor(values).repeat_interleave(rows)
    return x


@pytest.mark.parametrize("score", ["closed_form", "mean", "projection"])
@pytest.mark.parametrize("rank", [None, 1, 3, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_scores_are_the_formula(score, rank, masked):
    if score == "mean" and rank is not None:
        pytest.skip("the mean score has no second-order term")
    layout = Layout.of(Extra(3), Video(3, 4, 5))
    projection = 0.3 * normal(2, 2, 18, 6, seed=3) if score == "projection" else None
    factors = None if rank is None else normal(2, 2, 6, rank, seed=4)
    plan = Plan(((2, 3, 2),) * 2, (0.5,) * 2, score, projection, factors)
    q, k = normal(2, 2, 63, 6), normal(2, 2, 63, 6, seed=1) + 0.5
    valid = torch.rand(2, 63, generator=torch.Generator().manual_seed(2)) > 0.3 if masked else None
    table, scale = tile_table(layout, (2, 3, 2), CPU), 0.7
    q_stats = tile_statistics(q, table.rows, None, score == "projection")
    k_stats = tile_statistics(k, table.rows, valid, score == "projection")
    found = tile_scores(
        query_features(q_stats, plan, [0, 1], scale),
        key_features(k_stats, plan, [0, 1]),
        k_stats.count,
        plan,
    )
    assert found.shape == (2, 2, table.tiles, table.tiles)
    rows = [[t for t in tile if t >= 0] for tile in table.rows.tolist()]
    for b in range(2):
        for h in range(2):
            for i, q_rows in enumerate(rows):
                for j, k_rows in enumerate(rows):
                    counted = [t for t in k_rows if valid is None or valid[b, t]]
                    right = -math.inf
                    if counted:
                        one, other = q[b, h, q_rows].double(), k[b, h, counted].double()
                        right = naive_score(plan, h, one, other, scale)
                    assert float(found[b, h, i, j]) == pytest.approx(right, rel=1e-5, abs=1e-5)


@EVERY_EXECUTOR
def test_a_projection_of_zeros_is_the_closed_form(executor):
    layout, shapes, density = Layout.of(Video(3, 8, 40)), ((1, 8, 8), (2, 4, 8)), (0.3, 0.3)
    q, k = normal(1, 2, 960, 64), normal(1, 2, 960, 64, seed=1)
    projection = 0.1 * normal(2, 2, 192, 64, seed=2)
    projection[:, 0] = 0.0  # the first head falls back, the second does not
    right = choose(executor, q, k, layout, Plan(shapes, density))
    plan = Plan(shapes, density, "projection", projection)
    found = choose(executor, q, k, layout, plan)
    assert lists(found) == lists(right)
    assert lists(found, head=1) != lists(right, head=1)


@EVERY_EXECUTOR
@pytest.mark.parametrize("projected", [False, True])
def test_factors_replace_the_second_order_term(executor, projected):
    """Channel 0 alone tells the tiles apart; factors that leave it out make them tie."""
    q, k = constant_in_tiles([1.0] * 4), spread([0.1, 0.2, 0.9, 0.4])
    layout, shapes = Layout.of(Video(1, 4, 64)), (ROW,)
    projection = torch.zeros(2, 1, 192, 64) if projected else None
    score = "projection" if projected else "closed_form"
    seeing, blind = torch.zeros(2, 1, 64, 2), torch.zeros(2, 1, 64, 2)
    seeing[:, :, 0, 1], blind[:, :, 1:, 1] = 1.0, 1.0
    turned = seeing.clone()
    turned[1] *= -1
    wanted = {
        seeing: [[0, 2], [1, 2], [2, 3], [2, 3]],
        blind: [[0, 1], [0, 1], [0, 2], [0, 3]],
        turned: [[0, 1], [0, 1], [0, 2], [0, 3]],
    }
    for factors, right in wanted.items():
        plan = Plan(shapes, (0.5,), score, projection, factors)
        assert lists(choose(executor, q, k, layout, plan)) == right


def test_variance_keeps_its_digits_on_a_large_mean():
    table = tile_table(Layout.of(Video(1, 1, 64)), ROW, CPU)
    x = 1000 + 0.1 * normal(1, 1, 64, 4)
    found = tile_statistics(x, table.rows, None, False).variance[0, 0, 0]
    right = x[0, 0].double().var(0, correction=0)
    torch.testing.assert_close(found.double(), right, rtol=1e-3, atol=0)


def test_nan_outside_the_counted_rows_does_not_reach_statistics():
    table = tile_table(Layout.of(Extra(1), Video(1, 1, 6)), (1, 1, 4), CPU)
    x = normal(1, 1, 7, 2)
    valid = torch.tensor([[False, True, True, False, True, False, False]])
    x[:, :, ~valid[0]] = torch.nan
    stats = tile_statistics(x, table.rows, valid, True)
    assert stats.count.flatten().tolist() == [3, 0]
    for name in ("mean", "second", "variance", "highest", "lowest"):
        values = getattr(stats, name)
        assert values.isfinite().all()
        assert torch.equal(values[0, 0, 1], torch.zeros(2))  # no counted row: zeros
    assert stats.highest is not None
    assert torch.equal(stats.highest[0, 0, 0], x[0, 0, [1, 2, 4]].amax(0))


@EVERY_EXECUTOR
def test_the_best_tiles_are_kept(executor):
    q = constant_in_tiles([1.0] * 4)
    k = constant_in_tiles([0.0, 3.0, 1.0, 2.0])
    found = choose(executor, q, k, Layout.of(Video(1, 4, 64)), Plan.uniform(1, ROW, 0.5))
    # own tile and the best other one
    assert lists(found) == [[0, 1], [1, 3], [1, 2], [1, 3]]
    assert (found.indices.dtype, found.counts.dtype) == (torch.int32, torch.int32)


@EVERY_EXECUTOR
def test_the_own_tile_is_kept_however_bad(executor):
    q = constant_in_tiles([5.0, 5.0, 5.0])
    k = constant_in_tiles([-9.0, 0.0, 9.0])
    found = choose(executor, q, k, Layout.of(Video(1, 3, 64)), Plan.uniform(1, ROW, 0.01))
    assert lists(found) == [[0], [1], [2]]


@EVERY_EXECUTOR
def test_ties_go_to_the_lower_tile_number(executor):
    zeros = torch.zeros(1, 1, 320, 64)
    found = choose(executor, zeros, zeros, Layout.of(Video(1, 5, 64)), Plan.uniform(1, ROW, 0.4))
    assert lists(found) == [[0, 1], [0, 1], [0, 2], [0, 3], [0, 4]]


@EVERY_EXECUTOR
def test_larger_tiles_hold_more_mass(executor):
    # rows of 70: tiles 0 and 2 hold 64 tokens, tiles 1 and 3 six; only log S_j tells them apart
    zeros = torch.zeros(1, 1, 140, 64)
    # 0.89 * 3 * 3 / 4: two tiles each
    layout, plan = Layout.of(Video(1, 2, 70)), Plan.uniform(1, ROW, 0.89)
    found = choose(executor, zeros, zeros, layout, plan)
    assert lists(found) == [[0, 2], [0, 1], [0, 2], [0, 3]]
    # and what counts is valid rows: with 60 keys of tile 0 gone, tile 2 is the largest
    valid = torch.ones(1, 140, dtype=torch.bool)
    valid[:, :60] = False
    found = choose(executor, zeros, zeros, layout, plan, key_valid=valid)
    assert lists(found) == [[0, 2], [1, 2], [1, 2], [2, 3]]


@EVERY_EXECUTOR
def test_without_log_size_the_mean_score_ties(executor):
    zeros = torch.zeros(1, 1, 140, 64)
    valid = torch.ones(1, 140, dtype=torch.bool)
    valid[:, :60] = False
    plan = Plan.uniform(1, ROW, 0.89, "mean")
    found = choose(executor, zeros, zeros, Layout.of(Video(1, 2, 70)), plan, key_valid=valid)
    assert lists(found) == [[0, 1], [0, 1], [0, 2], [0, 3]]


def spread(values, mean=0.0):
    """Keys of tiles whose channel 0 is mean + or - `values[tile]`, in turns."""
    k = constant_in_tiles(values)
    k[:, :, 1::2] *= -1
    k[..., 0] += mean
    return k


@EVERY_EXECUTOR
def test_query_second_moment_meets_key_variance(executor):
    # q has no variance and k no mean: E[q^2] Var(k) ranks, Var(q) E[k^2] and the mean cannot
    q, k = constant_in_tiles([1.0] * 4), spread([0.1, 0.2, 0.9, 0.4])
    layout, plan = Layout.of(Video(1, 4, 64)), Plan.uniform(1, ROW, 0.5)
    assert lists(choose(executor, q, k, layout, plan)) == [[0, 2], [1, 2], [2, 3], [2, 3]]
    mean_only = Plan.uniform(1, ROW, 0.5, "mean")
    assert lists(choose(executor, q, k, layout, mean_only))[3] == [0, 3]
    # E[k^2] - were it used in place of the variance - would rank by the size of the mean
    q = spread([1.0] * 4)
    k = constant_in_tiles([4.0, 1.0, 1.0, 1.0]) + spread([0.1, 0.1, 0.1, 0.5])
    assert lists(choose(executor, q, k, layout, plan)) == [[0, 3], [1, 3], [2, 3], [0, 3]]


@EVERY_EXECUTOR
def test_variance_of_keys_with_a_large_mean(executor):
    # E[x^2] - E[x]^2 in float32 is off by more than 0.01 at a mean of 1000
    values = [0.05 + 0.01 * ((3 * tile) % 8) for tile in range(8)]
    q, k = spread([1.0] * 8), spread(values, mean=1000.0)
    layout = Layout.of(Video(1, 8, 64))
    found = choose(executor, q, k, layout, Plan.uniform(1, ROW, 3 / 8), scale=100.0)
    order = sorted(range(8), key=lambda tile: -values[tile])
    for tile, kept in enumerate(lists(found)):
        best = [other for other in order if other != tile][:2]
        assert kept == sorted([tile, *best])


@EVERY_EXECUTOR
def test_a_negative_or_zero_scale(executor):
    q, k = constant_in_tiles([1.0] * 4), constant_in_tiles([0.0, 3.0, 1.0, 2.0])
    layout, plan = Layout.of(Video(1, 4, 64)), Plan.uniform(1, ROW, 0.5)
    assert lists(choose(executor, q, k, layout, plan, scale=-1.0))[1:] == [[0, 1], [0, 2], [0, 3]]
    assert lists(choose(executor, q, k, layout, plan, scale=0.0))[1:] == [[0, 1], [0, 2], [0, 3]]


@EVERY_EXECUTOR
def test_tiles_without_a_valid_key_are_never_kept(executor):
    q, k = constant_in_tiles([1.0] * 4), constant_in_tiles([0.0, 3.0, 1.0, 2.0])
    k[:, :, 64:128] = torch.nan  # the best tile, were it valid
    valid = torch.ones(1, 256, dtype=torch.bool)
    valid[:, 64:128] = False
    layout = Layout.of(Video(1, 4, 64))
    found = choose(executor, q, k, layout, Plan.uniform(1, ROW, 0.5), key_valid=valid)
    assert lists(found) == [[0, 3], [2, 3], [2, 3], [2, 3]]  # query tile 1 has no own keys
    everything = choose(executor, q, k, layout, Plan.uniform(1, ROW, 1.0), key_valid=valid)
    assert kept_map(everything, [0], 4)[..., [0, 2, 3]].all()  # tile 1 may count, it adds nothing
    none = torch.zeros(1, 256, dtype=torch.bool)
    found = choose(executor, q, k, layout, Plan.uniform(1, ROW, 0.5), key_valid=none)
    assert lists(found) == [[]] * 4


@EVERY_EXECUTOR
def test_every_video_segment_has_its_own_budget(executor):
    # the second segment's keys score far better, and yet the first keeps its share
    layout = Layout.of(Video(1, 2, 64), Extra(5), Video(1, 4, 64))
    q = torch.zeros(1, 1, layout.length, 64)
    k = q.clone()
    q[..., 0] = 1.0
    k[:, :, :64, 0], k[:, :, 64:128, 0] = -1.0, -2.0
    for tile, value in enumerate([3.0, 9.0, 1.0, 5.0]):
        k[:, :, 133 + 64 * tile : 133 + 64 * (tile + 1), 0] = value
    found = choose(executor, q, k, layout, Plan.uniform(1, ROW, 0.5))
    assert lists(found) == [[0, 3, 5], [1, 3, 5], [0, 2, 3], [0, 3, 5], [0, 3, 4], [0, 3, 5]]


@EVERY_EXECUTOR
def test_a_nan_key_is_not_hidden(executor):
    q, k = constant_in_tiles([1.0] * 4), constant_in_tiles([0.0, 3.0, 1.0, 2.0])
    k[:, :, 130] = torch.nan
    layout = Layout.of(Video(1, 4, 64))
    found = choose(executor, q, k, layout, Plan.uniform(1, ROW, 0.5))
    assert lists(found) == [[0, 2], [1, 2], [1, 2], [2, 3]]
    # a NaN query must not leave its neighbours without any key
    q[:, :, 200] = torch.nan
    assert lists(choose(executor, q, k, layout, Plan.uniform(1, ROW, 0.5)))[3] == [0, 3]


def test_heads_of_one_kv_head_and_of_several_shapes():
    layout = Layout.of(Video(2, 4, 8), Extra(2))
    plan = Plan(((1, 2, 4), (2, 2, 2), (1, 2, 4), (1, 1, 8)), (0.2, 0.4, 1.0, 0.3))
    q, k = normal(2, 4, 66, 8), normal(2, 2, 66, 8, seed=1)
    together = select_tiles(AttentionCall(q, k, k, layout, plan, 0.3))
    for head, shape in enumerate(plan.tile_shapes):
        alone = Plan((shape,), (plan.density[head],))
        kv = k[:, head // 2 : head // 2 + 1]
        single = select_tiles(AttentionCall(q[:, head : head + 1], kv, kv, layout, alone, 0.3))
        for batch in range(2):
            expected = lists(single, batch)
            assert lists(together, batch, head)[: len(expected)] == expected
            budget = tiles_to_keep(layout, shape, plan.density[head]).sum(-1)
            assert list(map(len, expected)) == budget.tolist()


def test_lists_and_maps_are_inverse():
    layout, plan = Layout.of(Video(2, 4, 4)), Plan(((1, 2, 4), (2, 2, 2)), (0.5, 0.5))
    q = torch.zeros(1, 2, 32, 4)
    call = AttentionCall(q, q, q, layout, plan, 1.0)
    keeps = {
        shape: torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) > 0.5
        for seed, shape in enumerate(plan.tile_shapes)
    }
    selection = lists_of(keeps, call)
    # entries past the counts are unspecified
    past = torch.arange(selection.indices.shape[-1]) >= selection.counts[..., None]
    garbage = Selection(selection.indices.masked_fill(past, 2**31 - 1), selection.counts)
    for head, keep in enumerate(keeps.values()):
        assert torch.equal(kept_map(garbage, [head], 4), keep)
