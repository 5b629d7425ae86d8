"""Memory of recorded tensors: which of them are views of one another."""

from __future__ import annotations

import torch
from torch._C import _functorch


def memory_of(tensor: torch.Tensor) -> int | None:
    """What tells one piece of memory from another while the graph is traced.

    None for a tensor without storage of its own. Inside torch.vmap a tensor is a wrapper without
    storage, and a write to it changes the tensor that it wraps.
    """
    while _functorch.is_batchedtensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None
