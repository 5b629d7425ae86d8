"""Video that enters a graph as one sequence: positions, the option `grid`, and `strict`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiling import compiled, run, sparse_calls
from torch import Tensor, fx, nn
from toys import GRID, TOKENS, Attention, latents, toy

import veda_compile
from veda_compile import StrictError
from veda_compile.kernels.executors import YES, Answer
from veda_compile.passes.layout import Evidence, Run, SiteLayout
from veda_compile.passes.reasons import Reason
from veda_compile.passes.sites import Operand, Site
from veda_compile.passes.verdict import Dimensions, Policy, judge_call

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Rotated(Attention):
    """Attention whose queries and keys are steered by positions (N, P)."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        if context is not None:
            wave = torch.cat([(context + 0.3 * i).cos() for i in range(16)], -1)[:, :16]
            q, k = q * wave, k * wave
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Packed(nn.Module):
    """One layer over a packed (B, N, 4) sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 32)
        self.layer = Rotated(F.scaled_dot_product_attention)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        return self.layer(self.embed(x), positions)


def packed() -> Packed:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Packed().eval().requires_grad_(False)


def sequence() -> Tensor:
    return latents().flatten(2).transpose(1, 2).contiguous()


def positions(*grid: int) -> Tensor:
    """(N, 3) float (t, h, w) of a raster grid."""
    return torch.cartesian_prod(*(torch.arange(side).float() for side in grid))


def test_without_positions_there_is_no_grid() -> None:
    _, (site,) = run(packed(), sequence())
    assert (site.reason, site.layer) == ("NO_GRID", "layer")
    assert "(T, H, W)" in str(site.remedy)
    _, (short,) = run(packed(), sequence(), min_tokens=TOKENS + 1)
    assert short.reason == "TOO_FEW_TOKENS"


def test_the_option_tells_the_grid() -> None:
    with sparse_calls() as calls:
        _, (site,) = run(packed(), sequence(), grid=GRID, density=0.3)
    assert (site.rewritten, site.grid, site.evidence) == (True, GRID, Evidence.OPTION.value)
    assert calls[0][0].layout.videos[0][1].grid == GRID


@pytest.mark.parametrize("grid", [(3, 4, 7), (72, 2, 1)])
def test_an_option_of_another_length_is_not_taken(grid: tuple[int, int, int]) -> None:
    _, (site,) = run(packed(), sequence(), grid=grid)
    assert not site.rewritten


@pytest.mark.parametrize("grid", [(4, 3, 6), (3, 6, 4)])
def test_an_option_that_contradicts_the_graph(grid: tuple[int, int, int]) -> None:
    _, sites = run(toy(), latents(), grid=grid)
    _, told = run(packed(), sequence(), positions(*GRID), grid=grid)
    assert {site.reason for site in [*sites, *told]} == {"GRID_CONTRADICTED"}
    named = "x".join(map(str, grid))
    assert all(named in str(s.explanation) and "3x4x6" in str(s.explanation) for s in sites)


def test_an_option_that_agrees_changes_nothing() -> None:
    _, sites = run(toy(), latents(), grid=GRID)
    assert all(site.rewritten and site.evidence == Evidence.LATENT.value for site in sites)


def test_positions_along_one_axis_are_text() -> None:
    _, (site,) = run(packed(), sequence(), torch.arange(float(TOKENS))[:, None])
    assert site.reason == "TEXT_ONLY"


def test_positions_in_another_order_are_refused() -> None:
    shuffled = positions(*GRID)[torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))]
    _, (site,) = run(packed(), sequence(), shuffled)
    assert site.reason == "TOKEN_ORDER"


def test_values_of_positions_tell_the_grid_of_every_call() -> None:
    model, x = packed(), sequence()
    fn = compiled(model, density=0.3)
    grids = [GRID, (3, 6, 4), (2, 6, 6), GRID]
    with torch.no_grad(), sparse_calls() as calls:
        for grid in grids:
            fn(x, positions(*grid))
    assert [call.layout.videos[0][1].grid for call, _ in calls] == grids
    assert len(veda_compile.report().graphs) == 1  # nothing in the graph's guards tells them apart


class Twice(Packed):
    """Positions steer the first attention over the tokens, not the second."""

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        x = self.embed(x)
        x = x + self.layer(x, positions)
        return x + self.layer(x)


def test_what_one_attention_shows_of_the_tokens_holds_for_another() -> None:
    torch.manual_seed(0)
    fn = compiled(Twice().eval().requires_grad_(False), density=0.3)
    grids = [GRID, (3, 6, 4)]
    with torch.no_grad(), sparse_calls() as calls:
        for grid in grids:
            fn(sequence(), positions(*grid))
    seen = [call.layout.videos[0][1].grid for call, _ in calls]
    assert seen == [grid for grid in grids for _ in range(2)]


def test_strict_names_the_layer_that_would_stay_dense() -> None:
    with pytest.raises(Exception, match=r"layer: .*\(T, H, W\)") as caught:
        run(packed(), sequence(), strict=True)
    assert isinstance(caught.value.__cause__ or caught.value, StrictError) or "StrictError" in str(
        caught.value
    )


def test_strict_accepts_what_is_harmless() -> None:
    _, sites = run(toy(layers=3), latents(), strict=True, dense_layers=(0,))
    assert [site.reason for site in sites] == ["DENSE_LAYER", None, None]


def test_strict_refuses_a_graph_that_is_too_short_throughout() -> None:
    with pytest.raises(Exception, match="min_tokens=0 to go sparse"):
        run(toy(), latents(), strict=True, min_tokens=TOKENS + 1)


@pytest.mark.parametrize(("widest", "reason"), [(64, Reason.HEAD_DIM), (0, Reason.DTYPE)])
def test_an_executor_that_cannot_take_the_call(widest: int, reason: Reason) -> None:
    def verify(device: str, dtype: torch.dtype, head_dim: int, tokens: int) -> Answer:
        return YES if head_dim <= widest else Answer(False, f"head_dim {head_dim}")

    node = fx.Graph().placeholder("q")
    node.graph.output(node)
    operand = Operand(node, "bhnd")
    site = Site(fx.GraphModule({}, node.graph), node, operand, operand, operand, "bhnd")
    layout = SiteLayout((Run(0, TOKENS, (), GRID),), Evidence.LATENT)
    dims = Dimensions(1, 2, 2, TOKENS, TOKENS, 96, torch.float32, "cpu", False, True, None)
    policy = Policy(None, (), lambda _: 0, verify, lambda *_: None)
    refusal = judge_call(site, layout, None, dims, policy)
    assert refusal is not None
    assert (refusal.reason, refusal.detail) == (reason, "head_dim 96")
