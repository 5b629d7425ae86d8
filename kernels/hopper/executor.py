"""The Hopper executor: the portable kernels choose the tiles, a kernel of its own attends."""

from __future__ import annotations

import torch

from ..call import AttentionCall, Selection
from ..errors import ExecutorError
from ..executors import YES, Answer, Traits
from ..triton.executor import TritonExecutor
from .attend import CONFIGS, attend
from .views import refusal

DTYPES = (torch.float16, torch.bfloat16)
CAPABILITY = (9, 0)
"""The compute capability whose copies and matrix products the kernel is written with."""


class HopperExecutor(TritonExecutor):
    """`TritonExecutor` with a forward for Hopper that reads boxes of the grid where they lie.

    Never what "auto" means: it compiles and its logic is tested, and no GPU has timed it yet.
    What it cannot run it refuses, and nothing else runs in its place.
    """

    name = "hopper"

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
        if not torch.cuda.is_available():
            return Answer(False, "there is no GPU")
        found_capability = torch.cuda.get_device_capability()
        if found_capability != CAPABILITY:
            return Answer(False, f"compute capability {found_capability} is not {CAPABILITY}")
        return YES

    def attend(
        self, call: AttentionCall, selection: Selection
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Exact softmax over the kept tokens. A row without any key gives 0 and LSE -inf.

        Raises ExecutorError for what `refusal` names.
        """
        reason = refusal(call)
        if reason is not None:
            raise ExecutorError(
                f"executor 'hopper' cannot run this call: {reason}; executor='triton' can"
            )
        with torch.cuda.device(call.q.device):
            return attend(call, selection)
