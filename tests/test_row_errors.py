"""Errors measured on single queries: what they are with hidden keys, and the memory they take."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peak_memory import peak_memory

from veda_compile import Extra, Layout, Plan, Video, row_errors, sparse_attention
from veda_compile.kernels.plan import TileShape
from veda_compile.layer_search import LayerSearch
from veda_compile.observed_call import ObservedCall
from veda_compile.row_errors import RowSample
from veda_compile.searched_modes import searched_modes
from veda_compile.sidecar_schema import LayerCard


def observed(
    layout: Layout, heads: int, kv_heads: int, dim: int, valid: torch.Tensor | None = None
) -> ObservedCall:
    """A call in bfloat16 with strides as models have them; hidden keys and values are NaN."""
    generator = torch.Generator().manual_seed(3)

    def tokens(count: int, length: int) -> torch.Tensor:
        made = torch.randn(1, length, count, dim, generator=generator)
        return made.bfloat16().transpose(1, 2)

    q, k, v = (tokens(n, layout.length) for n in (heads, kv_heads, kv_heads))
    if valid is not None:
        for x in (k, v):
            x.masked_fill_(~valid[:, None, :, None], math.nan)
    card = LayerCard("blocks.0.attn1", heads, dim)
    return ObservedCall(card, 2 * q, k, v, layout, dim**-0.5, valid, None)


@pytest.mark.parametrize("shape", [(1, 8, 8), (4, 4, 4)], ids=str)
@pytest.mark.parametrize("first", [0, 1])
def test_hidden_keys_do_not_count(shape: TileShape, first: int) -> None:
    """Errors are those of the op, also where the key that fills up ragged tiles is hidden."""
    layout = Layout.of(Video(5, 12, 10), Extra(11))
    valid = torch.ones(1, layout.length, dtype=torch.bool)
    valid[:, torch.tensor([first, 40, 150, 214, 330, 450, 470, 605])] = False
    call = observed(layout, 4, 2, 16, valid)
    rows = torch.arange(600)
    found = RowSample.of(call, 0, rows).errors(shape, (0.5, 1.0), "closed_form")

    def attend(density: float) -> torch.Tensor:
        made = sparse_attention(
            call.q.float(), call.k.float(), call.v.float(), layout=layout, key_valid=valid,
            plan=Plan.uniform(4, shape, density), scale=call.scale, executor="reference",
        )  # fmt: skip
        assert isinstance(made, torch.Tensor)
        return made[0, :, rows]

    exact = attend(1.0)
    wanted = (attend(0.5) - exact).square().sum((1, 2))
    torch.testing.assert_close(found.scored[:, 0], wanted, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.energy, exact.square().sum((1, 2)))
    assert bool((found.scored[:, 1] < 1e-8).all())


@pytest.mark.parametrize("grid", [(4, 8, 16), (5, 7, 9)], ids=["full", "ragged"])
def test_heads_measured_one_at_a_time_show_the_same(
    grid: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout.of(Video(*grid), Extra(5))
    call, rows = observed(layout, 6, 3, 16), torch.arange(0, math.prod(grid), 7)
    shape = (2, 4, 8)
    modes = searched_modes(grid, shape, 0.3)
    seen = 99 * torch.rand(6, modes.tiles, generator=torch.Generator().manual_seed(0))

    def measured() -> row_errors.RowErrors:
        sample = RowSample.of(call, 0, rows)
        return sample.errors(shape, (0.2, 0.5), "closed_form", modes, seen)

    together = measured()
    monkeypatch.setattr(row_errors, "_SLICE_BYTES", 1)
    for name, part in vars(measured()).items():
        torch.testing.assert_close(part, getattr(together, name), msg=name)


@pytest.mark.parametrize("grid", [(8, 16, 16), (7, 15, 19)], ids=["full", "ragged"])
@pytest.mark.parametrize("heads", [4, 32])
def test_memory_is_that_of_one_slice_of_heads_and_of_the_probabilities(
    grid: tuple[int, int, int], heads: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The keys of 32 heads take 32 MiB in float32, and so do the values."""
    most = 4 << 20
    monkeypatch.setattr(row_errors, "_SLICE_BYTES", most)
    call = observed(Layout.of(Video(*grid)), heads, heads, 128)
    search = LayerSearch.of(call, 64, 0.2, "closed_form")

    def measure() -> RowSample:
        sample = search.sample(call, 0)
        for _ in range(2):
            search.step(sample)
        return sample

    probabilities = measure().chances.nbytes  # what is cached is no part of it
    assert peak_memory(measure, tmp_path) <= probabilities + 1.1 * most
