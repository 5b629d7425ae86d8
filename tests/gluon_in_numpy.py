"""The words of Gluon that the Hopper kernel uses, in numpy: its own source runs on any machine.

A launch runs program by program, each on a machine of its own that raises what hardware would not
forgive. Layouts, which say where a value's elements are, do nothing here.
"""

from __future__ import annotations

import builtins
import inspect
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gluon_machine import Machine
from gluon_memory import Boxes, Fault, check
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language import constexpr
from triton.runtime.jit import JITFunction

from veda_compile.kernels.hopper import kernel, names, roles

__all__ = ["Fault", "Launcher"]

Edit = tuple[str, str]
"""A piece of the kernel's source and what stands in its place."""


@dataclass(eq=False)
class Pointer:
    """An address, or an array of them, within one tensor."""

    data: np.ndarray
    at: Any = 0

    def __add__(self, step: Any) -> Pointer:
        return Pointer(self.data, self.at + step)

    def places(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        """The addresses and which of them are used; all of those lie in the tensor."""
        used = np.asarray(True if mask is None else mask)
        at, used = np.broadcast_arrays(np.asarray(self.at, np.int64), used)
        inside = (at >= 0) & (at < self.data.size)
        check(bool(np.all(inside | ~used)), "an address lies outside its tensor")
        return np.where(used, at, 0), used


def _load(pointer: Pointer, mask: Any = None, other: Any = None) -> Any:
    at, used = pointer.places(mask)
    found = np.where(used, pointer.data[at] if pointer.data.size else 0, other)
    return found if found.shape else found.item()


def _store(pointer: Pointer, value: np.ndarray, mask: Any = None) -> None:
    at, used = pointer.places(mask)
    pointer.data[at[used]] = np.broadcast_to(value, at.shape)[used]


def _where(condition: Any, yes: Any, no: Any) -> Any:
    if not isinstance(condition, np.ndarray):
        return yes if condition else no
    return np.where(condition, yes, no)


def _cast(x: Any, dtype: Any) -> Any:
    return x.astype(dtype) if isinstance(x, np.ndarray) else int(x)


def _larger(x: Any, y: Any) -> Any:
    return np.maximum(x, y) if isinstance(x, np.ndarray) else builtins.max(x, y)


def _smaller(x: Any, y: Any) -> Any:
    return np.minimum(x, y) if isinstance(x, np.ndarray) else builtins.min(x, y)


def _nothing(*_: object, **__: object) -> None:
    return None


def _language(machine: Machine, program: tuple[int, int, int]) -> SimpleNamespace:
    """`triton.experimental.gluon.language`."""
    return SimpleNamespace(
        constexpr=constexpr,
        int32=np.int32,
        int64=np.int64,
        float32=np.float32,
        program_id=lambda axis: program[axis],
        static_range=range,
        load=_load,
        store=_store,
        cast=_cast,
        where=_where,
        maximum=_larger,
        minimum=_smaller,
        max=lambda x, axis: x.max(axis),
        sum=lambda x, axis: x.sum(axis),
        exp2=np.exp2,
        log2=np.log2,
        full=lambda shape, value, dtype, layout: np.full(shape, value, dtype),
        arange=lambda start, end, layout: np.arange(start, end, dtype=np.int32),
        convert_layout=lambda x, layout: x,
        SliceLayout=_nothing,
        DotOperandLayout=_nothing,
        allocate_shared_memory=machine.allocate,
        warp_specialize=machine.run,
    )


def _namespace(
    machine: Machine, program: tuple[int, int, int], sources: list[Any]
) -> dict[str, Any]:
    """What the kernel's source sees: its own functions and the words of Gluon."""
    found: dict[str, Any] = {
        name: value.value if isinstance(value, constexpr) else value
        for module in (names, roles, kernel)
        for name, value in vars(module).items()
    }
    found |= {
        "gl": _language(machine, program),
        "mbarrier": SimpleNamespace(
            init=machine.init,
            wait=machine.wait,
            arrive=machine.arrive,
            expect=machine.expect,
            MBarrierLayout=_nothing,
        ),
        "load_box": machine.load_box,
        "store_box": machine.store_box,
        "wait_for_stores": machine.wait_for_stores,
        "fence_async_shared": machine.fence,
        "warpgroup_mma": machine.multiply,
        "warpgroup_mma_wait": machine.wait_for_products,
        "product_layout": _nothing,
        "shared_layout": _nothing,
    }
    for source in sources:
        exec(source, found)  # the package's own functions
    return found


def _sources(edits: dict[str, Edit]) -> list[Any]:
    """Every function of the kernel, compiled as plain Python; `edits` by function name."""
    found = []
    left = dict(edits)
    for module in (roles, kernel):
        for name, value in vars(module).items():
            if not isinstance(value, JITFunction) or value.fn.__module__ != module.__name__:
                continue
            text = re.sub(r"^@gluon.jit.*\n", "", inspect.getsource(value.fn))
            if name in left:
                old, new = left.pop(name)
                assert text.count(old) == 1, f"{name} has {text.count(old)} times {old!r}"
                text = text.replace(old, new)
            found.append(compile(text, f"<{name}>", "exec", dont_inherit=True))
    assert not left, f"no function {', '.join(left)}"
    return found


def _argument(value: Any) -> Any:
    """As a kernel sees what its launch is given."""
    if isinstance(value, TensorDescriptor):
        base = value.base
        array = base.as_strided(value.shape, value.strides, base.storage_offset()).numpy()
        return Boxes(array, tuple(value.block_shape))
    if isinstance(value, torch.Tensor):
        return Pointer(value.view(-1).numpy())
    return value


class Launcher:
    """Stands in for the kernel: `launcher[grid](*args, **constants)`, programs in any order."""

    def __init__(self, seed: int = 0, edits: dict[str, Edit] | None = None) -> None:
        self.seed = seed
        self.sources = _sources(edits or {})
        self.programs = 0

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            constants = {name: value for name, value in options.items() if name.isupper()}
            given = [_argument(value) for value in args]
            for program in itertools.product(*(range(side) for side in grid)):
                machine = Machine(self.seed + self.programs)
                self.programs += 1
                found = _namespace(machine, program, self.sources)
                found["attend_kernel"](*given, **constants)

        return launch
