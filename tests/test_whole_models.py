"""Compiled models as users run them: resolutions that change, other compilers, nothing touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiling import QUICK, compiled, sparse_calls
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from toys import Video, latents, toy

import veda_compile
from benchmarks.zoo import call, entry

pytestmark = pytest.mark.usefixtures("fresh_compiler")

GRIDS = [(3, 4, 6), (3, 6, 4), (5, 4, 8), (2, 8, 4)]
"""Landscape, portrait, longer, shorter."""


@pytest.mark.parametrize("name", ["wan t2v", "cogvideox 5b"])
def test_resolutions_take_no_more_compilations_than_without(name: str) -> None:
    model, _ = entry(name).make(GRIDS[0])
    inputs = [entry(name).make(grid)[1] for grid in GRIDS]
    fn = compiled(model, executor="reference", density=0.3)
    found = []
    with torch.no_grad():
        for grid, given in zip(GRIDS, inputs, strict=True):
            with sparse_calls() as calls:
                call(fn, given)
            found.append({c.layout.videos[0][1].grid for c, _ in calls})
            assert len(calls) == entry(name).sites, grid
    assert found == [{grid} for grid in GRIDS]
    graphs = len(veda_compile.report().graphs)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")  # Dynamo decides, whatever the backend
    with torch.no_grad():
        for given in inputs:
            call(torch.compile(model, backend=counter), given)
    assert graphs <= counter.frame_count


def test_blocks_that_share_a_graph_follow_the_grid_of_every_call() -> None:
    model, _ = entry("wan t2v").make(GRIDS[0])
    dense, _ = entry("wan t2v").make(GRIDS[0])
    model.compile_repeated_blocks(
        backend="veda",
        options={"min_tokens": 0, "sidecar": None, "density": 1.0, "inner": "inductor"},
    )
    with torch.no_grad():
        for grid in GRIDS[:2]:  # equally long: nothing recompiles
            given = entry("wan t2v").make(grid)[1]
            with sparse_calls() as calls:
                out = call(model, given)
            assert [c.layout.videos[0][1].grid for c, _ in calls] == [grid] * 2
            torch.testing.assert_close(out, call(dense, given), atol=2e-5, rtol=0.0)
    assert len(veda_compile.report().graphs) == 1


def test_through_aot_autograd() -> None:
    model, given = entry("plain einsum").make(GRIDS[2])
    with torch.no_grad():
        sparse = {
            inner: call(compiled(model, density=0.3, inner=inner), given)
            for inner in ("eager", "aot_eager")
        }
        dense = call(model, given)
        full = call(compiled(model, inner="aot_eager"), given)
    torch.testing.assert_close(sparse["aot_eager"], sparse["eager"], atol=2e-5, rtol=0.0)
    torch.testing.assert_close(full, dense, atol=2e-5, rtol=0.0)
    assert (sparse["eager"] - dense).abs().max() > 1e-2


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_graph_without_a_site_to_rewrite_is_compiled_as_it_is(inner: str) -> None:
    model, given = entry("plain einsum").make(GRIDS[0])
    with torch.no_grad():
        out = call(compiled(model, inner=inner, min_tokens=10_000), given)
        torch._dynamo.reset()
        plain = call(torch.compile(model, backend=inner), given)
    assert torch.equal(out, plain)
    assert {s.reason for s in veda_compile.report().sites} == {"TOO_FEW_TOKENS"}


def _settings() -> dict[str, Any]:
    import torch._inductor.config as inductor

    return {
        "dynamo": torch._dynamo.config.get_config_copy(),
        "inductor": inductor.get_config_copy(),
        "functorch": torch._functorch.config.get_config_copy(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
    }


def _state(model: nn.Module) -> list[Any]:
    state: list[Any] = [(name, p.data_ptr(), p._version) for name, p in model.named_parameters()]
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        state.append((name, type(module), sorted(vars(module)), [len(h) for h in hooks]))
    return state


def test_compiling_changes_neither_the_model_nor_torch() -> None:
    model, x = toy(), latents()
    with torch.no_grad():
        torch.compile(model, backend="eager")(x)  # Dynamo leaves marks of its own
        torch._dynamo.reset()
        settings, state = _settings(), _state(model)
        compiled(model, mode=None)(x)
        torch.compile(model, backend="veda", options={**QUICK, "density": 0.3})(x)
    assert _settings() == settings
    assert _state(model) == state


class LastFrameDropped(Video):
    """Drops the last frame once the frames are one sequence: no size of the graph is T - 1."""

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        frame = x.shape[3] * x.shape[4]
        return super().tokens(x)[:, :-frame]


def test_a_grid_that_no_size_of_the_graph_tells() -> None:
    model = LastFrameDropped(F.scaled_dot_product_attention).eval().requires_grad_(False)
    x = latents((4, 4, 6))
    for dynamic in (False, True):
        torch.compiler.reset()
        veda_compile.reset_report()
        out = torch.compile(model, backend="veda", options={**QUICK, "density": 0.3},
                            dynamic=dynamic)(x)  # fmt: skip
        sites = veda_compile.report().sites
        if dynamic:
            assert {site.reason for site in sites} == {"UNPROVEN_SIZES"}
            assert torch.equal(out, model(x))
        else:
            assert {site.grid for site in sites if site.rewritten} == {(3, 4, 6)}
