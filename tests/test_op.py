"""The op `veda::sparse_attention_v2`, eager, fake and compiled, and the functional API."""

from __future__ import annotations

import math

import pytest
import torch

from veda_compile.functional import sparse_attention
from veda_compile.kernels.call import AttentionCall
from veda_compile.kernels.errors import ExecutorError, LayoutError, PlanError
from veda_compile.kernels.layout import Extra, Layout, Video
from veda_compile.kernels.op import OP_NAME, sparse_attention_v2
from veda_compile.kernels.plan import Plan
from veda_compile.kernels.reference import ReferenceExecutor
from veda_compile.kernels.selection import select_tiles

LAYOUT = Layout.of(Extra(3), Video(2, 4, 8), Extra(5))
PLAN = Plan(((1, 2, 4), (2, 2, 2)), (0.3, 0.5))


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(heads=2, kv_heads=2, tokens=72, batch=2, head_dim=16, dtype=torch.float32):
    sizes = (heads, kv_heads, kv_heads)
    return [normal(batch, h, tokens, head_dim, seed=i, dtype=dtype) for i, h in enumerate(sizes)]


def padding(batch=2, tokens=72):
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(9)) > 0.2


def op_args(q, k, v, key_valid=None, layout=None, grids=None, plan=PLAN, scale=None,
            executor="reference", keep_all=None):  # fmt: skip
    return (
        q, k, v, key_valid, LAYOUT.encode() if layout is None else layout, grids,
        torch.tensor(plan.tile_shapes, dtype=torch.int32),
        torch.tensor(plan.density, dtype=torch.float64),
        plan.projection, plan.score, scale, executor, keep_all,
    )  # fmt: skip


def projected_plan():
    return Plan(PLAN.tile_shapes, PLAN.density, "projection", 0.1 * normal(2, 2, 48, 16, seed=4))


@pytest.mark.parametrize(
    "args",
    [
        op_args(*qkv()),
        op_args(*qkv(heads=2, kv_heads=1, dtype=torch.bfloat16), scale=0.5, executor="cpu"),
        op_args(*qkv(), key_valid=padding(), plan=projected_plan()),
        op_args(*qkv(), layout=[0, -1, 1, 1, 1, 0, 0, 0, 0, 5, 1, 1],
                grids=torch.tensor([[2, 4, 8]])),
        op_args(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv())),
        op_args(*qkv(tokens=64)[:1], *qkv()[1:], layout=[2, 3, 1, 1, 1, 2, 4, 8, 2, -1, 1, 1]),
        op_args(*qkv(), executor="cpu", keep_all=torch.tensor(True)),
    ],
    ids=["plain", "gqa-bf16-cpu", "padded-projection", "grids", "token-major", "context",
         "keep-all"],
)  # fmt: skip
def test_opcheck(args):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor",
              "test_aot_dispatch_dynamic")  # fmt: skip
    torch.library.opcheck(sparse_attention_v2, args, test_utils=checks)


def test_the_name_carries_the_version():
    assert OP_NAME == "veda::sparse_attention_v2"
    assert torch.ops.veda.sparse_attention_v2.default is sparse_attention_v2._opoverload


@pytest.mark.parametrize("executor", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_lie_as_the_fake_says(executor, dtype):
    args = op_args(*qkv(dtype=dtype), executor=executor)
    real = sparse_attention_v2(*args)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args]
        fake = sparse_attention_v2(*fakes)
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
    assert real[0].transpose(1, 2).is_contiguous()  # as models read it next


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_keeping_everything_is_dense_attention(kv_heads):
    q, k, v = qkv(kv_heads=kv_heads)
    valid = padding()
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=valid[:, None, None], scale=0.3, enable_gqa=True
    )
    plan = Plan(PLAN.tile_shapes, (1.0, 1.0))
    out, lse = sparse_attention_v2(*op_args(q, k, v, valid, plan=plan, scale=0.3))
    assert (out - dense).abs().max() <= 2e-5
    logits = 0.3 * q @ k.repeat_interleave(2 // kv_heads, 1).transpose(2, 3)
    right = logits.masked_fill(~valid[:, None, None], -torch.inf).logsumexp(-1)
    assert (lse - right).abs().max() <= 2e-5


def test_dropping_tiles_changes_video_rows_alone():
    q, k, v = qkv()
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    out, _ = sparse_attention_v2(*op_args(q, k, v))
    error = (out - dense).abs().amax((0, 1, 3))
    video = slice(3, 67)
    assert error[video].min() > 1e-3
    error[video] = 0
    assert error.max() <= 2e-5


def test_the_op_is_selection_and_attention_of_the_call():
    q, k, v = qkv(kv_heads=1)
    valid = padding()
    call = AttentionCall(q, k, v, LAYOUT, PLAN, 0.7, valid)
    right = ReferenceExecutor().attend(call, select_tiles(call))
    found = sparse_attention_v2(*op_args(q, k, v, valid, scale=0.7))
    for one, other in zip(found, right, strict=True):
        assert torch.equal(one, other)


def test_no_scale_is_one_over_the_root_of_head_dim():
    q, k, v = qkv()
    default, _ = sparse_attention_v2(*op_args(q, k, v))
    assert torch.equal(default, sparse_attention_v2(*op_args(q, k, v, scale=0.25))[0])
    assert not torch.equal(default, sparse_attention_v2(*op_args(q, k, v, scale=0.3))[0])


def test_padding_neither_counts_nor_leaks():
    q, k, v = qkv()
    valid = padding()
    out, _ = sparse_attention_v2(*op_args(q, k, v, valid))
    for x in (k, v):
        x.masked_fill_(~valid[:, None, :, None], torch.nan)
    assert torch.equal(sparse_attention_v2(*op_args(q, k, v, valid))[0], out)
    valid[0] = False
    out, lse = sparse_attention_v2(*op_args(q, k, v, valid))
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert (lse[0] == -torch.inf).all()
    assert out[1].isfinite().all() and out[1].abs().max() > 0


def test_grids_replace_those_of_the_layout():
    args = qkv()
    right, _ = sparse_attention_v2(*op_args(*args))
    told = torch.tensor([[2, 4, 8]])
    for layout in (
        [0, 3, 1, 1, 1, 0, 0, 0, 0, 5, 1, 1],
        [0, 3, 1, 1, 1, 9, 9, 9, 0, 5, 1, 1],
        [0, -1, 1, 1, 1, 0, 0, 0, 0, 5, 1, 1],
        [0, 3, 1, 1, 1, 0, 0, 0, 0, -1, 1, 1],
    ):
        assert torch.equal(
            sparse_attention_v2(*op_args(*args, layout=layout, grids=told))[0], right
        )
    other = torch.tensor([[1, 8, 8]])  # as many tokens, other neighbours
    layout = [0, 3, 1, 1, 1, 0, 0, 0, 0, 5, 1, 1]
    assert not torch.equal(
        sparse_attention_v2(*op_args(*args, layout=layout, grids=other))[0], right
    )


def test_the_rest_may_be_nothing():
    q, k, v = (x[:, :, 3:67] for x in qkv())
    layout = [1, 2, 4, 8, 0, -1, 1, 1]
    found, _ = sparse_attention_v2(*op_args(q, k, v, layout=layout))
    right, _ = sparse_attention_v2(*op_args(q, k, v, layout=[1, 2, 4, 8]))
    assert torch.equal(found, right)


GRID = torch.tensor([[2, 4, 8]])


@pytest.mark.parametrize(
    ("layout", "grids", "message"),
    [
        ([1, 2, 4, 8], None, "holds 64 tokens but the sequence has 72"),
        ([1, 0, 0, 0], GRID, "holds 64 tokens but the sequence has 72"),
        ([1, 0, 0, 0, 0, 9, 1, 1], GRID, "holds 73 tokens"),
        ([1, 9, 9, 9, 0, -1, 1, 1], None, "known size hold 729 tokens but the sequence has 72"),
        ([1, 0, 0, 0, 0, 8, 1, 1], None, "every side must be at least 1"),
        ([0, -1, 1, 1, 1, 2, 4, 8, 0, -1, 1, 1], None, "2 segments take the rest"),
        (
            [1, 0, 0, 0, 0, 8, 1, 1],
            torch.tensor([[2, 4, 8], [1, 1, 1]]),
            r"must be int64 of .*V, 3",
        ),
        ([1, 0, 0, 0, 0, 8, 1, 1], torch.tensor([[2.5, 4, 8]]), "must be int64"),
        ([1, 0, 0, 0, 0, 8, 1, 1], torch.tensor([[2, 4, -8]]), "every side must be at least 1"),
        ([1, 2, 4], GRID, "4 integers a segment, got 3"),
        ([0, 72, 1, 1], None, "at least one video segment"),
    ],
)
def test_layouts_that_do_not_fit(layout, grids, message):
    with pytest.raises(LayoutError, match=message):
        sparse_attention_v2(*op_args(*qkv(), layout=layout, grids=grids))


def changed(place, value):
    args = list(op_args(*qkv()))
    args[place] = value
    return args


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (changed(0, normal(2, 72, 16)), PlanError, r"must be \(B, H, N, D\)"),
        (changed(1, normal(2, 3, 72, 16)), PlanError, "do not go with"),
        (changed(1, normal(2, 2, 73, 16)), PlanError, "do not go with"),
        (changed(2, normal(2, 2, 72, 16, dtype=torch.bfloat16)), PlanError, "must be one dtype"),
        (op_args(*(x.double() for x in qkv())), PlanError, "float64: must be float32"),
        (op_args(*(x[:, :0] for x in qkv())), PlanError, "no side may be 0"),
        (op_args(*(x[:0] for x in qkv())), PlanError, "no side may be 0"),
        (op_args(*qkv(heads=3, kv_heads=2)), PlanError, "3 query heads cannot share 2"),
        (op_args(*qkv(heads=4)), PlanError, "for 2 heads but the call has 4"),
        (changed(3, torch.ones(2, 71, dtype=torch.bool)), LayoutError, "key_valid is .*2, 71"),
        (changed(3, torch.ones(2, 72)), LayoutError, "key_valid is torch.float32"),
        (changed(6, torch.tensor([1, 2, 4], dtype=torch.int32)), PlanError, "tile_shapes is"),
        (changed(6, torch.tensor([[1, 2, 4]] * 2)), PlanError, "tile_shapes is torch.int64"),
        (changed(7, torch.tensor([0.3, 0.3])), PlanError, "density is torch.float32"),
        (changed(7, torch.tensor([0.3, 0.0]).double()), PlanError, "density 0.0"),
        (changed(9, "oracle"), PlanError, "score 'oracle'"),
        (changed(11, "quick"), ExecutorError, "executor 'quick': must be one of auto"),
    ],
)
def test_what_does_not_fit_is_refused(args, error, message):
    with pytest.raises(error, match=message):
        sparse_attention_v2(*args)


def test_there_is_no_silent_lack_of_a_gradient():
    q, k, v = qkv()
    out = sparse_attention(q.requires_grad_(), k, v, layout=LAYOUT, plan=PLAN)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        out.sum().backward()
    with pytest.raises(ExecutorError, match="no_grad"):
        sparse_attention(q, k, v, layout=LAYOUT, plan=PLAN, return_selection=True)
    with torch.no_grad():
        sparse_attention(q, k, v, layout=LAYOUT, plan=PLAN, return_selection=True)


def test_what_the_functional_api_returns():
    q, k, v = qkv(kv_heads=1)
    valid = padding()
    options = {"layout": LAYOUT, "plan": PLAN, "scale": 0.7, "key_valid": valid}
    options["executor"] = "reference"
    right, right_lse = sparse_attention_v2(*op_args(q, k, v, valid, scale=0.7))
    chosen = select_tiles(AttentionCall(q, k, v, LAYOUT, PLAN, 0.7, valid))
    assert torch.equal(sparse_attention(q, k, v, **options), right)
    out, lse = sparse_attention(q, k, v, **options, return_lse=True)
    assert torch.equal(out, right) and torch.equal(lse, right_lse)
    out, selection = sparse_attention(q, k, v, **options, return_selection=True)
    assert torch.equal(out, right) and torch.equal(selection.counts, chosen.counts)
    out, lse, selection = sparse_attention(
        q, k, v, **options, return_lse=True, return_selection=True
    )
    assert torch.equal(out, right) and torch.equal(lse, right_lse)
    assert torch.equal(selection.indices, chosen.indices)


def test_the_functional_api_passes_projections_on():
    q, k, v = qkv()
    right, _ = sparse_attention_v2(*op_args(q, k, v, plan=projected_plan()))
    found = sparse_attention(q, k, v, layout=LAYOUT, plan=projected_plan(), executor="reference")
    assert torch.equal(found, right)


def layer(x, t, h, w):
    """A tiny attention layer whose layout depends on sizes; x: (B, N, H, D), N > t * h * w."""
    layout = Layout.of(Video(t, h, w), Extra(x.shape[1] - t * h * w))
    q, k, v = ((x * factor).transpose(1, 2) for factor in (1.0, -0.5, 2.0))
    out = sparse_attention(q, k, v, layout=layout, plan=PLAN, executor="reference")
    return out.transpose(1, 2).flatten(2) + 1.0


def layer_of_sizes(x, grid):
    return layer(x, *grid.shape)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_with_symbolic_sizes(backend):
    torch._dynamo.reset()
    graphs = []

    def counting(gm, inputs):
        graphs.append(gm)
        return torch._dynamo.lookup_backend(backend)(gm, inputs)

    compiled = torch.compile(layer_of_sizes, backend=counting, dynamic=True, fullgraph=True)
    made = []
    for grid in ((3, 4, 8), (4, 5, 6), (9, 7, 3)):  # no side equals the batch or another size
        sizes = torch.empty(grid)
        x = normal(2, math.prod(grid) + 5, 2, 16, seed=sum(grid))
        found, right = compiled(x, sizes), layer_of_sizes(x, sizes)
        assert found.stride() == right.stride()
        torch.testing.assert_close(found, right, rtol=0, atol=2e-5)
        made.append(len(graphs))
    assert made[0] == made[-1]  # what was compiled for the first grid serves every other
    (call,) = (n for n in graphs[-1].graph.nodes if OP_NAME.split("::")[1] in str(n.target))
    assert any(isinstance(size, torch.fx.Node) for size in call.args[4])
