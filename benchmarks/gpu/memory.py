"""Peak GPU memory of a call of sparse attention above a dense one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Peak:
    """Bytes that a call needs above what stood there before it.

    peak: at the worst moment of a call, its output included. kept: cached by the first call, such
    as tables of tiles, and there from then on; counted in `peak` too.
    """

    peak: int
    kept: int


def peak_of(function: Callable[[], object]) -> Peak:
    """The peak of a CUDA call. It is called twice: what the first one caches stays."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return Peak(torch.cuda.max_memory_allocated() - before, kept)


def above_dense(sparse: Peak, dense: Peak, inputs: int) -> float:
    """What sparse attention needs above dense, as a share of the bytes of q, k and v."""
    return (sparse.peak - dense.peak) / inputs
