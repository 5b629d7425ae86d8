"""Context segments: keys without queries, in every executor."""

from __future__ import annotations

import pytest
import torch
from running_executors import EXECUTORS_HERE

from veda_compile import Context, Extra, Layout, LayoutError, Plan, Video, sparse_attention
from veda_compile.kernels.call import AttentionCall
from veda_compile.kernels.cpu_gather import gather_attend
from veda_compile.kernels.executors import execute
from veda_compile.kernels.op import sparse_attention_v2
from veda_compile.kernels.selection import select_tiles

VIDEO, TEXT, CACHE = Video(2, 5, 13), Extra(4), Context(20)
LAYOUTS = pytest.mark.parametrize(
    "layout",
    [
        Layout.of(CACHE, VIDEO, TEXT),
        Layout.of(VIDEO, CACHE, TEXT),
        Layout.of(TEXT, VIDEO, CACHE),
        Layout.of(Context(70), VIDEO, Context(1), VIDEO, Context(3)),
    ],
    ids=["first", "middle", "last", "between"],
)
EVERY_EXECUTOR = pytest.mark.parametrize("executor", EXECUTORS_HERE)
SHAPE = (1, 4, 16)


def with_queries(layout: Layout) -> Layout:
    """The layout in which context tokens are extra ones, that is, have queries too."""
    return Layout(tuple(Extra(s.length) if isinstance(s, Context) else s for s in layout.segments))


def has_query(layout: Layout) -> torch.Tensor:
    """(Nk,) bool, by key."""
    return torch.tensor([not isinstance(s, Context) for s in layout.segments
                         for _ in range(s.length)])  # fmt: skip


def padding(layout: Layout) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.rand(1, layout.length, generator=generator) > 0.3


def normal(tokens: int, heads: int, seed: int, token_major: bool = False) -> torch.Tensor:
    """(1, heads, tokens, 64), stored by head or by token."""
    x = torch.randn(1, heads, tokens, 64, generator=torch.Generator().manual_seed(seed))
    return x.transpose(1, 2).contiguous().transpose(1, 2) if token_major else x


def close(found: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(found, right, rtol=0, atol=2e-5)


@EVERY_EXECUTOR
@LAYOUTS
def test_density_one_is_dense_attention_over_all_keys(executor: str, layout: Layout) -> None:
    q, k, v = normal(layout.query_length, 2, 0), normal(layout.length, 1, 1), normal(
        layout.length, 1, 2
    )  # fmt: skip
    plan = Plan.uniform(2, SHAPE, 1.0)
    out = sparse_attention(q, k, v, layout=layout, plan=plan, executor=executor)
    assert out.shape == q.shape
    close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True))


@EVERY_EXECUTOR
@LAYOUTS
@pytest.mark.parametrize("padded", [False, True], ids=["all_valid", "padded"])
def test_a_context_segment_is_an_extra_one_without_its_rows(
    executor: str, layout: Layout, padded: bool
) -> None:
    kept = has_query(layout)
    every, k, v = (normal(layout.length, 2, seed, token_major=True) for seed in range(3))
    valid = padding(layout) if padded else None
    if valid is not None:
        for x in (k, v):
            x.masked_fill_(~valid[:, None, :, None], torch.nan)
    plan = Plan(((1, 4, 16), (2, 2, 16)), (0.3, 0.01))
    found = execute(executor, AttentionCall(every[:, :, kept], k, v, layout, plan, 0.2, valid))
    right = execute(executor, AttentionCall(every, k, v, with_queries(layout), plan, 0.2, valid))
    close(found[0], right[0][:, :, kept])
    close(found[1], right[1][:, :, kept])
    assert torch.equal(found[2].counts, right[2].counts)


@LAYOUTS
def test_the_cpu_path_without_a_compiler(layout: Layout) -> None:
    q, k, v = (normal(n, 2, seed) for seed, n in
               enumerate((layout.query_length, layout.length, layout.length)))  # fmt: skip
    call = AttentionCall(q, k, v, layout, Plan.uniform(2, SHAPE, 0.3), 0.2, padding(layout))
    selection = select_tiles(call)
    right_out, right_lse, _ = execute("reference", call)
    out, lse = gather_attend(call, selection)
    close(out, right_out)
    close(lse, right_lse)


def test_context_costs_no_budget_and_is_always_kept() -> None:
    """Video keys that all score alike and weigh nothing: what is left is the context."""
    layout = Layout.of(Context(3), Video(1, 8, 64))
    q = torch.ones(1, 1, layout.query_length, 8)
    k = torch.full((1, 1, layout.length, 8), -20.0)
    v = torch.zeros(1, 1, layout.length, 8)
    k[:, :, :3], v[:, :, :3] = 0.0, 1.0
    out, selection = sparse_attention(
        q, k, v, layout=layout, plan=Plan.uniform(1, (1, 1, 64), 0.25), return_selection=True
    )
    close(out, torch.ones_like(out))
    assert (selection.counts == 2).all()


def op_call(layout: list[int], queries: int, keys: int, grids: torch.Tensor | None = None):
    q, k, v = (normal(n, 2, seed) for seed, n in enumerate((queries, keys, keys)))
    return sparse_attention_v2(
        q, k, v, None, layout, grids,
        torch.tensor([[1, 4, 4], [2, 2, 4]], dtype=torch.int32),
        torch.tensor([0.3, 0.4], dtype=torch.float64),
        None, "closed_form", None, "reference",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "grids"),
    [
        ([2, -1, 1, 1, 1, 2, 4, 8, 0, 6, 1, 1], None),
        ([2, 5, 1, 1, 1, 2, 4, 8, 0, -1, 1, 1], None),
        ([2, -1, 1, 1, 1, 2, 4, 8, 0, -1, 1, 1], None),
        ([2, -1, 1, 1, 1, 0, 0, 0, 0, -1, 1, 1], torch.tensor([[2, 4, 8]])),
    ],
)
def test_the_rest_of_the_keys(layout: list[int], grids: torch.Tensor | None) -> None:
    right, right_lse = op_call([2, 5, 1, 1, 1, 2, 4, 8, 0, 6, 1, 1], 70, 75)
    out, lse = op_call(layout, 70, 75, grids)
    assert torch.equal(out, right) and torch.equal(lse, right_lse)


def test_the_rest_may_be_nothing() -> None:
    right, _ = op_call([1, 2, 4, 8], 64, 64)
    for layout in ([1, 2, 4, 8, 2, -1, 1, 1], [2, -1, 1, 1, 1, 2, 4, 8, 0, -1, 1, 1]):
        assert torch.equal(op_call(layout, 64, 64)[0], right)


@pytest.mark.parametrize(
    ("layout", "queries", "keys", "message"),
    [
        ([1, 2, 4, 8, 2, 5, 1, 1], 64, 70, "holds 69 tokens but the sequence has 70"),
        ([1, 2, 4, 8, 0, 5, 1, 1], 64, 69, "has 69 queries but q holds 64"),
        ([1, 2, 4, 8, 2, 5, 1, 1], 69, 69, "has 64 queries but q holds 69"),
        ([1, 2, 4, 8, 2, -1, 1, 1], 70, 64, "q holds 70 tokens and k only 64"),
        ([2, 9, 1, 1, 1, 2, 4, 8, 2, -1, 1, 1], 64, 70, "known size hold 9 tokens .* has 6"),
        ([2, -1, 1, 1, 1, 2, 4, 8, 2, -1, 1, 1], 64, 70, "2 segments take the rest"),
        ([1, 2, 4, 8, 2, 6, 2, 1], 64, 70, "no such"),
        ([1, 2, 4, 8, 2, -6, 1, 1], 64, 70, "context segment of length -6: leave out"),
    ],
)
def test_layouts_that_do_not_fit(layout: list[int], queries: int, keys: int, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        op_call(layout, queries, keys)


def test_layouts_with_context() -> None:
    layout = Layout.of(Context(5), Video(2, 3, 4), Extra(2), Context(7))
    assert (layout.length, layout.query_length) == (38, 26)
    assert layout.videos == ((5, Video(2, 3, 4)),)
    assert layout.contexts == ((0, Context(5)), (31, Context(7)))
    assert Layout.decode(layout.encode()) == layout
    assert str(layout) == "[context 5, video 2x3x4, extra 2, context 7]"
    with pytest.raises(LayoutError, match="at least one video"):
        Layout.of(Context(3))


def of_sizes(video: torch.Tensor, cache: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """A layer that attends to its own tokens (B, H, N, D) and to a cache before them."""
    layout = Layout.of(Context(cache.shape[2]), Video(*grid.shape))
    keys = torch.cat([cache, video], dim=2)
    plan = Plan.uniform(2, (1, 2, 4), 0.4)
    return sparse_attention(video, keys, keys, layout=layout, plan=plan, executor="cpu") + 1.0


def test_compiled_with_symbolic_sizes() -> None:
    torch._dynamo.reset()
    graphs = []

    def counting(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        graphs.append(gm)
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

    compiled = torch.compile(of_sizes, backend=counting, dynamic=True, fullgraph=True)
    for sides, cached in (((3, 4, 8), 11), ((4, 5, 6), 31)):
        tokens = sides[0] * sides[1] * sides[2]
        inputs = normal(tokens, 2, 0), normal(cached, 2, 1), torch.empty(sides)
        close(compiled(*inputs), of_sizes(*inputs))
    assert len(graphs) == 1
