"""Values that change under a compiled graph, and tokens whose order no graph can know."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compiling import compiled, run, sparse_calls
from torch import Tensor
from toys import GRID, TOKENS, latents

from veda_compile.errors import LayoutError

pytestmark = pytest.mark.usefixtures("fresh_compiler")

Grid = tuple[int, int, int]
TURNED: Grid = (3, 6, 4)
CUBE: Grid = (4, 4, 4)
WEIGHT = torch.nn.Parameter(torch.eye(12), requires_grad=False)


def ids(grid: Grid) -> Tensor:
    """(N, 3) places of a grid's tokens."""
    sides = [torch.arange(side) for side in grid]
    return torch.stack(torch.meshgrid(*sides, indexing="ij"), -1).flatten(0, 2)


def angles(places: Tensor) -> Tensor:
    """(..., N, 3) places to (..., N, 6) rotary angles."""
    return (places[..., None] * torch.tensor([1.0, 0.1])).flatten(-2)


def layer(x: Tensor, table: Tensor) -> Tensor:
    """Self-attention of (B, N, 12) tokens with rotary angles (N, 6) or (B, N, 6)."""
    h = F.linear(x, WEIGHT).unsqueeze(1)
    table = table.unsqueeze(-3)
    a, b = h.chunk(2, -1)
    turned = torch.cat([a * table.cos() - b * table.sin(), a * table.sin() + b * table.cos()], -1)
    return F.scaled_dot_product_attention(turned, turned, h)


def tokens(batch: int = 1, count: int = TOKENS) -> Tensor:
    return torch.randn(batch, count, 12, generator=torch.Generator().manual_seed(2))


def layouts_of(fn: Callable[..., Tensor], *args: Tensor) -> list[str]:
    with sparse_calls() as calls:
        fn(*args)
    return [str(call.layout) for call, _ in calls]


def copy(table: Tensor, grid: Grid) -> None:
    table.copy_(angles(ids(grid)))


def replace_data(table: Tensor, grid: Grid) -> None:
    table.data = angles(ids(grid))


def replace_memory(table: Tensor, grid: Grid) -> None:
    table.set_(angles(ids(grid)))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", [copy, replace_data, replace_memory])
def test_a_position_tensor_with_new_contents_is_read_again(
    change: Callable[[Tensor, Grid], None], context: Callable[[], torch.no_grad]
) -> None:
    with context():
        table = angles(ids(GRID))
        fn = compiled(layer)
        for grid in (GRID, TURNED, GRID):
            change(table, grid)
            assert layouts_of(fn, tokens(), table) == ["[video {}x{}x{}]".format(*grid)]


@pytest.mark.parametrize("grids", [(GRID, TURNED), (CUBE, CUBE)])
def test_a_batch_of_several_grids_stays_dense(grids: tuple[Grid, Grid]) -> None:
    first, second = (ids(grid) for grid in grids)
    if grids[0] == grids[1]:
        second = second.view(*CUBE, 3).transpose(0, 2).flatten(0, 2)
    x, table = tokens(2, first.shape[0]), angles(torch.stack([first, second]))
    out, (site,) = run(layer, x, table)
    assert not site.rewritten
    assert torch.equal(out, layer(x, table))


def test_a_batch_of_equal_grids_is_sparse() -> None:
    moved = ids(GRID) + torch.tensor([5, 0, 0])
    _, (site,) = run(layer, tokens(2), angles(torch.stack([ids(GRID), moved])))
    assert site.rewritten and site.grid == GRID


def test_a_later_batch_of_several_grids_is_refused() -> None:
    fn, x = compiled(layer), tokens(2)
    fn(x, angles(torch.stack([ids(GRID), ids(GRID)])))
    with pytest.raises(LayoutError, match="each of a part of the batch"):
        fn(x, angles(torch.stack([ids(GRID), ids(TURNED)])))


def test_positions_made_in_the_graph_for_each_batch_element_stay_dense() -> None:
    def model(x: Tensor) -> Tensor:
        return layer(x, angles(torch.stack([ids(GRID), ids(TURNED)])))

    out, (site,) = run(model, tokens(2))
    assert site.reason == "TOKEN_ORDER"
    assert torch.equal(out, model(tokens(2)))


def swapped(s: Tensor) -> Tensor:
    even = (torch.arange(TOKENS) % 2 == 0)[None, :, None]
    return torch.where(even, s.roll(-1, 1), s.roll(1, 1))


def chosen(s: Tensor) -> Tensor:
    return torch.where(s[:, :1, :1] > 0, s[:, torch.arange(TOKENS) * 7 % TOKENS], s)


def shuffled(s: Tensor) -> Tensor:
    return s[:, torch.ones(TOKENS).uniform_().argsort()]


def counted(s: Tensor) -> Tensor:
    return s[:, torch.poisson(torch.ones(TOKENS) * 3).argsort(stable=True)]


@torch.compiler.allow_in_graph
def silu(x: Tensor) -> Tensor:
    return x[:, torch.arange(x.shape[1]) * 7 % x.shape[1]]


@pytest.mark.parametrize("move", [swapped, chosen, shuffled, counted, silu])
def test_tokens_in_an_order_that_is_not_known_stay_dense(move: Callable[[Tensor], Tensor]) -> None:
    def model(x: Tensor) -> Tensor:
        s = move(x.flatten(2).transpose(1, 2)).unsqueeze(1)
        return F.scaled_dot_product_attention(s, s, s)

    _, (site,) = run(model, latents())
    assert site.reason == "NO_PROVENANCE"


def shuffled_in_place(x: Tensor, view: Tensor) -> Tensor:
    x.copy_(x.flatten(2)[..., torch.arange(TOKENS) * 7 % TOKENS].view_as(x))
    s = view.flatten(2).transpose(1, 2).unsqueeze(1)
    return F.scaled_dot_product_attention(s, s, s)


def test_a_write_to_an_input_reaches_the_inputs_that_are_views_of_it() -> None:
    x = latents()
    out, (site,) = run(shuffled_in_place, x, x.view_as(x))
    again = latents()
    assert site.reason == "NO_PROVENANCE"
    assert torch.equal(out, shuffled_in_place(again, again.view_as(again)))


def test_writes_to_many_tensors_at_once_are_seen() -> None:
    def model(x: Tensor) -> Tensor:
        s = x.flatten(2).transpose(1, 2).contiguous()
        parts = [s[:, 10:20].clone(), s[:, :10].clone()]
        torch._foreach_copy_([s[:, :10], s[:, 10:20]], parts)
        s = s.unsqueeze(1)
        return F.scaled_dot_product_attention(s, s, s)

    out, (site,) = run(model, latents())
    assert site.reason == "NO_PROVENANCE"
    assert torch.equal(out, model(latents()))
