"""The CPU executor."""

from __future__ import annotations

import logging
from functools import lru_cache

import torch

from .call import AttentionCall, Selection
from .cpu_build import BuildError, load_library
from .cpu_gather import gather_attend
from .cpu_native import native_attend
from .cpu_select import native_select
from .executors import YES, Answer, Traits
from .selection import select_tiles

_LOG = logging.getLogger(__name__)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CpuExecutor:
    """Runs on CPU: by kernels compiled on first use, or in plain torch where no compiler is."""

    name = "cpu"

    def verify(self, traits: Traits) -> Answer:
        """Any head_dim and tile size; see `Executor.verify`."""
        if traits.device != "cpu":
            return Answer(False, f"it runs on cpu, the tensors are on {traits.device}")
        if traits.dtype not in _DTYPES:
            return Answer(False, f"dtype {traits.dtype}: must be float32, bfloat16 or float16")
        return YES

    def select(self, call: AttentionCall) -> Selection:
        """As `select_tiles`, up to scores that differ by no more than float32 rounding."""
        return native_select(call) if has_native_kernels() else select_tiles(call)

    def attend(
        self, call: AttentionCall, selection: Selection
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Executor.attend`."""
        if has_native_kernels():
            return native_attend(call, selection)
        return gather_attend(call, selection)


@lru_cache(maxsize=1)
def has_native_kernels() -> bool:
    """Do the compiled kernels work here? Builds them if need be; logs once why not."""
    try:
        load_library()
    except BuildError as error:
        _LOG.warning(
            "sparse attention on CPU runs in plain torch, two to four times slower: %s. "
            "Install g++ or clang++, or name a compiler in CXX.",
            error,
        )
        return False
    return True
