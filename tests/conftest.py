"""The environment tests run in; set before anything imports numpy or triton."""

import os

# Kernels run in Triton's interpreter, on any machine. Compiled ones are tested in a process apart.
os.environ["TRITON_INTERPRET"] = "1"
# Threads cost the interpreter's many small matrix products ten times what they save.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
# A stale cache entry can make a broken op look right.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import pytest


@pytest.fixture
def fresh_compiler():
    """Nothing compiled, and an empty report, before and after the test."""
    import torch

    import veda_compile

    torch._dynamo.reset()
    veda_compile.reset_report()
    yield
    torch._dynamo.reset()
    veda_compile.reset_report()
