"""Statistics, scores and choice of the Triton executor, in Triton's interpreter."""

import math
from dataclasses import replace

import pytest
import torch
from torch import bfloat16, float16, float32
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from triton.runtime import interpreter
from triton_calls import (  # noqa: F401
    MIXED_LAYOUT,
    MIXED_PLAN,
    TRITON,
    check_select,
    make_call,
    poisoned_memory,
    some_valid,
)

from veda_compile.kernels.call import Selection
from veda_compile.kernels.layout import Layout, Video
from veda_compile.kernels.plan import Plan
from veda_compile.kernels.static_modes import StaticMode
from veda_compile.kernels.statistics import tile_statistics
from veda_compile.kernels.tiles import tile_table
from veda_compile.kernels.triton import configs
from veda_compile.kernels.triton.choose import choose
from veda_compile.kernels.triton.lines import Lines
from veda_compile.kernels.triton.pool import pool
from veda_compile.kernels.triton.tables import (
    budget_table,
    key_rows,
    layer_tables,
)

SMALL = (2, 4, 8)


@pytest.fixture(params=["fused", "workspace", "small workspace"])
def way(request, monkeypatch):
    """Scores in registers; in a workspace; in one that holds 16 rows of one line."""
    if request.param != "fused":
        monkeypatch.setattr(configs, "MOST_FUSED_COLUMNS", 0)
    if request.param == "small workspace":
        monkeypatch.setattr(configs, "WORKSPACE_BYTES", 1)
        small = configs.ProductConfig(16, 32, 32, 4, 1)
        monkeypatch.setattr(configs, "SCORE_CONFIG", small)
    return request.param


class Operations(TorchDispatchMode):
    """Names the operators of torch that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def weights(heads, head_dim, rank):
    torch.manual_seed(3)
    return {
        "projection": 0.1 * torch.randn(2, heads, 3 * head_dim, head_dim),
        "factors": torch.randn(2, heads, head_dim, rank) / head_dim,
    }


@pytest.mark.usefixtures("way")
def test_a_shape_and_density_per_head():
    check_select(make_call(MIXED_LAYOUT, MIXED_PLAN, kv_heads=2))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("dtype", [float16, bfloat16], ids=str)
def test_half_precision(head_dim, dtype):
    layout = Layout.of(Video(2, 6, 21))
    check_select(make_call(layout, Plan.uniform(1, SMALL, 0.9), head_dim, dtype))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("head_dim", "score", "used", "rank"),
    [
        (64, "mean", (), 1),
        (96, "closed_form", ("factors",), 33),
        (128, "closed_form", ("factors",), 1),
        (96, "projection", ("projection",), 1),
        (64, "projection", ("projection", "factors"), 64),
    ],
)
def test_each_score(head_dim, score, used, rank):
    given = {name: w for name, w in weights(3, head_dim, rank).items() if name in used}
    # the weights of head 1, which is not scored, must not shift those of head 2
    modes = (None, StaticMode("full"), None)
    plan = Plan((SMALL,) * 3, (0.7, 1.0, 0.9), score, modes=modes, **given)
    layout = Layout.of(Video(2, 5, 30))
    check_select(make_call(layout, plan, head_dim, key_valid=some_valid(1, layout)))


@pytest.mark.usefixtures("way")
def test_each_batch_element_has_its_own_keys():
    layout = Layout.of(Video(4, 4, 16))
    valid = some_valid(2, layout)
    call = make_call(layout, Plan.uniform(3, SMALL, 0.5), batch=2, kv_heads=3, key_valid=valid)
    selection = check_select(call)
    assert not torch.equal(selection.indices[0], selection.indices[1])


@pytest.mark.usefixtures("way")
def test_scored_heads_beside_static_ones():
    """In every batch element, with other tiles per head; some tiles have no keys."""
    modes = (StaticMode("diagonal", (1, 0)), None, None, StaticMode("skip"))
    plan = replace(MIXED_PLAN, modes=modes)
    valid = some_valid(2, MIXED_LAYOUT)
    check_select(make_call(MIXED_LAYOUT, plan, batch=2, kv_heads=2, key_valid=valid))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("flag", [False, True])
def test_the_flag_lifts_all_budgets(flag):
    plan = replace(MIXED_PLAN, modes=(None, StaticMode("skip"), None, None))
    call = make_call(MIXED_LAYOUT, plan, key_valid=some_valid(1, MIXED_LAYOUT))
    selection = check_select(replace(call, keep_all=torch.tensor(flag)))
    assert selection.indices.shape == TRITON.select(call).indices.shape, "takes more memory"


def test_what_keeps_everything_takes_no_list():
    modes = (StaticMode("full"), StaticMode("diagonal", (1000, 0)), None, StaticMode("skip"))
    plan = replace(MIXED_PLAN, modes=modes)
    assert plan.density[2] == 1.0
    assert check_select(make_call(MIXED_LAYOUT, plan)).indices.shape[-1] == 1


@pytest.mark.usefixtures("way")
def test_more_tiles_than_one_step_takes(monkeypatch):
    """More than one warp has threads, and more rows than a small workspace holds."""
    monkeypatch.setattr(configs, "WORKSPACE_BYTES", configs.WORKSPACE_BYTES // 300)
    layout = Layout.of(Video(1, 8, 8 * 35))
    check_select(make_call(layout, Plan.uniform(1, (1, 8, 8), 0.2), batch=2))


@pytest.mark.usefixtures("way")
def test_equal_scores_go_to_the_lower_tile():
    """Queries and keys of whole numbers, so that products are exact."""
    layout = Layout.of(Video(2, 4, 40), Video(2, 4, 40))
    call = make_call(layout, Plan.uniform(1, SMALL, 0.4, "mean"), scale=0.5)
    call.q.copy_(torch.randint(-3, 4, call.q.shape).float())
    call.k.fill_(1.0)
    selection = check_select(call)
    assert (selection.counts == 4).all()
    lists = selection.indices[0, 0].tolist()
    assert lists[:6] == [[0, 1, 5, 6], [0, 1, 5, 6], [0, 2, 5, 6], [0, 3, 5, 6], [0, 4, 5, 6],
                         [0, 1, 5, 6]]  # fmt: skip


def test_zeros_of_both_signs_are_equal():
    layout = Layout.of(Video(2, 4, 40))
    scores = torch.tensor([0.0, -0.0, -0.0, 0.0, -1.0]).repeat(1, 5, 1)
    tables = layer_tables(layout, (SMALL,), scores.device)
    budgets, width = budget_table(layout, (SMALL,), (0.4,), tables.most_tiles, scores.device)
    selection = Selection(*(torch.empty(1, 1, 5, *w, dtype=torch.int32) for w in ((width,), ())))
    lines = Lines(0, 1, torch.zeros(1, dtype=torch.int32), False, 1)
    choose(scores, 0, 5, False, key_rows(tables, None), tables, budgets, selection, None, lines)
    assert selection.indices[0, 0].tolist() == [[0, 1], [0, 1], [0, 2], [0, 3], [0, 4]]
    assert (selection.counts == 2).all()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_goes_as_in_the_reference(value):
    call = make_call(Layout.of(Video(2, 4, 48)), Plan.uniform(1, SMALL, 0.4))
    call.k[0, 0, 9, 5] = value  # in tile 1
    call.q[0, 0, 17, 5] = value  # in tile 2
    selection = check_select(call)
    if math.isnan(value):
        kept = (selection.indices[0, 0] == 1).any(-1)
        assert kept[[0, 1, 3, 4, 5]].all()


def test_statistics_of_keys_with_a_large_mean():
    """E[x^2] - E[x]^2 would lose every digit; maxima and minima are exact."""
    layout = Layout.of(Video(2, 4, 20))
    call = make_call(layout, Plan.uniform(2, SMALL, 0.5), kv_heads=2)
    call.k.add_(1000.0)
    tables = layer_tables(layout, call.plan.tile_shapes, call.q.device)
    out = torch.empty(2, 2, 3, 256)
    lines = Lines(0, 2, torch.empty(0), False, 2)
    pool(call, tables, key_rows(tables, None), lines, out, True, True, 0.5, 0.25)
    rows = tile_table(layout, SMALL, call.q.device).rows
    q, k = (tile_statistics(x.double(), rows, None, True) for x in (call.q, call.k))
    pooled_q, pooled_k = (x.unflatten(-1, (4, 64)).unbind(2) for x in out)
    for found, right in zip(pooled_k, (k.mean, k.highest, k.lowest, k.variance), strict=True):
        torch.testing.assert_close(found, right[0].float(), rtol=2e-5, atol=0)
    for found, right in zip(
        pooled_q, (0.5 * q.mean, q.highest, q.lowest, 0.25 * q.second), strict=True
    ):
        torch.testing.assert_close(found, right[0].float(), rtol=2e-5, atol=1e-6)


@pytest.mark.usefixtures("way")
def test_products_are_of_float32_quality(monkeypatch):
    """They pass by torch, whose settings and autocast would lower them, and ask for all parts."""
    precisions = []
    original = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, precision, *options):
        precisions.append(precision)
        return original(self, a, b, d, precision, *options)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    plan = Plan((SMALL,) * 2, (0.5,) * 2, "projection", **weights(2, 64, 8))
    call = make_call(Layout.of(Video(2, 4, 24)), plan)
    TRITON.select(call)  # which makes the tables
    with Operations() as operations, torch.autocast("cpu", bfloat16):
        TRITON.select(call)
    products = [n for n in operations.names if any(part in n for part in ("mm", "mul", "dot"))]
    assert operations.names and not products
    assert {getattr(precision, "name", precision) for precision in precisions} == {"TF32x3"}
    assert call.q.dtype == float32
