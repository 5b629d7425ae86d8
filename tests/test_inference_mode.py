"""torch.inference_mode and graph breaks: tokens are followed although its tensors count no writes,
because what graphs compute there is computed outside of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from broken_models import GRIDS, MEDDLERS, Broken, broken, latent, nothing
from compiling import compiled, sparse_calls
from torch import Tensor

import veda_compile
from veda_compile.errors import LayoutError


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    veda_compile.reset_report()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_the_grid_is_that_of_every_call(inner: str) -> None:
    model = broken()
    fn = compiled(model, inner=inner)
    with torch.inference_mode():
        for grid in GRIDS:
            x = latent(grid)
            with sparse_calls() as calls:
                out = fn(x)
            assert [[v.grid for _, v in c.layout.videos] for c, _ in calls] == [[grid]]
            torch.testing.assert_close(out, model(x), atol=2e-5, rtol=0.0)
            assert torch.is_inference_mode_enabled()


@pytest.mark.parametrize("meddle", MEDDLERS)
def test_what_eager_code_does_in_between_is_noticed(meddle: Any) -> None:
    model = broken(meddle)
    with torch.inference_mode():
        x = latent()
        with sparse_calls() as calls:
            out = compiled(model)(x)
        assert not calls and torch.equal(out, model(x))
    assert [site.reason for site in veda_compile.report().sites] == ["NO_PROVENANCE"]


@pytest.mark.parametrize("meddle", MEDDLERS)
def test_what_eager_code_does_only_later_raises_or_compiles_anew(meddle: Any) -> None:
    """Tensors that eager code makes there are inference tensors, which Dynamo tells from others."""
    acts: list[Any] = [nothing]
    model = broken(lambda *parts: acts[0](*parts))
    fn = compiled(model)
    with torch.inference_mode():
        x = latent()
        with sparse_calls() as calls:
            fn(x)
        assert len(calls) == 1
        acts[0] = meddle
        if "written" in meddle.__name__:
            with pytest.raises(LayoutError, match="no longer hold the video tokens"):
                fn(x)
            return
        with sparse_calls() as calls:
            out = fn(x)
        assert not calls and torch.equal(out, model(x))


class Counting(Broken):
    """Writes to a tensor of its own; one made in inference mode can be written to there alone."""

    count: Tensor

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        self.count.add_(1)
        return super().project(x)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_graph_that_writes_to_inference_tensors_runs_and_its_remedy_works(inner: str) -> None:
    torch.manual_seed(0)
    model, x = Counting(nothing).eval().requires_grad_(False), latent()
    for remedied in (False, True):
        torch.compiler.reset()
        veda_compile.reset_report()
        with torch.no_grad() if remedied else torch.inference_mode():
            model.count = torch.zeros(3)
            with sparse_calls() as calls:
                out = compiled(model, inner=inner)(x)
            assert model.count.tolist() == [1.0] * 3
            torch.testing.assert_close(out, model(x), atol=2e-5, rtol=0.0)
        (site,) = veda_compile.report().sites
        assert (site.rewritten, len(calls)) == (remedied, int(remedied))
        if not remedied:
            assert site.reason == "NO_PROVENANCE"
            assert "torch.inference_mode, which counts no writes" in str(site.explanation)
            assert site.remedy == "use torch.no_grad() instead of torch.inference_mode()"
