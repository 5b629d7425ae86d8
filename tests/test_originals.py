"""Code as authors of video models ship it: what is served, what is left, and by which remedy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from compiling import QUICK, compiled, sparse_calls
from torch import Tensor, fx

import veda_compile
from benchmarks.originals.catalogue import STYLES, style
from benchmarks.originals.parts import Original
from veda_compile.backend import veda
from veda_compile.kernels.errors import LayoutError
from veda_compile.kernels.layout import Layout, Video
from veda_compile.report import SiteRecord

pytestmark = pytest.mark.usefixtures("fresh_compiler")

GRID = (5, 6, 10)


def tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of a model's output."""
    if isinstance(output, Tensor):
        yield output
    else:
        for part in output:
            yield from tensors(part)


@dataclass
class Ran:
    """One style, traced once. sparse: per graph, what each executor computed at density 0.3."""

    dense: list[Tensor]
    full: list[Tensor]
    layouts: list[Layout]
    sites: list[SiteRecord]
    sparse: list[dict[str, list[Tensor]]]


def trace(known: Original) -> Ran:
    """Compile and run a style: once at density 1.0, and every graph of it sparse as well."""
    model, inputs = known.make(GRID)
    sites: list[SiteRecord] = []
    sparse: list[dict[str, list[Tensor]]] = []
    layouts: list[Layout] = []
    chosen = {**QUICK, **known.options(GRID)}

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        variants = {
            executor: veda(
                gm, example_inputs, options={**chosen, "density": 0.3, "executor": executor}
            )
            for executor in ("cpu", "reference")
        }
        veda_compile.reset_report()
        full = veda(gm, example_inputs, options={**chosen, "density": 1.0})
        sites.extend(veda_compile.report().sites)

        def run(*args: Any) -> Any:
            sparse.append({name: list(tensors(fn(*args))) for name, fn in variants.items()})
            with sparse_calls() as calls:
                out = full(*args)
            layouts.extend(call.layout for call, _ in calls)
            return out

        return run

    with torch.no_grad(), torch._dynamo.config.patch(**known.dynamo):
        dense = list(tensors(model(**inputs)))
        full = list(tensors(torch.compile(model, backend=backend)(**inputs)))
    return Ran(dense, full, layouts, sites, sparse)


def expected_layout(known: Original) -> list[tuple[int, ...]]:
    """Segments as sides; extra tokens are one side."""
    ends = [((length,),) if length else () for length in (known.first, known.last)]
    return [*ends[0], GRID, *ends[1]]


@pytest.mark.parametrize("known", STYLES, ids=lambda known: known.name)
def test_a_style_is_served_as_it_should_be(known: Original) -> None:
    ran = trace(known)
    assert sum(site.rewritten for site in ran.sites) == (1 if known.shared else known.sites)
    assert Counter(s.reason for s in ran.sites if not s.rewritten) == Counter(known.left)
    assert all(site.explanation for site in ran.sites if not site.rewritten)
    assert len(ran.layouts) == known.sites
    for layout in ran.layouts:
        shown = [s.grid if isinstance(s, Video) else (s.length,) for s in layout.segments]
        assert shown == expected_layout(known)
    for full, dense in zip(ran.full, ran.dense, strict=True):
        if known.sites:
            torch.testing.assert_close(full, dense, atol=2e-5, rtol=0.0)
        else:
            assert torch.equal(full, dense)
    for variant in ran.sparse:
        for cpu, reference in zip(variant["cpu"], variant["reference"], strict=True):
            torch.testing.assert_close(cpu, reference, atol=2e-5, rtol=0.0)
    if known.sites and not known.shared:
        (cpu,) = (variant["cpu"] for variant in ran.sparse)
        changed = max(float((a - b).abs().max()) for a, b in zip(cpu, ran.dense, strict=True))
        assert changed > 1e-3


def outputs(
    known: Original, fn: Any, inputs: dict[str, Any], **dynamo: Any
) -> tuple[list[Tensor], list[Layout]]:
    """What a compiled model returns, and the layouts of its sparse calls."""
    settings = {**known.dynamo, **dynamo}
    with torch.no_grad(), torch._dynamo.config.patch(**settings), sparse_calls() as calls:
        out = list(tensors(fn(**inputs)))
    return out, [call.layout for call, _ in calls]


def test_the_fallback_s_warning_cuts_wan_where_dynamo_is_not_told_of_it() -> None:
    known = style("wan original, static")
    model, inputs = known.make(GRID)
    _, layouts = outputs(known, compiled(model), inputs, reorderable_logging_functions=set())
    assert [layout.videos[0][1].grid for layout in layouts] == [GRID] * 2


@pytest.mark.parametrize("name", ["open-sora v2, checkpointed", "ltx original, checkpointed"])
def test_checkpointed_blocks_through_aot_autograd(name: str) -> None:
    known = style(name)
    model, inputs = known.make(GRID)
    with torch.no_grad():
        dense = list(tensors(model(**inputs)))
    out, layouts = outputs(known, compiled(model, inner="aot_eager"), inputs)
    assert len(layouts) == known.sites
    for a, b in zip(out, dense, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0.0)


@pytest.mark.parametrize("name", ["open-sora v2", "ltx original"])
def test_positions_of_packed_video_tell_the_grid_of_every_call(name: str) -> None:
    known = style(name)
    model, _ = known.make(GRID)
    fn = compiled(model, density=0.3)
    for grid in (GRID, (5, 10, 6), (6, 5, 10)):  # equally long: nothing recompiles
        _, layouts = outputs(known, fn, known.make(grid)[1])
        assert [layout.videos[0][1].grid for layout in layouts] == [grid] * 2
    assert len(veda_compile.report().graphs) == 1


def test_packed_tokens_in_another_order_are_never_taken_for_the_first_one() -> None:
    """Mochi's index tensor is data: a later call may pick other tokens, and nothing recompiles."""
    known = style("mochi original")
    model, inputs = known.make(GRID)
    fn = compiled(model, density=0.3)
    outputs(known, fn, inputs)
    others = {**inputs, "indices": inputs["indices"].clone()}
    others["indices"][: math.prod(GRID)] = inputs["indices"][: math.prod(GRID)].roll(7)
    with pytest.raises(LayoutError, match="tells where the tokens stand"):
        outputs(known, fn, others)
