"""Compile a model of the zoo, run it, and hold what happened against the truth."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import veda_compile
from veda_compile.kernels import op
from veda_compile.kernels.call import AttentionCall
from veda_compile.kernels.executors import execute
from veda_compile.kernels.layout import Layout, Video
from veda_compile.kernels.reference import ReferenceExecutor
from veda_compile.kernels.selection import select_tiles
from veda_compile.report import SiteRecord

from .entry import Entry, Grid, call

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Largest accepted |sparse - dense| at density 1.0, as a share of the largest |dense|."""

SPARSE_DENSITY = 0.3


@dataclass(frozen=True)
class Setup:
    """How to compile: regionally is block by block. inner: what compiles the rewritten graph.
    told: option `grid` is given, whether or not the entry says that it is needed."""

    grid: Grid
    batch: int
    dtype: torch.dtype = torch.float32
    regional: bool = False
    inner: str = "eager"
    told: bool = False


@dataclass(frozen=True)
class Outcome:
    """What happened to one model.

    rewritten, wrong: sparse attention calls of one forward, and those of them that should not be
    or have another layout than the true one. left: reports of calls left dense, by reason.
    error: largest |sparse - dense| at density 1.0, as a share of the largest |dense|.
    problems: everything that is not as it should be, in sentences.
    """

    rewritten: int
    wrong: int
    grids: list[Grid]
    left: dict[str, int]
    evidence: list[str]
    error: float
    problems: list[str]


def measure(entry: Entry, setup: Setup, sparse: bool = True) -> Outcome:
    """Compile and run at density 1.0 and, with `sparse`, at 0.3 as well."""
    model, inputs = entry.make(setup.grid, setup.batch, setup.dtype)
    with torch.no_grad():
        dense = call(model, copy.deepcopy(inputs))
    full = run(entry, setup, density=1.0)
    found = len(full.layouts) >= entry.sites or all(s.reason != "NO_GRID" for s in full.sites)
    if setup.regional and not setup.told and not found:
        # the remedy that the report names; bfloat16 rotary tables do not tell every grid
        return measure(entry, replace(setup, told=True), sparse)
    problems = _faults_of_calls(entry, setup, full.layouts) + _faults_of_report(
        entry, setup, full.sites
    )
    error = _distance(full.out, dense)
    limit = TOLERANCE[torch.bfloat16 if entry.half else setup.dtype]
    if not error <= limit:  # also refuses NaN
        problems.append(f"at density 1.0 off by {error:.1e}, more than {limit:.0e}")
    if sparse and entry.sites:
        part = run(entry, setup, density=SPARSE_DENSITY, against_reference=True)
        problems += part.faults
        if full.layouts and torch.equal(part.out, full.out):
            problems.append(f"density {SPARSE_DENSITY} gives what density 1.0 gives")
    done = [site for site in full.sites if site.rewritten]
    _, wrong = _difference(entry, setup, full.layouts)
    return Outcome(
        rewritten=len(full.layouts),
        wrong=len(wrong),
        grids=sorted({video.grid for layout in full.layouts for _, video in layout.videos}),
        left=dict(Counter(str(site.reason) for site in full.sites if not site.rewritten)),
        evidence=sorted({str(site.evidence) for site in done}),
        error=error,
        problems=problems,
    )


@dataclass
class Ran:
    """One compiled run. faults: calls that were not what the reference executor computes."""

    out: Tensor
    layouts: list[Layout]
    sites: list[SiteRecord]
    faults: list[str]


def run(entry: Entry, setup: Setup, density: float, against_reference: bool = False) -> Ran:
    """Compile a fresh model with the backend and call it once."""
    torch.compiler.reset()
    veda_compile.reset_report()
    model, inputs = entry.make(setup.grid, setup.batch, setup.dtype)
    options: dict[str, Any] = {
        "sidecar": None, "density": density, "min_tokens": 0, "inner": setup.inner,
    }  # fmt: skip
    if setup.told or entry.hint == "always" or (entry.hint == "regional" and setup.regional):
        options["grid"] = setup.grid
    compiled = compile_model(entry, model, setup.regional, options)
    seen: list[AttentionCall] = []
    faults: list[str] = []
    with entry.settings(), torch.no_grad(), _watched(seen, faults, against_reference):
        out = call(compiled, inputs)
    return Ran(out, [c.layout for c in seen], veda_compile.report().sites, faults)


def compile_model(entry: Entry, model: nn.Module, regional: bool, options: dict[str, Any]) -> Any:
    """The compiled model; regionally its blocks are, in place."""
    if not regional:
        return torch.compile(model, backend="veda", options=options)
    if not entry.blocks:
        compile_blocks: Any = model.compile_repeated_blocks
        compile_blocks(backend="veda", options=options)
    for name in entry.blocks:
        blocks: Any = model.get_submodule(name)
        for block in blocks:
            block.compile(backend="veda", options=options)
    return model


@contextmanager
def _watched(
    seen: list[AttentionCall], faults: list[str], against_reference: bool
) -> Iterator[None]:
    """Keep every call of the sparse op, and compare each with the reference executor."""

    def spy(requested: str, attention: AttentionCall) -> Any:
        result = execute(requested, attention)
        if against_reference:
            right, _ = ReferenceExecutor().attend(attention, select_tiles(attention))
            off = _distance(result[0], right)
            if not off <= TOLERANCE.get(attention.q.dtype, TOLERANCE[torch.bfloat16]):
                faults.append(f"call {len(seen)} is off the reference by {off:.1e}")
        seen.append(attention)
        return result

    with mock.patch.object(op, "execute", spy):
        yield


def _distance(found: Tensor, right: Tensor) -> float:
    return float((found.float() - right.float()).abs().max() / right.float().abs().max())


def _difference(
    entry: Entry, setup: Setup, found: Sequence[Layout]
) -> tuple[list[Layout], list[Layout]]:
    """True layouts that were not found, and found ones that are not true."""
    true, wrong = list(entry.layouts(setup.grid)), []
    for layout in found:
        fits = [t for t in true if layout == t or (setup.regional and _coarser(layout, t))]
        if fits:
            true.remove(fits[0])
        else:
            wrong.append(layout)
    return true, wrong


def _coarser(found: Layout, true: Layout) -> bool:
    """Whether all that was found is true, though other videos of the sequence count as extra
    tokens: a block may be told no more than the grid of one of them."""
    return (
        (found.length, found.contexts) == (true.length, true.contexts)
        and set(found.videos) <= set(true.videos)
        and max(true.videos, key=lambda video: video[1].length)[1] in dict(found.videos).values()
    )


def _faults_of_calls(entry: Entry, setup: Setup, found: Sequence[Layout]) -> list[str]:
    missing, wrong = _difference(entry, setup, found)
    said = [f"not rewritten: {n} x {_words(x)}" for x, n in Counter(missing).items()]
    return said + [f"wrongly rewritten: {n} x {_words(x)}" for x, n in Counter(wrong).items()]


def _faults_of_report(entry: Entry, setup: Setup, sites: Sequence[SiteRecord]) -> list[str]:
    """Names of what was rewritten; reasons of what was left, in whole models only: a block says
    less about itself than the model does."""
    problems = []
    named = [site.layer for site in sites if site.rewritten]
    strange = [
        str(name)
        for name in named
        if not any(_names(name, true, setup.regional or entry.cut) for true in entry.layers)
    ]
    if strange:
        problems.append(f"rewritten under other names: {', '.join(strange)}")
    if setup.regional:
        return problems
    left = Counter(str(site.reason) for site in sites if not site.rewritten)
    for reasons, count in entry.left.items():
        found = sum(left.pop(reason, 0) for reason in reasons.split(" or "))
        if found != count:
            problems.append(f"left dense as {reasons}: {found}, not {count}")
    problems += [f"left dense as {reason}: {count}, not 0" for reason, count in left.items()]
    return problems


def _names(reported: str | None, true: str, part: bool) -> bool:
    """Whether a reported layer can be that one: in a part of a model, names are shorter or none."""
    if reported is None:
        return part
    return reported == true or true.endswith("." + reported)


def _words(layout: Layout) -> str:
    parts = []
    for segment in layout.segments:
        size = shown(segment.grid) if isinstance(segment, Video) else str(segment.length)
        parts.append(f"{type(segment).__name__.lower()} {size}")
    return " + ".join(parts)


def shown(grid: Grid) -> str:
    """(5, 6, 10) as 5x6x10."""
    return "x".join(map(str, grid))
