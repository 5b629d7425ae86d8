"""The executors that run on any machine; the others are written for one kind of GPU."""

import torch

from veda_compile.kernels.executors import EXECUTOR_NAMES, Traits, get_executor

EXECUTORS_HERE = tuple(
    name
    for name in EXECUTOR_NAMES
    if get_executor(name).verify(Traits("cpu", torch.float32, 64, 64)).ok
)
