"""The flag keep_all: it makes one call exact, and is decided where the tensors are."""

from __future__ import annotations

import pytest
import torch
from running_executors import EXECUTORS_HERE

from veda_compile import Context, Extra, Layout, Plan, PlanError, Video, sparse_attention

LAYOUT = Layout.of(Extra(3), Video(2, 5, 13), Context(20), Video(1, 5, 13))
PLAN = Plan(((1, 4, 16), (2, 2, 16)), (0.2, 0.35))
EVERY_EXECUTOR = pytest.mark.parametrize("executor", EXECUTORS_HERE)


def inputs(masked: bool = False) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, tokens, 64, generator=generator)
               for tokens in (LAYOUT.query_length, LAYOUT.length, LAYOUT.length))  # fmt: skip
    valid = None
    if masked:
        valid = torch.rand(1, LAYOUT.length, generator=generator) > 0.3
        valid[:, 3:70] = False  # a whole tile
    return {"q": q, "k": k, "v": v, "key_valid": valid}


@EVERY_EXECUTOR
@pytest.mark.parametrize("masked", [False, True], ids=["all_valid", "padded"])
def test_true_is_dense_attention(executor: str, masked: bool) -> None:
    given = inputs(masked)
    out, lse, selection = sparse_attention(
        **given, layout=LAYOUT, plan=PLAN, executor=executor, keep_all=torch.tensor(True),
        return_lse=True, return_selection=True,
    )  # fmt: skip
    q, k, v, valid = given.values()
    mask = None if valid is None else valid[:, None, None]
    right = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, right, rtol=0, atol=2e-5)
    logits = q @ k.transpose(2, 3) / 8
    logits = logits if mask is None else logits.masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=0, atol=2e-5)
    everything = sparse_attention(
        **given, layout=LAYOUT, plan=Plan(PLAN.tile_shapes, (1.0, 1.0)), executor=executor,
        return_selection=True,
    )[1]  # fmt: skip
    assert torch.equal(selection.counts, everything.counts)


@EVERY_EXECUTOR
def test_false_is_as_without_it(executor: str) -> None:
    given = inputs(masked=True)
    found, right = (
        sparse_attention(**given, layout=LAYOUT, plan=PLAN, executor=executor, keep_all=flag,
                         return_lse=True)
        for flag in (torch.tensor(False), None)
    )  # fmt: skip
    assert torch.equal(found[0], right[0]) and torch.equal(found[1], right[1])
    dense = torch.nn.functional.scaled_dot_product_attention(*list(given.values())[:3])
    assert (found[0] - dense).abs().max() > 0.05


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (torch.tensor([True]), r"torch.bool of shape \(1,\): must be one bool"),
        (torch.tensor(1.0), r"torch.float32 of shape \(\): must be one bool"),
        (torch.empty((), dtype=torch.bool, device="meta"), "on meta but q is on cpu"),
    ],
)
def test_other_flags_are_refused(flag: torch.Tensor, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        sparse_attention(**inputs(), layout=LAYOUT, plan=PLAN, keep_all=flag, return_selection=True)


def test_one_compiled_graph_serves_both_values() -> None:
    torch._dynamo.reset()
    graphs = []

    def counting(gm: torch.fx.GraphModule, example: list[torch.Tensor]):
        graphs.append(gm)
        return torch._dynamo.lookup_backend("aot_eager")(gm, example)

    def layer(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        layout, plan = Layout.of(Video(2, 4, 8)), Plan.uniform(2, (1, 2, 4), 0.3)
        return sparse_attention(x, x, x, layout=layout, plan=plan, keep_all=time.amax() >= 500)

    compiled = torch.compile(layer, backend=counting, fullgraph=True)
    x = torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(0))
    for time in (900.0, 100.0):
        torch.testing.assert_close(
            compiled(x, torch.tensor([time])), layer(x, torch.tensor([time])), rtol=0, atol=2e-5
        )
    assert len(graphs) == 1
