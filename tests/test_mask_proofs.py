"""Random programs that make masks: whatever is proven of a mask holds for other values too."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compiling import capture
from torch import Tensor

from veda_compile.passes.mask_rows import attending_rows, key_rows
from veda_compile.passes.masks import KeyValidity, key_validity
from veda_compile.passes.sites import find_sites
from veda_compile.passes.writes import Writes

pytestmark = pytest.mark.usefixtures("fresh_compiler")

B, N = 2, 6
Step = Callable[[Tensor, Tensor], Tensor]


def write(x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    x &= y
    return x


def write_by_index(x: Tensor, y: Tensor) -> Tensor:
    x = x.expand(B, 1, N, N).clone()
    x[~y.expand(B, 1, N, N)] = False
    return x


def fill(x: Tensor, y: Tensor) -> Tensor:
    x = x.expand(B, 1, N, N).contiguous()
    x.masked_fill_(y, True)
    return x


STEPS: tuple[Step, ...] = (
    lambda x, y: x & y,
    lambda x, y: x & y,
    lambda x, y: x | y,
    lambda x, y: x ^ y,
    lambda x, y: ~x,
    lambda x, y: x.transpose(2, 3),
    lambda x, y: torch.where(x, y, False),
    lambda x, y: (x.float() * y.float()) > 0.5,
    lambda x, y: torch.logical_and(x.expand(B, 1, N, N), y),
    lambda x, y: x.repeat(1, 1, 1, 1)[:, :, :, :],
    write_by_index,
    fill,
    lambda x, y: write(x.expand(B, 1, N, N), y),
)


def program(seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A mask of (B, 1, N or 1, N or 1) from two tensors of (B, N)."""
    draw = random.Random(seed)
    steps = [(draw.choice(STEPS), draw.randrange(8), draw.randrange(8)) for _ in range(5)]
    additive = draw.random() < 0.3

    def mask(a: Tensor, b: Tensor) -> Tensor:
        held = [a[:, None, None], a[:, None, :, None], b[:, None, None], b[:, None, :, None]]
        for step, x, y in steps:
            held.append(step(held[x % len(held)], held[y % len(held)]))
        last = held[-1]
        return torch.zeros(B, 1, N, N).masked_fill(~last, -torch.inf) if additive else last

    return mask


@pytest.mark.parametrize("first", [0, 12])
def test_what_is_proven_holds_for_other_values(first: int) -> None:
    proven = 0
    for seed in range(first, first + 12):
        mask = program(seed)

        def attend(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, mask(a, b))  # noqa: B023

        qkv = [torch.randn(B, 2, N, 4) for _ in range(3)]
        a, b = torch.rand(2, B, N).gt(0.5).unbind()
        captured = capture(attend, *qkv, a, b)
        (site,) = find_sites(captured.gm)
        found = key_validity(site, N, N, Writes(captured.gm.graph))
        if isinstance(found, str):
            continue
        proven += 1
        graph = captured.gm.graph
        with graph.inserting_before(site.node):
            shown = [site.masks[0].node]
            if isinstance(found, KeyValidity):
                shown += [x for x in (key_rows(graph, found, site.k.node),) if x is not None]
                rows = attending_rows(graph, found, site.q.node)
                shown += [] if rows is None else [rows]
        graph.output_node().args = (tuple(shown),)
        captured.gm.recompile()
        for _ in range(4):
            values = {"a": torch.rand(B, N).gt(0.4), "b": torch.rand(B, N).gt(0.4)}
            inputs = [
                values.get(node.name[-2], example)
                for node, example in zip(
                    graph.find_nodes(op="placeholder"), captured.inputs, strict=True
                )
            ]
            actual, *rows = captured.gm(*inputs)
            actual = (actual if actual.dtype == torch.bool else actual == 0).expand(B, 1, N, N)
            expected = torch.ones(B, 1, N, N, dtype=torch.bool)
            if isinstance(found, KeyValidity):
                if found.keys is not None:
                    expected = expected & rows[0][:, None, None]
                if found.queries is not None:
                    expected = expected & rows[-1][:, None, :, None]
            assert torch.equal(actual, expected), (seed, found)
    assert proven >= 2
