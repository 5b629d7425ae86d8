"""One attention call with everything that defines it, and what an executor makes of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import LayoutError, PlanError
from .layout import Layout
from .plan import Plan

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What q, k and v may be."""


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """The inputs of sparse attention.

    q: (B, H, N, D); k, v: (B, Hkv, N, D) with H a multiple of Hkv; any strides; float32, float16
        or bfloat16, the same for all three.
    layout: the segments of the N tokens.
    plan: per-head tile shapes and densities for the H query heads.
    scale: factor on the logits.
    key_valid: (B, N) bool, False for keys nobody attends to (padding), or None.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layout: Layout
    plan: Plan
    scale: float
    key_valid: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name, x in (("q", self.q), ("k", self.k), ("v", self.v)):
            if x.dim() != 4:
                raise PlanError(f"{name} of shape {tuple(x.shape)}: must be (B, H, N, D)")
            if 0 in x.shape:
                raise PlanError(f"{name} of shape {tuple(x.shape)}: no side may be 0")
        if self.q.dtype not in DTYPES:
            raise PlanError(f"q is {self.q.dtype}: must be float32, float16 or bfloat16")
        batch, heads, tokens, head_dim = self.q.shape
        kv_shape = (batch, self.k.shape[1], tokens, head_dim)
        if self.k.shape != kv_shape or self.v.shape != kv_shape:
            raise PlanError(
                f"k {tuple(self.k.shape)} and v {tuple(self.v.shape)} do not go with "
                f"q {tuple(self.q.shape)}: all but the number of heads must be equal"
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
        self.layout.check_length(tokens)
        valid = self.key_valid
        if valid is not None and (valid.shape != (batch, tokens) or valid.dtype != torch.bool):
            raise LayoutError(
                f"key_valid is {valid.dtype} of shape {tuple(valid.shape)}: must be bool of shape "
                f"({batch}, {tokens})"
            )
        if valid is not None and valid.device != self.q.device:
            raise LayoutError(
                f"key_valid is on {valid.device} but q is on {self.q.device}: must be on one"
            )

    @property
    def kv_repeat(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[1] // self.k.shape[1]


@dataclass(frozen=True, eq=False)
class Selection:
    """The key tiles each query tile keeps. Extra keys are always kept and not listed.

    indices: (B, H, Q, K) int32, ascending tile numbers of that head's tile table; entries from
        `counts` on are unspecified and must not be read. Q is the largest tile count of any head.
    counts: (B, H, Q) int32; 0 in rows past a head's own tile count.
    """

    indices: torch.Tensor
    counts: torch.Tensor


def empty_output(q: torch.Tensor) -> torch.Tensor:
    """A fresh (B, H, N, D) tensor stored as (B, N, H, D), as models read it next."""
    batch, heads, tokens, head_dim = q.shape
    return q.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2)
