"""The functional API: tile-sparse attention on tensors, for use without the compiler backend."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch

from .kernels.call import AttentionCall, Selection
from .kernels.errors import ExecutorError
from .kernels.executors import execute
from .kernels.layout import Layout
from .kernels.op import sparse_attention_v2
from .kernels.plan import Plan
from .kernels.static_modes import encode_modes

_Out = torch.Tensor
_OutLse = tuple[torch.Tensor, torch.Tensor]
_OutSelection = tuple[torch.Tensor, Selection]
_OutLseSelection = tuple[torch.Tensor, torch.Tensor, Selection]


# fmt: off
@overload
def sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layout: Layout, plan: Plan,
    scale: float | None = ..., key_valid: torch.Tensor | None = ..., executor: str = ...,
    keep_all: torch.Tensor | None = ...,
    return_lse: Literal[False] = ..., return_selection: Literal[False] = ...,
) -> _Out: ...
@overload
def sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layout: Layout, plan: Plan,
    scale: float | None = ..., key_valid: torch.Tensor | None = ..., executor: str = ...,
    keep_all: torch.Tensor | None = ...,
    return_lse: Literal[True], return_selection: Literal[False] = ...,
) -> _OutLse: ...
@overload
def sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layout: Layout, plan: Plan,
    scale: float | None = ..., key_valid: torch.Tensor | None = ..., executor: str = ...,
    keep_all: torch.Tensor | None = ...,
    return_lse: Literal[False] = ..., return_selection: Literal[True],
) -> _OutSelection: ...
@overload
def sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layout: Layout, plan: Plan,
    scale: float | None = ..., key_valid: torch.Tensor | None = ..., executor: str = ...,
    keep_all: torch.Tensor | None = ...,
    return_lse: Literal[True], return_selection: Literal[True],
) -> _OutLseSelection: ...
# fmt: on
def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    layout: Layout,
    plan: Plan,
    scale: float | None = None,
    key_valid: torch.Tensor | None = None,
    executor: str = "auto",
    keep_all: torch.Tensor | None = None,
    return_lse: bool = False,
    return_selection: bool = False,
) -> _Out | _OutLse | _OutSelection | _OutLseSelection:
    """Softmax attention over the key tiles that `plan` keeps for each query tile.

    Video tokens attend to the kept tiles and to every extra and context token; extra tokens attend
    to everything. It is forward only: there is no gradient. Without `return_selection` it traces
    under torch.compile, as one call of the op `veda::sparse_attention_v2`.

    Args:
        q: (B, H, Nq, D), float32, float16 or bfloat16; any strides.
        k: (B, Hkv, Nk, D), q's dtype and device. H is a multiple of Hkv: query head h reads head
            h // (H / Hkv).
        v: as k.
        layout: the segments of the Nk keys, in order. The tokens of all but the `Context` segments
            are also the Nq queries, in the same order; without such segments Nq = Nk.
        plan: tile shapes, and densities or static modes, of the H query heads, and the score that
            ranks tiles.
        scale: factor on the logits; None is 1 / sqrt(D).
        key_valid: (B, Nk) bool on q's device, False for keys that nobody attends to; None for all.
        executor: "auto" ("cpu" on CPU, "triton" elsewhere, or "hopper" where that was measured
            faster), "reference", "cpu", "triton" or "hopper".
        keep_all: () bool on q's device: True makes this call exact, as density 1.0 would. A GPU
            decides it without the host.
        return_lse: also return the log-sum-exp of each query's kept logits.
        return_selection: also return which tiles were kept.

    Returns:
        out: (B, H, Nq, D) in q's dtype, stored as (B, Nq, H, D). Rows without a single key are 0.
        By return_lse and return_selection, what comes back is `out`, `(out, lse)`,
        `(out, selection)` or `(out, lse, selection)`.
        lse: (B, H, Nq) float32, natural logarithm, -inf for rows without a single key.
        selection: see `Selection`. Its tile numbers are those of `tile_table`.

    Raises:
        LayoutError: the layout does not cover the Nk keys and the Nq queries, or key_valid does
            not fit.
        PlanError: shapes, dtypes or devices of q, k, v do not go together or with the plan, or
            keep_all is not one bool.
        ExecutorError: the executor cannot run these tensors, or a selection was asked for with
            gradients on.
    """
    if return_selection:
        out, lse, selection = _with_selection(
            q, k, v, layout, plan, scale, key_valid, executor, keep_all
        )
        return (out, lse, selection) if return_lse else (out, selection)
    out, lse = sparse_attention_v2(
        q,
        k,
        v,
        key_valid,
        layout.encode(),
        None,
        torch.tensor(plan.tile_shapes, dtype=torch.int32, device="cpu"),
        torch.tensor(plan.density, dtype=torch.float64, device="cpu"),
        plan.projection,
        plan.score,
        scale,
        executor,
        keep_all,
        plan.factors,
        *encode_modes(plan.modes),
    )
    return (out, lse) if return_lse else out


@torch.compiler.disable
def _with_selection(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    plan: Plan,
    scale: float | None,
    key_valid: torch.Tensor | None,
    executor: str,
    keep_all: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, Selection]:
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ExecutorError(
            "return_selection with inputs that require a gradient: there is none, call it under "
            "torch.no_grad()"
        )
    if scale is None:
        scale = 1.0 / math.sqrt(max(q.shape[-1], 1))
    call = AttentionCall(q, k, v, layout, plan, scale, key_valid, keep_all)
    return execute(executor, call)
