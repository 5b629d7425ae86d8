"""The Hopper executor: the portable kernels choose the tiles, a kernel of its own attends."""

from __future__ import annotations

import logging
from functools import lru_cache

import torch

from ..call import AttentionCall, Selection
from ..errors import ExecutorError
from ..executors import YES, Answer, Traits, capability_here, on_device
from ..triton.executor import TritonExecutor
from .attend import CONFIGS, attend
from .views import refusal

_LOG = logging.getLogger(__name__)

DTYPES = (torch.float16, torch.bfloat16)
CAPABILITY = (9, 0)
"""The compute capability whose copies and matrix products the kernel is written with."""


class HopperExecutor(TritonExecutor):
    """`TritonExecutor` with a forward for Hopper that reads boxes of the grid where they lie.

    What "auto" means where `kernel_tables.FASTER` says so.
    """

    name = "hopper"

    def __init__(self, or_portable: bool = False) -> None:
        """or_portable: run calls that `refusal` is against with the portable forward, and log a
        warning once for each reason. Else they are refused, and nothing runs in its place."""
        self._or_portable = or_portable

    def verify(self, traits: Traits) -> Answer:
        """Yes for what `attend.CONFIGS` has launches for, on a GPU of this generation."""
        if traits.device != "cuda":
            return Answer(False, f"device {traits.device} is not cuda")
        if traits.dtype not in DTYPES:
            choices = ", ".join(str(choice) for choice in DTYPES)
            return Answer(False, f"dtype {traits.dtype} is not one of {choices}")
        if (traits.head_dim, traits.tile_size) not in CONFIGS:
            choices = ", ".join(f"{head_dim}/{size}" for head_dim, size in CONFIGS)
            found = f"{traits.head_dim}/{traits.tile_size}"
            return Answer(False, f"head_dim/tile size {found} is not one of {choices}")
        capability = capability_here()
        if capability == (0, 0):
            return Answer(False, "there is no GPU of NVIDIA's")
        if capability != CAPABILITY:
            return Answer(False, f"compute capability {capability} is not {CAPABILITY}")
        return YES

    def attend(
        self, call: AttentionCall, selection: Selection
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Exact softmax over the kept tokens. A row without any key gives 0 and LSE -inf.

        Raises ExecutorError for what `refusal` names, unless the portable forward may run it.
        """
        reason = refusal(call)
        if reason is None:
            with on_device(call.q.device):
                return attend(call, selection)
        if self._or_portable:
            _warn_once(reason)
            return super().attend(call, selection)
        raise ExecutorError(
            f"executor 'hopper' cannot run this call: {reason}; executor='triton' can"
        )


@lru_cache(maxsize=256)
def _warn_once(reason: str) -> None:
    _LOG.warning(
        "sparse attention: calls run on executor 'triton' in place of 'hopper', which was measured "
        "faster here but cannot run them: %s",
        reason,
    )
