"""Are the kernels right on this device? Many small calls, every feature, against the reference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.exact import lists_apart
from benchmarks.gpu.plan_trials import plan_trials, sidecar_trials
from benchmarks.gpu.stage import Job, Setting, SkippedError, WrongResultError
from veda_compile.kernels.call import AttentionCall, Selection
from veda_compile.kernels.errors import ExecutorError
from veda_compile.kernels.executors import Executor, Traits, choose_executor
from veda_compile.kernels.layout import Context, Extra, Layout, Video
from veda_compile.kernels.plan import Plan
from veda_compile.kernels.reference import ReferenceExecutor
from veda_compile.kernels.selection import select_tiles

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest accepted |out - reference|, as a share of the largest |reference|."""

LSE_TOLERANCE = 2e-3
SHAPES = {64: (2, 4, 8), 128: (4, 4, 8)}
PARTIAL = ("hopper",)
"""Executors that are for some calls alone; what they refuse by name is skipped, not wrong."""


@dataclass(frozen=True)
class Trial:
    """One call to check; what it leaves unset is plain.

    lists: rewrites the reference's lists before attention. score: see `Plan`. by_head: q, k and v
        are stored as (B, H, N, D), not as (B, N, H, D). padded: with keys that do not count;
        their values are `hidden`.
    plan: in place of density, shapes and score.
    """

    name: str
    layout: Layout
    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    tile_size: int = 128
    density: tuple[float, ...] = (0.3, 0.6)
    shapes: tuple[tuple[int, int, int], ...] = ()
    batch: int = 1
    kv_heads: int = 2
    score: str = "closed_form"
    scale: float | None = None
    padded: bool = False
    hidden: float = math.nan
    keep_all: bool | None = None
    channel_step: int = 1
    by_head: bool = False
    lists: Callable[[Selection], Selection] | None = None
    plan: Plan | None = None

    @property
    def config(self) -> str:
        """The choice of kernels."""
        return config_name(self.head_dim, self.tile_size, self.dtype)

    @property
    def case(self) -> str:
        """Ends in `config` where a failure rules these kernels out for timing: not where it is of
        what the timed calls do without."""
        if self.plan is None and self.score == "closed_form":
            return f"{self.name}, {self.config}"
        return f"{self.config}: {self.name}"


def config_name(head_dim: int, tile_size: int, dtype: torch.dtype) -> str:
    """Names a choice of kernels."""
    return f"head_dim {head_dim}, tile {tile_size}, {str(dtype).removeprefix('torch.')}"


def jobs(setting: Setting) -> Iterator[Job]:
    """One job per trial."""
    for trial in smoke_trials() if setting.smoke else trials():
        yield Job(trial.case, partial(check, setting, trial), 3.0)


def trials() -> Iterator[Trial]:
    """Every feature of what video models use most, then every choice of kernels."""
    yield from _features(torch.bfloat16, 128, 128, (9, 14, 30))
    ragged = Layout.of(Extra(3), Video(5, 13, 21), Extra(70))
    for dtype, head_dim, size in itertools.product(
        (torch.bfloat16, torch.float16, torch.float32), (128, 64, 96), (128, 64)
    ):
        yield Trial("ragged, text, batch 2", ragged, dtype, head_dim, size, batch=2)
    yield from sidecar_trials(Trial("", ragged, torch.bfloat16), (9, 14, 30))


def smoke_trials() -> Iterator[Trial]:
    """The features alone, tiny."""
    yield from _features(torch.float16, 64, 64, (2, 6, 9))
    yield from sidecar_trials(Trial("", Layout.of(Video(2, 6, 9)), torch.float16), (3, 9, 14))


def _features(
    dtype: torch.dtype, head_dim: int, size: int, grid: tuple[int, int, int]
) -> Iterator[Trial]:
    t, h, w = grid
    video = Video(t, h, w)
    plain = Trial("odd sides", Layout.of(Video(t, h - 1, w + 1)), dtype, head_dim, size)
    mixed = Layout.of(Context(2), Extra(3), video, Extra(70), Video(1, h, w), Context(66))
    yield plain
    yield replace(plain, name="whole tiles", layout=Layout.of(Video(4, 8, 16)))
    yield replace(plain, name="shorter than a tile", layout=Layout.of(Video(1, 3, 5)))
    yield replace(plain, name="two videos, extra, context", layout=mixed, batch=2)
    one = Layout.of(Context(2), Extra(3), video, Extra(70), Context(66))
    yield replace(plain, name="one video, extra, context", layout=one, batch=2)
    yield replace(plain, name="stored by head", layout=one, batch=2, by_head=True)
    yield replace(plain, name="GQA", density=(0.1, 0.4, 0.5, 1.0), kv_heads=2)
    yield replace(plain, name="a shape per head", shapes=(SHAPES[size], (1, 8, size // 8)))
    yield replace(plain, name="key validity", layout=mixed, padded=True, batch=2)
    # not every kernel takes NaN among the values of keys that do not count
    padded = replace(plain, padded=True, hidden=1e4, batch=2)
    yield replace(padded, name="key validity, one video", layout=one)
    yield replace(padded, name="key validity, video alone", keep_all=True)
    yield replace(plain, name="score mean", score="mean")
    yield replace(plain, name="score projection", score="projection")
    yield replace(plain, name="an unusual scale", scale=0.31)
    yield replace(plain, name="density 1.0", density=(1.0, 1.0))
    yield replace(plain, name="keep_all", keep_all=True)
    yield replace(plain, name="keep_all, False", keep_all=False)
    yield replace(plain, name="channels apart", channel_step=2)
    yield replace(plain, name="unequal and empty rows", lists=_unequal)
    yield from plan_trials(plain, grid)


def check(setting: Setting, trial: Trial) -> dict[str, Any]:
    """Compare select and attend with the reference. Raises WrongResultError or SkippedError."""
    try:
        return _check(setting, trial)
    except ExecutorError as reason:
        if setting.executor in PARTIAL:
            raise SkippedError(str(reason)) from reason
        raise


def _check(setting: Setting, trial: Trial) -> dict[str, Any]:
    call = make_call(trial, setting.device, setting.seed)
    traits = Traits(setting.device, trial.dtype, trial.head_dim, trial.tile_size)
    executor = choose_executor(setting.executor, traits)
    apart = _check_lists(call, executor)
    selection = select_tiles(call)
    if trial.lists is not None:
        selection = trial.lists(selection)
    inputs = [x.clone() for x in (call.q, call.k, call.v)]
    with _Poison():
        out, lse = executor.attend(call, selection)
    right, right_lse = ReferenceExecutor().attend(call, selection)
    if any(not _same(x, y) for x, y in zip(inputs, (call.q, call.k, call.v), strict=True)):
        raise WrongResultError("attention wrote into its inputs")
    limit = TOLERANCE[trial.dtype] * float(right.float().abs().max())
    error = float((out.float() - right.float()).abs().max())
    empty = right_lse == -torch.inf
    if not torch.equal(lse == -torch.inf, empty):
        raise WrongResultError("other rows are empty than in the reference")
    lse_error = float((lse - right_lse).masked_fill(empty, 0.0).abs().max())
    if not (error <= limit and lse_error <= LSE_TOLERANCE):  # also refuses NaN
        raise WrongResultError(f"out is off by {error:.1e} of {limit:.1e}, lse by {lse_error:.1e}")
    return {"config": trial.config, "error": error, "lse_error": lse_error, "lists_apart": apart}


def make_call(trial: Trial, device: str, seed: int) -> AttentionCall:
    """Random numbers within buffers of NaN, which keys that do not count are too."""
    generator = torch.Generator().manual_seed(seed)
    plan = trial.plan or _plan(trial, generator)
    heads, dim, layout = plan.heads, trial.head_dim, trial.layout

    def tensor(count: int, tokens: int) -> torch.Tensor:
        # margins of 16 and more bytes keep the alignment that tensors of models have
        width = dim * trial.channel_step
        sides = (trial.batch, count, tokens + 3) if trial.by_head else (
            trial.batch + 2, tokens + 3, count + 1)  # fmt: skip
        buffer = torch.full((*sides, width + 16), math.nan, dtype=trial.dtype).to(device)
        inner = buffer[..., 8 : 8 + width : trial.channel_step]
        view = inner[:, :, 2:-1] if trial.by_head else inner[1:-1, 2:-1, :count].transpose(1, 2)
        numbers = torch.randn(trial.batch, tokens, count, dim, generator=generator)
        return view.copy_(numbers.transpose(1, 2))

    q = tensor(heads, layout.query_length)
    k, v = (tensor(trial.kv_heads, layout.length) for _ in range(2))
    valid = None
    if trial.padded:
        valid = torch.rand(trial.batch, layout.length, generator=generator) < 0.7
        valid[-1, : layout.length // 3] = False
        valid = valid.to(device)
        hidden = ~valid[:, None, :, None]
        k.masked_fill_(hidden, math.nan)
        v.masked_fill_(hidden, trial.hidden)
    flag = None if trial.keep_all is None else torch.tensor(trial.keep_all, device=device)
    scale = trial.scale or 1.0 / math.sqrt(dim)
    return AttentionCall(q, k, v, layout, _on(plan, device), scale, valid, flag)


def _plan(trial: Trial, generator: torch.Generator) -> Plan:
    heads, dim, projection = len(trial.density), trial.head_dim, None
    if trial.score == "projection":
        projection = 0.1 * torch.randn(2, heads, 3 * dim, dim, generator=generator)
    shapes = trial.shapes or (SHAPES[trial.tile_size],) * heads
    return Plan(shapes, trial.density, trial.score, projection)


def _on(plan: Plan, device: str) -> Plan:
    """The plan with its weights on the device."""
    weights = {
        name: weight.to(device)
        for name in ("projection", "factors")
        if (weight := getattr(plan, name)) is not None
    }
    return replace(plan, **weights)


def _check_lists(call: AttentionCall, executor: Executor) -> float:
    """See `lists_apart`, of lists in poisoned memory."""
    with _Poison():
        found = executor.select(call)
    return lists_apart(call, found)


def _unequal(selection: Selection) -> Selection:
    """Lists cut to 0, 1, 2, ... tiles in turn; what is cut off holds a number out of range."""
    counts, width = selection.counts, selection.indices.shape[-1]
    rows = torch.arange(counts.shape[2], device=counts.device, dtype=torch.int32)
    counts = torch.minimum(counts, rows % (width + 1))
    past = torch.arange(width, device=counts.device) >= counts[..., None]
    return Selection(selection.indices.masked_fill(past, torch.iinfo(torch.int32).max), counts)


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))


class _Poison:
    """Fresh memory holds NaN, or the largest integer: what is never written shows."""

    def __enter__(self) -> None:
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)
