"""Random video programs: wherever attention goes sparse, on the true grid, order and mask.

Every token carries its place in the video in its first three features, through projections and
whatever rearranges tokens. What arrives at the op must be in raster order by these places; and the
output must be what the same program computes with `sparse_attention` in its place, or, for a call
that stays as it is, dense attention.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from compiling import compiled, sparse_calls
from random_programs import Program, dense
from torch import Tensor

import veda_compile
from veda_compile.functional import sparse_attention
from veda_compile.kernels.call import AttentionCall
from veda_compile.kernels.layout import Context, Video

pytestmark = pytest.mark.usefixtures("fresh_compiler")

PROGRAMS = 60


class Reference:
    """Attention as it must have run, given the calls of the op that did."""

    def __init__(self, calls: list[tuple[AttentionCall, Tensor]]) -> None:
        self.left = [call for call, _ in calls]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        call = next((c for c in self.left if self._is(c, q, k, v)), None)
        if call is None:
            return dense(q, k, v, mask, scale)
        self.left.remove(call)
        keys = order_of(v, call.v)
        queries = order_of(q, call.q)
        check_places(call)
        valid = None
        if mask is not None:
            assert mask.dtype == torch.bool or set(mask.unique().tolist()) <= {0.0, float("-inf")}
            seen = mask if mask.dtype == torch.bool else mask == 0
            valid = seen.expand(q.shape[0], 1, 1, -1)[:, 0, 0][:, keys]
        out = sparse_attention(
            q[:, :, queries], k[:, :, keys], v[:, :, keys], layout=call.layout, plan=call.plan,
            scale=scale, key_valid=valid, executor="reference",
        )  # fmt: skip
        return out[:, :, queries.argsort()]

    @staticmethod
    def _is(call: AttentionCall, *operands: Tensor) -> bool:
        return all(
            x.shape == y.shape and torch.allclose(x.sum(2), y.sum(2), atol=1e-3)
            for x, y in zip((call.q, call.k, call.v), operands, strict=True)
        )


def order_of(held: Tensor, moved: Tensor) -> Tensor:
    """(N,) such that held[:, :, order] is moved."""
    where: dict[bytes, list[int]] = {}
    rows = held.transpose(1, 2).transpose(0, 1).flatten(1).contiguous()
    for place, row in enumerate(rows):
        where.setdefault(row.numpy().tobytes(), []).append(place)
    wanted = moved.transpose(1, 2).transpose(0, 1).flatten(1).contiguous()
    order = torch.tensor([where[row.numpy().tobytes()].pop(0) for row in wanted])
    assert torch.equal(held[:, :, order], moved)
    return order


def check_places(call: AttentionCall) -> None:
    """Every video segment must hold the places of a grid in raster order."""
    start = asked = 0
    for segment in call.layout.segments:
        stop = start + segment.length
        for b, h in itertools.product(range(call.v.shape[0]), range(call.v.shape[1])):
            held = call.v[b, h, start:stop, :3]
            assert torch.allclose(call.k[b, h, start:stop, :3], held, atol=1e-5)
            if not isinstance(segment, Context):
                mine = call.q[b, h, asked : asked + segment.length, :3]
                assert torch.allclose(mine, held, atol=1e-5), "queries in another order"
            if isinstance(segment, Video):
                assert in_raster_order(held.view(*segment.grid, 3)), f"no raster: {segment}"
        start = stop
        asked += 0 if isinstance(segment, Context) else segment.length


def in_raster_order(held: Tensor) -> bool:
    """Whether (T, H, W, 3) places grow, or fall, along one axis each."""
    return any(
        all(_along(held[..., coordinate], side) for side, coordinate in enumerate(order))
        for order in itertools.permutations(range(3))
    )


def _along(values: Tensor, side: int) -> bool:
    line = values.movedim(side, 0).flatten(1)
    steps = line[:, 0].diff()
    constant = torch.allclose(line, line[:, :1].expand_as(line), atol=1e-4)
    return constant and bool((steps > 1e-3).all() or (steps < -1e-3).all())


def check(program: Program) -> list[Any]:
    """Compile and run one program; its sites."""
    torch._dynamo.reset()
    veda_compile.reset_report()

    def layer(*inputs: Tensor) -> Tensor:
        return program(dense, *inputs)

    fn = compiled(layer, density=0.25, executor="reference")
    for grid in program.grids():
        inputs = program.inputs(grid)
        with torch.no_grad():
            try:
                eager = program(dense, *inputs)
            except (RuntimeError, IndexError, ValueError):
                return []  # a program that makes no sense
            with sparse_calls() as calls:
                out = fn(*inputs)
            reference = Reference(calls)
            expected = program(reference, *inputs)
        assert not reference.left, "a sparse call that the program does not make"
        if calls:
            torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
        else:
            assert torch.equal(out, eager)
    return veda_compile.report().sites


def test_random_programs_are_sparse_on_the_true_grid_or_dense() -> None:
    sites = [site for seed in range(PROGRAMS) for site in check(Program(seed))]
    assert sum(site.rewritten for site in sites) > PROGRAMS // 6
    assert sum(not site.rewritten for site in sites) > PROGRAMS // 6
