"""Random programs over small integer vectors: what is proven of their elements holds for others."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compiling import capture
from torch import Tensor

from veda_compile.passes.offsets import Offsets
from veda_compile.passes.truth import Unproven

pytestmark = pytest.mark.usefixtures("fresh_compiler")

B = 3
Step = Callable[[Tensor, Tensor], Tensor]


def written(x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    x[1:] = y[:-1]
    return x


def written_through(x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    part = x[1:2]
    part += 3
    return x + part


def added_in_place(x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    z = x
    x += y
    x.add_(2)
    return z - 1


def gathered(x: Tensor, y: Tensor) -> Tensor:
    return x[y.abs() % B]


STEPS: tuple[Step, ...] = (
    lambda x, y: x + y,
    lambda x, y: 7 - x,
    lambda x, y: x * 3 - y,
    lambda x, y: torch.stack([x, y], 1).flatten()[1 : B + 1],
    lambda x, y: torch.cat([x[:1], y.flip(0)[:-1]]),
    lambda x, y: F.pad(x.cumsum(0), (1, 0), value=4)[:-1],
    lambda x, y: torch.arange(B) * 5 + x.int(),
    lambda x, y: x.view(1, B).expand(2, B).reshape(-1)[::2],
    lambda x, y: y.roll(1) - torch.tensor([1, 2, 3]),
    lambda x, y: x.unbind(0)[1] + y,
    written,
    written_through,
    added_in_place,
    gathered,
)


def program(seed: int) -> Callable[[Tensor], Tensor]:
    draw = random.Random(seed)
    steps = [(draw.choice(STEPS), draw.randrange(9), draw.randrange(9)) for _ in range(5)]

    def vector(mask: Tensor) -> Tensor:
        held = [mask.sum(1), torch.full((B,), 9), torch.zeros(B, dtype=torch.int32)]
        for step, x, y in steps:
            held.append(step(held[x % len(held)], held[y % len(held)]))
        return held[-1]

    return vector


def test_what_is_told_of_a_vector_holds_for_other_counts() -> None:
    told = 0
    for seed in range(60):
        vector = program(seed)
        captured = capture(vector, torch.rand(B, 6) > 0.5)
        graph = captured.gm.graph
        end = graph.output_node()
        (node,) = end.args[0]
        offsets = Offsets(graph)
        try:
            found = offsets.values(node, end)
        except Unproven:
            continue
        told += 1
        for _ in range(3):
            mask = torch.rand(B, 6) > 0.4
            counts = dict(zip(offsets.counts, mask.sum(1).tolist(), strict=False))
            assert [int(x.subs(counts)) for x in found] == vector(mask).tolist(), seed
    assert told >= 25
