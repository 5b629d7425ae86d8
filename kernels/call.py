"""One attention call with everything that defines it, and what an executor makes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .errors import LayoutError, PlanError
from .layout import Layout
from .plan import Plan

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What q, k and v may be."""


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """The inputs of sparse attention.

    q: (B, H, Nq, D); k, v: (B, Hkv, Nk, D) with H a multiple of Hkv; any strides; float32, float16
        or bfloat16, the same for all three.
    layout: the segments of the Nk keys; all but those of context segments are the Nq queries.
    plan: per-head tile shapes, and densities or static modes, for the H query heads.
    scale: factor on the logits.
    key_valid: (B, Nk) bool, False for keys nobody attends to (padding), or None.
    keep_all: () bool on q's device; where it is True the call keeps every tile of every head, as
        density 1.0 does, static ones too. None is False, known beforehand.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layout: Layout
    plan: Plan
    scale: float
    key_valid: torch.Tensor | None = None
    keep_all: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name, x in (("q", self.q), ("k", self.k), ("v", self.v)):
            if x.dim() != 4:
                raise PlanError(f"{name} of shape {tuple(x.shape)}: must be (B, H, N, D)")
            if 0 in x.shape:
                raise PlanError(f"{name} of shape {tuple(x.shape)}: no side may be 0")
        if self.q.dtype not in DTYPES:
            raise PlanError(f"q is {self.q.dtype}: must be float32, float16 or bfloat16")
        batch, heads, queries, head_dim = self.q.shape
        keys = self.k.shape[2]
        kv_shape = (batch, self.k.shape[1], keys, head_dim)
        if self.k.shape != kv_shape or self.v.shape != kv_shape:
            raise PlanError(
                f"k {tuple(self.k.shape)} and v {tuple(self.v.shape)} do not go with "
                f"q {tuple(self.q.shape)}: k and v must be of one shape, and of q's but for the "
                "numbers of heads and of tokens"
            )
        if heads % self.k.shape[1]:
            raise PlanError(f"{heads} query heads cannot share {self.k.shape[1]} KV heads evenly")
        if not self.q.dtype == self.k.dtype == self.v.dtype:
            raise PlanError(
                f"q, k, v are {self.q.dtype}, {self.k.dtype}, {self.v.dtype}: must be one dtype"
            )
        if not self.q.device == self.k.device == self.v.device:
            raise PlanError(
                f"q, k, v are on {self.q.device}, {self.k.device}, {self.v.device}: must be on one"
            )
        self.plan.check(heads, head_dim)
        self.layout.check_length(keys, queries)
        valid = self.key_valid
        if valid is not None and (valid.shape != (batch, keys) or valid.dtype != torch.bool):
            raise LayoutError(
                f"key_valid is {valid.dtype} of shape {tuple(valid.shape)}: must be bool of shape "
                f"({batch}, {keys})"
            )
        if valid is not None and valid.device != self.q.device:
            raise LayoutError(
                f"key_valid is on {valid.device} but q is on {self.q.device}: must be on one"
            )
        flag = self.keep_all
        if flag is not None and (flag.dim() != 0 or flag.dtype != torch.bool):
            raise PlanError(
                f"keep_all is {flag.dtype} of shape {tuple(flag.shape)}: must be one bool, ()"
            )
        if flag is not None and flag.device != self.q.device:
            raise PlanError(
                f"keep_all is on {flag.device} but q is on {self.q.device}: must be on one"
            )

    @property
    def kv_repeat(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[1] // self.k.shape[1]

    def with_flag_read(self) -> AttentionCall:
        """The same call with `keep_all` gone into the plan. Waits for the device."""
        if self.keep_all is None:
            return self
        plan = self.plan
        if bool(self.keep_all):
            plan = replace(plan, density=(1.0,) * plan.heads, modes=None)
        return replace(self, plan=plan, keep_all=None)


@dataclass(frozen=True, eq=False)
class Selection:
    """The key tiles each query tile keeps. Keys without a grid are always kept and not listed.

    counts: (B, H, Q) int32, Q the largest tile count of any head; 0 in rows past a head's own.
        As many as the head has tiles are all of them, those without a valid key among them.
    indices: (B, H, Q, K) int32, ascending tile numbers of that head's tile table, for rows that do
        not keep all; K is at least 1. Entries from `counts` on, and those of a row that keeps all,
        are unspecified and must not be read: K need not be as many.
    """

    indices: torch.Tensor
    counts: torch.Tensor


def empty_output(q: torch.Tensor) -> torch.Tensor:
    """A fresh tensor of q's shape (B, H, N, D) stored as (B, N, H, D), as models read it next."""
    batch, heads, tokens, head_dim = q.shape
    return q.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2)
