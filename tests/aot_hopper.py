"""Ahead-of-time compilation of the Hopper kernel as it ships; run as a program, prints JSON.

The launches are those of `attend` on meta tensors, specialised by Triton's own launcher for a GPU
that is only said to be there. Needs no GPU. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from aot_compile import cuobjdump
from triton.backends.compiler import GPUTarget

from veda_compile.kernels.call import AttentionCall, Selection
from veda_compile.kernels.hopper import attend as module
from veda_compile.kernels.hopper.kernel import attend_kernel
from veda_compile.kernels.layout import Extra, Layout, Video
from veda_compile.kernels.plan import Plan, TileShape
from veda_compile.kernels.triton.tables import KeyRows

MASKED = Layout.of(Extra(70), Video(21, 45, 80), Extra(226))
SMALLEST = Layout.of(Extra(1), Video(1, 1, 1), Extra(1))
WHOLE = Layout.of(Video(16, 32, 64))
BFLOAT16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One specialisation. by_head: tensors are (B, H, N, D), else (B, N, H, D), in memory.

    padded: with `key_valid`.
    """

    shape: TileShape
    head_dim: int
    layout: Layout
    dtype: torch.dtype = BFLOAT16
    by_head: bool = False
    padded: bool = False


@dataclass(frozen=True)
class Compiled:
    """What came out. stack: bytes per thread, spills: instructions that move them.

    boxes: dimensions of the copies from global memory. products: warpgroup instructions, waits:
    where they are waited for, in all groups together.
    """

    case: str
    head_dim: int
    tile: int
    groups: int
    registers: int
    highest_register: int
    stack: int
    spills: int
    shared: int
    boxes: list[int]
    stores: int
    products: int
    waits: int


def cases() -> list[Case]:
    """Every configuration, with masks, which cost registers; and what else changes the code."""
    shapes: dict[int, TileShape] = {64: (4, 4, 4), 128: (4, 4, 8)}
    found = [
        Case(shapes[size], head_dim, MASKED, padded=padded)
        for head_dim, size in module.CONFIGS
        for padded in (False, True)
    ]
    # sizes of 1 would be constants to Triton, were they not declared otherwise
    found.append(Case((1, 1, 128), 128, SMALLEST, torch.float16))
    return [*found, Case((4, 4, 8), 128, WHOLE, by_head=True)]


class _Gpu:
    """Says that one Hopper GPU is there, to whoever only compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _valid_rows(table: torch.Tensor, key_valid: torch.Tensor) -> KeyRows:
    """`valid_rows` where nothing can be launched."""
    rows = table.new_empty((len(key_valid), *table.shape))
    return KeyRows(rows, rows.new_empty(rows.shape[:2], dtype=torch.float32))


class _Compiler:
    """In the kernel's place: compiles what a launch would run."""

    def __init__(self) -> None:
        self.built: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            self.built.append(attend_kernel.warmup(*args, grid=grid, **options))

        return launch


def compile_case(case: Case) -> Compiled:
    """Compile to machine code and read its resource use back from it."""
    heads, tokens = 1 if case.layout == SMALLEST else 4, case.layout.length
    sides = (heads, tokens) if case.by_head else (tokens, heads)
    x = torch.empty(1, *sides, case.head_dim, dtype=case.dtype, device="meta")
    x = x if case.by_head else x.transpose(1, 2)
    plan = Plan.uniform(heads, case.shape, 0.1)
    valid = x.new_empty((1, tokens), dtype=torch.bool) if case.padded else None
    call = AttentionCall(x, x, x, case.layout, plan, 0.1, valid)
    lists = torch.empty(1, heads, 1000, 16, dtype=torch.int32, device="meta")
    compiler = _Compiler()
    with (
        mock.patch.object(module, "attend_kernel", compiler),
        mock.patch.object(module, "valid_rows", _valid_rows),
        mock.patch.object(type(triton.runtime.driver), "active", _Gpu()),
    ):
        module.attend(call, Selection(lists, lists[..., 0]))
    (built,) = compiler.built
    cubin = built.asm["cubin"]
    usage = dict(re.findall(r"\b([A-Z]+):(\d+)", cuobjdump("-res-usage", cubin)))
    code = cuobjdump("-sass", cubin)
    return Compiled(
        str(case),
        case.head_dim,
        plan.tile_size,
        module.CONFIGS[case.head_dim, plan.tile_size].groups,
        int(usage["REG"]),
        max(int(number) for number in re.findall(r"\bR(\d+)\b", code)),
        int(usage["STACK"]) + int(usage["LOCAL"]),
        len(re.findall(r"\b(?:LDL|STL)\b", code)),
        built.metadata.shared,
        sorted({int(rank) for rank in re.findall(r"\bUTMALDG\.(\d)D", code)}),
        len(re.findall(r"\bUTMASTG\b", code)),
        len(re.findall(r"\bHGMMA\b", code)),
        len(re.findall(r"\bWARPGROUP\.DEPBAR\b", code)),
    )


def _results() -> Iterator[Compiled]:
    with ProcessPoolExecutor(2) as workers:
        yield from workers.map(compile_case, cases())


def main() -> None:
    Path(sys.argv[1]).write_text(json.dumps([asdict(result) for result in _results()]))


if __name__ == "__main__":
    main()
