"""Ahead-of-time compilation of the Triton kernels as they ship; run as a program, prints JSON.

The executor runs on meta tensors with every launch recorded in place of running it, so what is
compiled is what would be launched: the same arguments, constants and options. Needs no GPU.
TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from veda_compile.kernels.call import AttentionCall
from veda_compile.kernels.layout import Context, Extra, Layout, Video
from veda_compile.kernels.plan import Plan
from veda_compile.kernels.static_modes import StaticMode
from veda_compile.kernels.triton import (
    attend,
    choose,
    configs,
    fused,
    keys,
    place,
    pool,
    project,
    score,
)
from veda_compile.kernels.triton.configs import HEAD_DIMS, TILE_SIZES
from veda_compile.kernels.triton.executor import TritonExecutor

CAPABILITIES = (80, 90, 100)
_KERNELS = {
    "attend": attend.attend_kernel,
    "keys": keys.valid_keys_kernel,
    "choose": choose.choose_kernel,
    "place": place.place_kernel,
    "pool": pool.pool_kernel,
    "project": project.project_kernel,
    "score": score.score_kernel,
    "score_choose": fused.score_choose_kernel,
}
_OPTIONS = ("num_warps", "num_stages")
_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
_SHAPES = {64: ((4, 4, 4), (1, 8, 8)), 128: ((4, 4, 8), (1, 8, 16))}


@dataclass(frozen=True)
class Job:
    """One kernel specialisation for one GPU generation, by parameter name."""

    kernel: str
    capability: int
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Compiled:
    """What came out. stack: bytes per thread, more than 0 where registers spill.
    wgmma: such instructions in the forward kernel for Hopper, else 0."""

    kernel: str
    capability: int
    dtype: str
    constants: dict[str, Any]
    options: dict[str, int]
    registers: int
    stack: int
    shared: int
    wgmma: int


def shipped_jobs(capability: int) -> list[Job]:
    """Every specialisation the executor launches on one GPU generation, without repeats."""
    launches: list[tuple[str, dict[str, Any]]] = []

    def record(self: Any, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
        name = next(key for key, kernel in _KERNELS.items() if kernel is self)
        named = dict(zip(inspect.signature(self.fn).parameters, args, strict=False))
        launches.append((name, named | kwargs))

    executor = TritonExecutor()
    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(attend, "gpu_generation", lambda device: capability // 10),
    ):
        for call in _calls():
            executor.attend(call, executor.select(call))
        wide = _call(Layout.of(Video(60, 64, 64)), Plan.uniform(80, (4, 4, 8), 0.1), 128)
        executor.attend(wide, executor.select(wide))
        some = _call(Layout.of(Video(21, 45, 80)), Plan.uniform(16, (1, 8, 16), 0.1), 128)
        valid = torch.empty(1, some.k.shape[2], dtype=torch.bool, device="meta")
        executor.select(replace(some, key_valid=valid))
        for call, most_fused in _counts_of_tiles():
            with mock.patch.object(configs, "MOST_FUSED_COLUMNS", most_fused):
                executor.select(call)
    return list(dict.fromkeys(_job(name, given, capability) for name, given in launches))


def _calls() -> Iterator[AttentionCall]:
    layout = Layout.of(Video(21, 45, 80), Extra(512))
    for head_dim in HEAD_DIMS:
        for size in TILE_SIZES:
            plan = Plan(_SHAPES[size] * 8, (0.1,) * 16)
            for dtype in (torch.bfloat16, torch.float32):
                yield _call(layout, plan, head_dim, dtype)
    cube = (4, 4, 8)
    # float16 differs from bfloat16 in the instructions' types alone
    yield _call(layout, Plan.uniform(16, cube, 0.1), 128, torch.float16)
    yield _call(layout, Plan.uniform(16, cube, 0.1, "mean"), 128)
    projection = torch.empty(2, 16, 384, 128, device="meta")
    trained = Plan((cube,) * 16, (0.1,) * 16, "projection", projection)
    yield _call(layout, trained, 128)
    factors = torch.empty(2, 16, 128, 16, device="meta")
    modes = (None, StaticMode("diagonal", (2, 0)), StaticMode("full"), StaticMode("skip")) * 4
    mixed = Plan((cube,) * 16, (0.1,) * 16, factors=factors, modes=modes)
    yield _call(layout, mixed, 128)
    # reading a meta tensor raises: that the host does not wait for the flag shows here too
    flag = torch.empty((), dtype=torch.bool, device="meta")
    cached = Layout.of(Context(1024), *layout.segments)
    yield _call(cached, Plan.uniform(16, cube, 0.1), 128, keep_all=flag)
    yield _call(cached, mixed, 128, keep_all=flag)


def _counts_of_tiles() -> Iterator[tuple[AttentionCall, int]]:
    """Calls to select for with 16 to 4,096 tiles and every width of features, and how many columns
    of scores may stay in registers: as it ships, and as many as there are launches for."""
    shipped, shape = configs.MOST_FUSED_COLUMNS, (1, 8, 16)
    for tiles in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
        call = _call(Layout.of(Video(1, 8, 16 * tiles)), Plan.uniform(16, shape, 0.1), 128)
        yield call, shipped
        if shipped < tiles <= 512:
            yield call, 512
    few = Layout.of(Video(1, 8, 16 * shipped))
    modes = (None, StaticMode("full")) * 8
    flag = torch.empty((), dtype=torch.bool, device="meta")
    for head_dim, rank in zip(HEAD_DIMS, (1, 24, 128), strict=True):
        factors = torch.empty(2, 16, head_dim, rank, device="meta")
        projection = torch.empty(2, 16, 3 * head_dim, head_dim, device="meta")
        mixed = Plan((shape,) * 16, (0.1,) * 16, "projection", projection, factors, modes)
        yield _call(few, mixed, head_dim, keep_all=flag), shipped
        yield _call(few, Plan.uniform(16, shape, 0.1, "mean"), head_dim, torch.float32), shipped


def _call(
    layout: Layout,
    plan: Plan,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    keep_all: torch.Tensor | None = None,
) -> AttentionCall:
    q, k, v = (
        torch.empty(1, tokens, plan.heads, head_dim, dtype=dtype, device="meta").transpose(1, 2)
        for tokens in (layout.query_length, layout.length, layout.length)
    )
    return AttentionCall(q, k, v, layout, plan, head_dim**-0.5, None, keep_all)


def _job(kernel: str, given: dict[str, Any], capability: int) -> Job:
    """The specialisation Triton's launcher derives from arguments, spelled out."""
    signature, constants, divisible = [], [], []
    for parameter in _KERNELS[kernel].params:
        value = given[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or (special and isinstance(value, int) and value == 1):
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
            continue
        if isinstance(value, torch.Tensor):
            signature.append((parameter.name, _TYPES[value.dtype]))
            divisible.append(parameter.name)  # allocations are aligned
        elif isinstance(value, float):
            signature.append((parameter.name, "fp32"))
        else:
            signature.append((parameter.name, "i32" if abs(value) < 2**31 else "i64"))
            if special and value % 16 == 0:
                divisible.append(parameter.name)
    options = tuple((name, given[name]) for name in _OPTIONS if name in given)
    return Job(kernel, capability, tuple(signature), tuple(constants), tuple(divisible), options)


def compile_job(job: Job) -> Compiled:
    """Compile to machine code and read its resource use back from it."""
    kernel = _KERNELS[job.kernel]
    places = {parameter.name: (parameter.num,) for parameter in kernel.params}
    source = ASTSource(
        kernel,
        dict(job.signature),
        {places[name]: value for name, value in job.constants},
        {places[name]: [["tt.divisibility", 16]] for name in job.divisible},
    )
    target = GPUTarget("cuda", job.capability, 32)
    built = triton.compile(source, target=target, options=dict(job.options))
    cubin = built.asm["cubin"]
    usage = dict(re.findall(r"\b([A-Z]+):(\d+)", cuobjdump("-res-usage", cubin)))
    # disassembling costs more than compiling: only where wgmma exists and matters
    has_wgmma = job.kernel == "attend" and job.capability == 90
    return Compiled(
        job.kernel,
        job.capability,
        dict(job.signature)[kernel.params[0].name].removeprefix("*"),
        {name: value for name, value in job.constants if name.isupper()},
        dict(job.options),
        int(usage["REG"]),
        int(usage["STACK"]) + int(usage["LOCAL"]),
        built.metadata.shared,
        len(re.findall(r"\bHGMMA\b", cuobjdump("-sass", cubin))) if has_wgmma else 0,
    )


def cuobjdump(option: str, cubin: bytes) -> str:
    """What NVIDIA's tool, which comes with triton, says of machine code."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    jobs = [job for capability in CAPABILITIES for job in shipped_jobs(capability)]
    with ProcessPoolExecutor(2) as workers:
        done = list(workers.map(compile_job, jobs))
    Path(sys.argv[1]).write_text(json.dumps([asdict(result) for result in done]))


if __name__ == "__main__":
    main()
