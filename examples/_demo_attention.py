"""Attention alone: the model's own q, k, v through dense and through sparse attention."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _demo_sampling import timed
from torch import Tensor
from torch.overrides import TorchFunctionMode

from veda_compile.functional import sparse_attention
from veda_compile.kernels.layout import Layout, Video
from veda_compile.kernels.plan import Plan
from veda_compile.options import Options
from veda_compile.planner import Planner
from veda_compile.report import SiteRecord


@dataclass(frozen=True)
class AttentionTimes:
    """Seconds of all self-attention layers of one step, each layer the median of its runs."""

    dense: float
    sparse: float


class _Recorder(TorchFunctionMode):
    """Keeps q, k, v of every self-attention call: queries and keys of the same length."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | given
            q, k, v = (named[name] for name in ("query", "key", "value"))
            if q.shape[-2] == k.shape[-2]:
                self.calls.append((q, k, v))
        return func(*args, **given)


@torch.no_grad()
def record_attention(
    model: Callable[..., Any], inputs: dict[str, Any]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k, v, each (B, H, N, D), of every self-attention layer in one step of an eager model."""
    recorder = _Recorder()
    with recorder:
        model(**inputs)
    return recorder.calls


@torch.no_grad()
def time_attention(
    calls: Sequence[tuple[Tensor, Tensor, Tensor]],
    sites: Sequence[SiteRecord],
    options: Options,
    after_layer: Callable[[], None],
    repeats: int = 5,
) -> AttentionTimes:
    """Time dense and sparse attention on identical inputs, choosing the tiles included.

    calls: as `record_attention` returns them. sites: the report's self-attention sites, in the same
    order; layers that stay dense count with their dense time on both sides.
    """
    planner, dense, sparse = Planner(options), 0.0, 0.0
    for (q, k, v), site in zip(calls, sites, strict=True):
        device = q.device
        run_dense: Callable[[], Any] = partial(F.scaled_dot_product_attention, q, k, v)
        run_sparse = run_dense
        if site.rewritten:
            assert site.grid is not None
            run_sparse = partial(
                sparse_attention,
                q,
                k,
                v,
                layout=Layout.of(Video(*site.grid)),
                plan=plan_of(planner, site, q),
                executor=options.executor,
            )
        run_dense(), run_sparse()  # warm up
        runs = [(timed(run_dense, device)[1], timed(run_sparse, device)[1]) for _ in range(repeats)]
        dense += statistics.median(first for first, _ in runs)
        sparse += statistics.median(second for _, second in runs)
        after_layer()
    return AttentionTimes(dense, sparse)


def plan_of(planner: Planner, site: SiteRecord, q: Tensor) -> Plan:
    """What the backend keeps at a rewritten site, q (B, H, N, D) being its queries."""
    assert site.grid is not None
    card = planner.card_by_name(site.layer)
    plan = planner.plan(card.name if card else None, q.shape[1], (site.grid,))
    weights = {
        name: None if tensor is None else tensor.to(q.device)
        for name, tensor in (("projection", plan.projection), ("factors", plan.factors))
    }
    return replace(plan, **weights)
