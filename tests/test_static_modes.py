"""Static modes: that they reproduce planted patterns, and mixed plans."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from mode_samples import DIAGONAL, FRAMES, FULL, SKIP, STRIPE, kept_by
from naive_attention import boxes_of_tokens, naive_attention
from running_executors import EXECUTORS_HERE
from same_lists import assert_lists

from veda_compile import Context, Extra, Layout, Plan, Video, sparse_attention
from veda_compile.kernels.call import AttentionCall
from veda_compile.kernels.executors import get_executor
from veda_compile.kernels.plan import TileShape
from veda_compile.kernels.static_modes import StaticMode

EVERY_EXECUTOR = pytest.mark.parametrize("executor", EXECUTORS_HERE)
ON_CPU = pytest.mark.parametrize("executor", ["reference", "cpu"])
"""Triton's interpreter attends slowly: here it selects, test_executors.py has it attend."""


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
    return sparse_attention(q, k, v, return_lse=True, return_selection=True, **options)


def assert_alike(given: dict[str, Any], executor: str, right: dict[str, Any] | None = None) -> None:
    """The executor does with `given` what the reference does with `right`, or the same."""
    wanted_out, wanted_lse, wanted = attend(**(right or given), executor="reference")
    call = AttentionCall(
        given["q"], given["k"], given["v"], given["layout"], given["plan"], 0.125,
        given["key_valid"], given.get("keep_all"),
    )  # fmt: skip
    if executor == "triton":
        selection = get_executor(executor).select(call)
    else:
        out, lse, selection = attend(**given, executor=executor)
        torch.testing.assert_close(out, wanted_out, rtol=0, atol=2e-5)
        torch.testing.assert_close(lse, wanted_lse, rtol=0, atol=2e-5)
    assert_lists(call, selection, wanted)


def planted(layout: Layout, shape: TileShape, mode: StaticMode, seed: int) -> torch.Tensor:
    """q and k whose attention is as good as nothing outside the pattern, (2, 1, 1, N, D).

    Queries of a tile are one hot in it, keys hold a large number where a tile may look at them.
    """
    boxes = boxes_of_tokens(layout, shape)
    number = {box: i for i, box in enumerate(sorted({b for b in boxes if b is not None}))}
    tile = torch.tensor([-1 if box is None else number[box] for box in boxes])
    assert len(number) <= 48
    allowed = torch.zeros(len(number), len(number))
    for row, keys in enumerate(kept_by(layout, shape, mode)):
        allowed[row, keys] = 1.0
    q, k = 0.02 * normal(2, 1, 1, len(boxes), 64, seed=seed)
    q[..., : len(number)] += torch.nn.functional.one_hot(tile, len(number))
    k[..., : len(number)] += 40.0 * allowed.T[tile]
    return torch.stack([q, k])


PLANTED = {"diagonal": DIAGONAL, "multi_diagonal": FRAMES, "stripe": STRIPE, "full": FULL}


@ON_CPU
@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_pattern_is_reproduced_by_its_mode_alone(executor: str, kind: str) -> None:
    layout, shape = Layout.of(Video(3, 10, 14)), (1, 8, 8)
    q, k = planted(layout, shape, PLANTED[kind], 1)
    v = normal(1, 1, layout.length, 64, seed=2)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)
    for other, mode in PLANTED.items():
        plan = Plan((shape,), (0.01,), modes=(mode,))
        out = sparse_attention(q, k, v, layout=layout, plan=plan, scale=1.0, executor=executor)
        error = float((out - dense).abs().max())
        if other in (kind, "full"):
            assert error <= 1e-4
        else:
            assert error > 0.05


MIXED_LAYOUTS = {
    "extra first": Layout.of(Extra(3), Video(2, 9, 13)),
    "extra last": Layout.of(Video(2, 9, 13), Extra(70)),
    "two videos": Layout.of(Context(2), Video(3, 4, 9), Extra(5), Video(2, 5, 8)),
    "video alone": Layout.of(Video(2, 9, 13)),
}
MIXED = Plan(
    ((1, 8, 8), (2, 4, 8), (2, 4, 8), (1, 8, 8), (1, 4, 16), (2, 4, 8)),
    (0.3, 0.2, 0.5, 0.4, 0.2, 0.4),
    modes=(None, DIAGONAL, None, SKIP, STRIPE, FRAMES),
)


def mixed_inputs(layout: Layout, masked: bool) -> dict[str, Any]:
    q = normal(2, 6, layout.query_length, 64)
    k, v = (normal(2, 3, layout.length, 64, seed=seed) for seed in (1, 2))
    valid = None
    if masked:
        valid = normal(2, layout.length, seed=3) > -0.5
        valid[1, : layout.length // 2] = False  # whole tiles, of one batch element alone
        for x in (k, v):
            x.masked_fill_(~valid[:, None, :, None], math.nan)
    return {"q": q, "k": k, "v": v, "key_valid": valid, "layout": layout, "plan": MIXED}


@pytest.mark.parametrize("masked", [False, True], ids=["all valid", "padded"])
@pytest.mark.parametrize("layout", MIXED_LAYOUTS.values(), ids=MIXED_LAYOUTS)
@EVERY_EXECUTOR
def test_static_and_scored_heads_in_one_call(executor: str, layout: Layout, masked: bool) -> None:
    assert_alike(mixed_inputs(layout, masked), executor)


def test_the_reference_is_the_naive_attention() -> None:
    for layout in MIXED_LAYOUTS.values():
        given = mixed_inputs(layout, masked=True)
        out, lse, _ = attend(**given, executor="reference")
        call = AttentionCall(
            given["q"], given["k"], given["v"], layout, MIXED, 0.125, given["key_valid"]
        )
        right, right_lse, _ = naive_attention(call)
        torch.testing.assert_close(out.double(), right, rtol=0, atol=2e-5)
        torch.testing.assert_close(lse.double(), right_lse, rtol=0, atol=2e-5)


@ON_CPU
def test_a_static_head_next_to_others_is_what_it_is_alone(executor: str) -> None:
    given = mixed_inputs(MIXED_LAYOUTS["extra first"], masked=False)
    together, _, _ = attend(**given, executor=executor)
    for head in range(6):
        plan = Plan(
            MIXED.tile_shapes[head : head + 1], MIXED.density[head : head + 1],
            modes=(MIXED.mode(head),),
        )  # fmt: skip
        kv = head // 2
        alone = sparse_attention(
            given["q"][:, head : head + 1], given["k"][:, kv : kv + 1], given["v"][:, kv : kv + 1],
            layout=given["layout"], plan=plan, executor=executor,
        )  # fmt: skip
        torch.testing.assert_close(together[:, head : head + 1], alone, rtol=0, atol=2e-5)


@ON_CPU
def test_skip_leaves_extra_and_context_keys(executor: str) -> None:
    plan = Plan(((1, 8, 8),) * 2, (0.5,) * 2, modes=(SKIP, SKIP))
    for layout in (Layout.of(Extra(3), Video(2, 9, 13), Context(4)), Layout.of(Video(2, 9, 13))):
        q = normal(1, 2, layout.query_length, 64)
        k, v = (normal(1, 2, layout.length, 64, seed=seed) for seed in (1, 2))
        out, lse, _ = attend(q, k, v, layout=layout, plan=plan, executor=executor)
        if layout.length > 234:
            keys = [0, 1, 2, *range(237, 241)]
            right = torch.nn.functional.scaled_dot_product_attention(
                q, k[:, :, keys], v[:, :, keys]
            )
            torch.testing.assert_close(out[:, :, 3:], right[:, :, 3:], rtol=0, atol=2e-5)
            dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            torch.testing.assert_close(out[:, :, :3], dense[:, :, :3], rtol=0, atol=2e-5)
        else:
            assert torch.equal(out, torch.zeros_like(out))
            assert bool((lse == -math.inf).all())


@EVERY_EXECUTOR
@pytest.mark.parametrize(
    "modes", [MIXED.modes, (DIAGONAL,) * 3 + (SKIP,) * 3], ids=["mixed", "all"]
)
def test_keep_all_wins_over_static_modes(executor: str, modes: Any) -> None:
    layout = MIXED_LAYOUTS["two videos"]
    given = mixed_inputs(layout, masked=True) | {
        "plan": Plan(MIXED.tile_shapes, MIXED.density, modes=modes)
    }
    everything = Plan(MIXED.tile_shapes, (1.0,) * 6)
    assert_alike(given | {"keep_all": torch.tensor(True)}, executor, given | {"plan": everything})
    assert_alike(given | {"keep_all": torch.tensor(False)}, executor, given)


@EVERY_EXECUTOR
@pytest.mark.parametrize("score", ["mean", "projection"])
def test_static_heads_go_with_every_score(executor: str, score: str) -> None:
    layout = MIXED_LAYOUTS["extra last"]
    projection = 0.1 * normal(2, 6, 192, 64, seed=5) if score == "projection" else None
    factors = normal(2, 6, 64, 4, seed=6) if score == "projection" else None
    plan = Plan(MIXED.tile_shapes, MIXED.density, score, projection, factors, MIXED.modes)
    assert_alike(mixed_inputs(layout, masked=False) | {"plan": plan}, executor)


@EVERY_EXECUTOR
def test_all_heads_skipped_is_nothing(executor: str) -> None:
    layout, plan = Layout.of(Video(1, 8, 8)), Plan(((1, 8, 8),), (0.5,), modes=(SKIP,))
    q, k, v = normal(3, 1, 1, 64, 64)
    out, lse, _ = attend(q, k, v, layout=layout, plan=plan, executor=executor)
    assert torch.equal(out, torch.zeros_like(out)) and bool((lse == -math.inf).all())


def test_one_compiled_graph_with_a_mixed_plan() -> None:
    torch._dynamo.reset()
    given = mixed_inputs(MIXED_LAYOUTS["extra first"], masked=False)
    call = torch.compile(sparse_attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(call(**given), sparse_attention(**given), rtol=0, atol=2e-5)
