"""Distillation targets in plain torch, against a float64 softmax summed up tile by tile."""

import math

import pytest
import torch
from naive_attention import boxes_of_tokens, queries_of
from peak_memory import peak_memory

from veda_compile.kernels.call import AttentionCall
from veda_compile.kernels.errors import LayoutError, PlanError
from veda_compile.kernels.layout import Context, Extra, Layout, Video
from veda_compile.kernels.plan import Plan
from veda_compile.kernels.targets import TileTargets, row_lse, tile_targets

MIXED = Layout.of(
    Context(2), Extra(3), Video(3, 5, 7), Extra(70), Video(2, 5, 9), Context(66), Extra(1)
)
SHAPES = ((2, 4, 8), (1, 8, 8), (2, 4, 8), (4, 4, 4))
PLAN = Plan(SHAPES, (0.3, 0.5, 1.0, 0.2))
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:]
)


def make_call(
    layout, plan, *, head_dim=64, dtype=torch.float32, batch=1, kv_heads=1, valid=None, scale=None
):
    """Random q and k, peaked enough for tiles to differ. Keys that are not valid hold NaN."""
    generator = torch.Generator().manual_seed(layout.length)
    shapes = ((plan.heads, layout.query_length), (kv_heads, layout.length))
    q, k = (
        (1.5 * torch.randn(batch, *shape, head_dim, generator=generator)).to(dtype)
        for shape in shapes
    )
    if valid is not None:
        k.masked_fill_(~valid[:, None, :, None], math.nan)
    v = torch.full_like(k, math.nan)  # targets are none of its business
    return AttentionCall(q, k, v, layout, plan, scale or head_dim**-0.5, valid)


def some_valid(batch, layout):
    """Random keys, and none of the first 110 tokens in the last batch element."""
    valid = torch.rand(batch, layout.length, generator=torch.Generator().manual_seed(1)) < 0.7
    valid[-1, :110] = False
    return valid


def naive_targets(call, shape):
    """TileTargets of every query tile of every head of `shape`, and every head's LSE, in float64.

    Knows nothing of tile tables: a token's tile is told by its coordinates.
    """
    box_of = boxes_of_tokens(call.layout, shape)
    boxes = sorted({box for box in box_of if box is not None})
    queries = queries_of(call.layout)
    heads = [head for head, other in enumerate(call.plan.tile_shapes) if other == shape]
    batch, tiles = call.q.shape[0], len(boxes)
    lse = torch.full(call.q.shape[:3], -math.inf, dtype=torch.float64)
    mass, highest = torch.zeros(2, batch, len(heads), tiles, tiles, dtype=torch.float64)
    extra = torch.zeros(batch, len(heads), tiles, dtype=torch.float64)
    for b in range(batch):
        seen = [call.key_valid is None or bool(call.key_valid[b, n]) for n in range(len(box_of))]
        keys = [n for n, there in enumerate(seen) if there]
        for head in range(call.plan.heads):
            k = call.k[b, head // (call.q.shape[1] // call.k.shape[1]), keys].double()
            logits = call.scale * call.q[b, head].double() @ k.T
            lse[b, head] = torch.logsumexp(logits, -1)
            if head not in heads or not keys:
                continue
            probability, place = torch.softmax(logits, -1), heads.index(head)
            for i, q_box in enumerate(boxes):
                rows = probability[[row for row, n in enumerate(queries) if box_of[n] == q_box]]
                for j, k_box in enumerate(boxes):
                    columns = [column for column, n in enumerate(keys) if box_of[n] == k_box]
                    if columns:
                        mass[b, place, i, j] = rows[:, columns].sum() / len(rows)
                        highest[b, place, i, j] = rows[:, columns].max()
                outside = [column for column, n in enumerate(keys) if box_of[n] is None]
                extra[b, place, i] = rows[:, outside].sum() / len(rows)
    return TileTargets(mass, highest, extra), lse


def assert_targets(found, wanted, sample, tolerance=5e-6):
    """`found` is what `wanted` has for the tiles in `sample`."""
    for name in ("mass", "highest", "extra"):
        value, right = getattr(found, name), getattr(wanted, name)[:, :, sample]
        assert value.dtype == torch.float32 and value.is_contiguous()
        torch.testing.assert_close(value.double(), right, rtol=tolerance, atol=1e-9, msg=name)


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_every_group_of_heads(dtype, head_dim):
    call = make_call(MIXED, PLAN, head_dim=head_dim, dtype=dtype, kv_heads=2)
    for shape in call.plan.groups():
        wanted, lse = naive_targets(call, shape)
        sample = torch.arange(wanted.mass.shape[2])
        assert_targets(tile_targets(call, sample, shape=shape), wanted, sample)
    torch.testing.assert_close(row_lse(call).double(), lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_hidden_keys_hold_nan_and_leave_no_trace(kv_heads):
    valid = some_valid(2, MIXED)
    call = make_call(MIXED, PLAN, batch=2, kv_heads=kv_heads, valid=valid)
    for shape in call.plan.groups():
        wanted, lse = naive_targets(call, shape)
        sample = torch.arange(wanted.mass.shape[2])
        found = tile_targets(call, sample, shape=shape)
        assert_targets(found, wanted, sample)
        # the tiles of the first video have no key left
        hidden = (wanted.mass[1] == 0).all(dim=(0, 1))
        assert hidden.any() and (found.mass[1][..., hidden] == 0).all()
        assert (found.highest[1][..., hidden] == 0).all()
    torch.testing.assert_close(row_lse(call).double(), lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "layout",
    [
        Layout.of(Video(4, 8, 8)),
        Layout.of(Video(5, 3, 11)),
        Layout.of(Extra(9), Video(3, 5, 7)),
        Layout.of(Video(3, 5, 7), Extra(200)),
        Layout.of(Video(1, 1, 1), Context(1)),
        Layout.of(Video(3, 5, 7), Video(1, 9, 2), Context(40)),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(4, 4, 4), (1, 8, 16), (64, 1, 1)])
def test_ragged_grids(layout, shape):
    call = make_call(layout, Plan.uniform(1, shape, 0.5), head_dim=24)
    wanted, lse = naive_targets(call, shape)
    sample = torch.arange(wanted.mass.shape[2])
    found = tile_targets(call, sample)
    assert_targets(found, wanted, sample)
    assert_targets(tile_targets(call, sample, row_lse(call)), wanted, sample)
    torch.testing.assert_close(found.mass.sum(-1) + found.extra, torch.ones(1, 1, len(sample)))
    torch.testing.assert_close(row_lse(call).double(), lse, rtol=1e-6, atol=1e-6)


def test_a_sample_in_any_order_and_with_repeats():
    call = make_call(MIXED, Plan.uniform(2, (2, 4, 8), 0.5))
    wanted, _ = naive_targets(call, (2, 4, 8))
    for sample in (torch.tensor([5]), torch.tensor([6, 0, 6, 3], dtype=torch.int32)):
        assert_targets(tile_targets(call, sample), wanted, sample.long())


def test_chunks_do_not_show():
    # 4,620 keys and 924 queries: several chunks of each, and a last one that is not full
    layout = Layout.of(Video(11, 6, 14), Context(3696))
    call = make_call(layout, Plan.uniform(1, (2, 4, 8), 0.5), head_dim=16)
    wanted, lse = naive_targets(call, (2, 4, 8))
    sample = torch.arange(wanted.mass.shape[2])
    assert_targets(tile_targets(call, sample), wanted, sample)
    torch.testing.assert_close(row_lse(call).double(), lse, rtol=1e-6, atol=1e-6)


def test_the_same_call_gives_the_same_bits():
    call = make_call(MIXED, PLAN, kv_heads=2, valid=some_valid(1, MIXED))
    sample = torch.arange(6)
    first, second = (tile_targets(call, sample, shape=(2, 4, 8)) for _ in range(2))
    for name in ("mass", "highest", "extra"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert torch.equal(row_lse(call), row_lse(call))


def test_no_valid_key_at_all():
    valid = torch.ones(2, MIXED.length, dtype=torch.bool)
    valid[1] = False
    call = make_call(MIXED, Plan.uniform(1, (4, 4, 4), 0.5), batch=2, valid=valid)
    lse = row_lse(call)
    assert (lse[1] == -math.inf).all() and lse[0].isfinite().all()
    for known in (None, lse):
        found = tile_targets(call, torch.arange(5), known)
        assert not (found.mass[1].any() or found.highest[1].any() or found.extra[1].any())
        torch.testing.assert_close(found.mass[0].sum(-1) + found.extra[0], torch.ones(1, 5))


def test_nan_in_a_query_stays_in_its_tile():
    call = make_call(Layout.of(Video(3, 5, 7)), Plan.uniform(1, (2, 4, 8), 0.5))
    call.q[0, 0, 0] = math.nan  # of tile 0, and what padding rows of other tiles would read
    found = tile_targets(call, torch.arange(4))
    assert found.mass[0, 0, 0].isnan().all() and found.highest[0, 0, 0].isnan().all()
    assert found.mass[0, 0, 1:].isfinite().all() and found.highest[0, 0, 1:].isfinite().all()


def test_nan_in_a_valid_key_shows():
    call = make_call(Layout.of(Video(3, 5, 7)), Plan.uniform(1, (2, 4, 8), 0.5))
    call.k[0, 0, 3] = math.nan
    found = tile_targets(call, torch.arange(4))
    assert found.mass.isnan().all() and found.highest.isnan().all()


@pytest.mark.parametrize("scale", [-0.7, 30.0, 1e-9])
def test_unusual_scales(scale):
    call = make_call(MIXED, Plan.uniform(1, (2, 4, 8), 0.5), head_dim=8, scale=scale)
    wanted, _ = naive_targets(call, (2, 4, 8))
    # logits of some hundreds have an absolute rounding error of some 1e-5
    found = tile_targets(call, torch.arange(8))
    assert_targets(found, wanted, torch.arange(8), 1e-3 if scale > 1 else 5e-6)


def test_neither_gradient_nor_autocast_reaches_it():
    call = make_call(MIXED, Plan.uniform(1, (4, 4, 4), 0.5))
    sample = torch.arange(5)
    plain, lse = tile_targets(call, sample), row_lse(call)
    call.q.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, found_lse = tile_targets(call, sample), row_lse(call)
    assert torch.equal(found.mass, plain.mass) and torch.equal(found_lse, lse)
    assert not (found.mass.requires_grad or found_lse.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_does_not_grow_with_queries_times_keys(dtype, tmp_path):
    """At 16,384 tokens a head's logits would take 1 GiB."""
    layout = Layout.of(Video(16, 32, 32))
    call = make_call(layout, Plan.uniform(2, (4, 4, 8), 0.5), dtype=dtype, kv_heads=2)
    sample, lse = torch.arange(0, 128, 4), torch.zeros(1, 2, layout.length)
    assert peak_memory(lambda: tile_targets(call, sample), tmp_path) < 64 << 20
    assert peak_memory(lambda: tile_targets(call, sample, lse), tmp_path) < 64 << 20


def test_memory_of_row_sums(tmp_path):
    layout = Layout.of(Video(16, 32, 32))
    call = make_call(layout, Plan.uniform(1, (4, 4, 8), 0.5))
    assert peak_memory(lambda: row_lse(call), tmp_path) < 64 << 20


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (torch.tensor([0, 8]), "0 to 8"),
        (torch.tensor([-1]), "-1"),
        (torch.tensor([[0]]), "(1, 1)"),
        (torch.tensor([0.0]), "float32"),
        (torch.tensor([], dtype=torch.int64), "empty"),
    ],
)
def test_samples_that_cannot_be(sample, message):
    call = make_call(MIXED, Plan.uniform(1, (2, 4, 8), 0.5))
    with pytest.raises(LayoutError) as error:
        tile_targets(call, sample)
    assert message in str(error.value)


def test_shapes_and_sums_that_are_not_the_calls():
    call, sample = make_call(MIXED, PLAN), torch.arange(2)
    with pytest.raises(PlanError, match="which"):
        tile_targets(call, sample)
    with pytest.raises(PlanError, match=r"\(64, 1, 1\)"):
        tile_targets(call, sample, shape=(64, 1, 1))
    for lse in (row_lse(call)[:, :2], row_lse(call).double()):
        with pytest.raises(PlanError, match="lse"):
            tile_targets(call, sample, lse, (4, 4, 4))
