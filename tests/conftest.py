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
    """Nothing compiled nor counted, and an empty report, before and after the test."""
    import torch
    from torch._dynamo.utils import counters

    import veda_compile

    torch._dynamo.reset()
    counters.clear()
    veda_compile.reset_report()
    yield
    torch._dynamo.reset()
    veda_compile.reset_report()


@pytest.fixture
def nothing_waits():
    """Whatever a test does, no observed run of a graph is left behind in the register."""
    from torch._dynamo.utils import counters

    from veda_compile.kernels.observe_op import waiting
    from veda_compile.told import running_call

    counters.clear()
    yield
    assert waiting() == 0 and running_call() is None


@pytest.fixture
def setting(tmp_path):
    """What a stage of the GPU benchmark runs under: a CPU, tiny sizes, a file of results."""
    import time

    from benchmarks.gpu.machine import describe
    from benchmarks.gpu.results import Results
    from benchmarks.gpu.stage import Setting

    results = Results(tmp_path / "results.json", describe("cpu", "abc1234"))
    results.save()
    return Setting("cpu", True, "auto", 0, results, time.monotonic() + 600.0)
