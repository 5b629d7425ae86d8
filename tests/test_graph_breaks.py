"""Models that Dynamo cuts into several graphs: the tokens are followed from one to the next."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from broken_models import GRIDS, LANDSCAPE, MEDDLERS, broken, call, latent, nothing
from compiling import compiled
from torch import Tensor, nn

import veda_compile
from benchmarks.originals.catalogue import style
from benchmarks.zoo import entry
from benchmarks.zoo.measure import Setup
from benchmarks.zoo.measure import run as run_entry
from veda_compile.errors import LayoutError
from veda_compile.tags import TAGS


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    veda_compile.reset_report()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["wan original", "cogvideox original"])
def test_original_code_is_served_at_every_size(name: str) -> None:
    known = style(name)
    model, _ = known.make(LANDSCAPE)
    fn = compiled(model)
    for grid in GRIDS:
        inputs = known.make(grid)[1]
        wanted, _ = call(model, inputs)
        out, layouts = call(fn, inputs)
        assert [[v.grid for _, v in layout.videos] for layout in layouts] == [[grid]] * 2
        for a, b in zip(out, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=0.0)


@pytest.mark.parametrize("name", ["wan original", "cogvideox original"])
def test_original_code_is_sparse_as_the_reference_is(name: str) -> None:
    known = style(name)
    model, inputs = known.make((5, 6, 10))
    outs = []
    for executor in ("cpu", "reference"):
        torch.compiler.reset()
        outs.append(call(compiled(model, density=0.3, executor=executor), inputs)[0])
    dense, _ = call(model, inputs)
    for cpu, reference, whole in zip(*outs, dense, strict=True):
        torch.testing.assert_close(cpu, reference, atol=2e-5, rtol=0.0)
        assert float((cpu - whole).abs().max()) > 1e-3


def test_framepack_needs_no_help() -> None:
    known = entry("framepack")
    ran = run_entry(known, Setup((3, 4, 5), 1), density=1.0)
    assert ran.layouts == list(known.layouts((3, 4, 5)))
    assert {s.evidence for s in ran.sites if s.rewritten} == {"what earlier graphs tell"}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [None, False, True])
def test_the_grid_is_that_of_every_call(inner: str, dynamic: bool | None) -> None:
    model = broken()
    fn = torch.compile(
        model,
        backend="veda",
        dynamic=dynamic,
        options={"min_tokens": 0, "sidecar": None, "density": 1.0, "inner": inner},
    )
    for grid in GRIDS:
        x = latent(grid)
        (out,), layouts = call(fn, {"x": x})
        assert [[v.grid for _, v in layout.videos] for layout in layouts] == [[grid]]
        with torch.no_grad():
            torch.testing.assert_close(out, model(x), atol=2e-5, rtol=0.0)


@pytest.mark.parametrize("meddle", MEDDLERS)
def test_what_eager_code_does_in_between_is_noticed(meddle: Any) -> None:
    model = broken(meddle)
    x = latent()
    (out,), layouts = call(compiled(model), {"x": x})
    assert not layouts
    (site,) = veda_compile.report().sites
    assert site.reason == "NO_PROVENANCE" and "graph_breaks" in str(site.remedy)
    assert "the graph breaks between projections and attention" in str(site.explanation)
    with torch.no_grad():
        assert torch.equal(out, model(x))
    torch.compiler.reset()
    with pytest.raises(Exception, match="the graph breaks between"):
        call(compiled(model, strict=True), {"x": x})


@pytest.mark.parametrize("meddle", MEDDLERS)
def test_what_eager_code_does_only_later_raises(meddle: Any) -> None:
    acts: list[Any] = [nothing]
    model = broken(lambda *parts: acts[0](*parts))
    fn = compiled(model)
    x = latent()
    assert call(fn, {"x": x})[1]
    acts[0] = meddle
    with pytest.raises(LayoutError, match="no longer hold the video tokens"):
        call(fn, {"x": x})
    acts[0] = nothing
    assert call(fn, {"x": x})[1]


def test_tokens_moved_by_another_graph_are_not_taken_for_the_same() -> None:
    acts: list[Any] = [nothing]
    model = broken(lambda *parts: acts[0](*parts))
    fn = compiled(model)
    x = latent()
    call(fn, {"x": x})

    def flipped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        moved = k.flip(2)
        torch._dynamo.graph_break()
        return q, moved, v

    acts[0] = compiled(flipped)
    with pytest.raises(LayoutError, match="no longer hold the video tokens"):
        call(fn, {"x": x})


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_graph_that_writes_to_its_input_moves_the_tokens(inner: str) -> None:
    acts: list[Any] = [nothing]
    model = broken(lambda *parts: acts[0](*parts))
    fn = compiled(model, inner=inner)
    x = latent()
    call(fn, {"x": x})

    def flips(k: Tensor) -> Tensor:
        k.copy_(k.flip(2))
        torch._dynamo.graph_break()
        return k + 1

    flip = compiled(flips, inner=inner)

    def meddle(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        flip(k[:])
        return q, k, v

    acts[0] = meddle
    with pytest.raises(LayoutError, match="no longer hold the video tokens"):
        call(fn, {"x": x})


def test_keys_of_another_video_are_not_taken_for_its_own() -> None:
    kept: list[Tensor] = []
    acts: list[Any] = [lambda q, k, v: (kept.append(k), (q, k, v))[1]]
    model = broken(lambda *parts: acts[0](*parts))
    fn = compiled(model)
    assert call(fn, {"x": latent()})[1]
    acts[0] = lambda q, k, v: (q, kept[0], v)
    with pytest.raises(LayoutError, match="no longer hold the video tokens"):
        call(fn, {"x": latent()})


def test_tags_die_with_their_tensors() -> None:
    model = broken()
    fn = compiled(model)
    gc.collect()
    before = len(TAGS)
    for _ in range(3):
        assert call(fn, {"x": latent()})[1]
    gc.collect()
    assert len(TAGS) == before


def test_an_unbroken_model_is_left_alone() -> None:
    gc.collect()
    before = len(TAGS)
    model = nn.Sequential(nn.Conv3d(4, 8, 1), nn.SiLU()).eval().requires_grad_(False)
    x = latent()
    with torch.no_grad():
        out = compiled(model)(x)
    assert len(TAGS) == before and TAGS.of(out) is None and TAGS.of(x) is None
