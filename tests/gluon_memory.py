"""Shared memory, barriers and boxes as a program's roles meet them, with what must not happen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from gluon_machine import Machine, Role


class Fault(AssertionError):
    """Something that hardware would not forgive."""


def check(sound: bool, message: str) -> None:
    if not sound:
        raise Fault(message)


Clock = dict[object, int]
"""Up to where the past of each role, and of each stage's copies, is known."""


def join(to: Clock, other: Clock) -> None:
    for key, time in other.items():
        to[key] = max(to.get(key, 0), time)


@dataclass(eq=False)
class Cell:
    """One stage of shared memory: how many copies are on their way in, and how many reads out.

    copies: so many were begun. read_at: when each role had last read it.
    """

    landing: int = 0
    readers: int = 0
    written_by: object = None
    copies: int = 0
    read_at: Clock = field(default_factory=dict)

    def free_to_write(self, role: Role) -> None:
        check(self.readers == 0, "shared memory is written while it is read")
        check(self.landing == 0, "shared memory is written while a copy lands")
        for reader, time in self.read_at.items():
            known = time if reader is role else role.known.get(reader, 0)
            check(known >= time, "shared memory is written, and nothing told that it was read")

    def free_to_read(self, role: Role) -> None:
        check(self.landing == 0, "shared memory is read before its copy landed")
        check(role.known.get(self, 0) == self.copies, "shared memory is read unawaited")
        check(self.written_by is None, "the asynchronous side reads what no fence has shown it")


@dataclass(eq=False)
class Shared:
    """A piece of shared memory; `cells` are its stages, or the one it belongs to."""

    data: np.ndarray
    cells: list[Cell]
    machine: Machine

    @property
    def dtype(self) -> Any:
        return self.data.dtype

    @property
    def cell(self) -> Cell:
        """The one stage this is, or is a part of."""
        check(len(self.cells) == 1, "no stage was chosen")
        return self.cells[0]

    def index(self, i: int) -> Shared:
        check(0 <= i < len(self.cells), f"there is no stage {i}")
        return Shared(self.data[i], [self.cells[i]], self.machine)

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.data.reshape(shape), self.cells, self.machine)

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.transpose(order), self.cells, self.machine)

    def store(self, value: np.ndarray) -> None:
        self.cell.free_to_write(self.machine.role)
        self.data[...] = value
        self.cell.written_by = self.machine.current


@dataclass(eq=False)
class Barrier:
    """An mbarrier: a phase ends when all have arrived and all expected bytes have."""

    count: int = 0
    arrived: int = 0
    expected: int = 0
    phase: int = 0
    fenced: bool = False
    seen: Clock = field(default_factory=dict)
    shown: Clock = field(default_factory=dict)

    def index(self, i: int) -> Barrier:
        check(i == 0, "a single barrier has no others")
        return self

    def change(self, arrivals: int, data_bytes: int) -> None:
        check(self.count > 0, "the barrier was not initialised")
        self.arrived += arrivals
        self.expected += data_bytes
        check(self.arrived <= self.count, "more arrivals than the barrier counts")
        if self.arrived == self.count and self.expected == 0:
            self.arrived, self.phase = 0, self.phase ^ 1
            self.shown = dict(self.seen)


class Barriers(list[Barrier]):
    def index(self, i: int) -> Barrier:  # type: ignore[override]
        check(0 <= i < len(self), f"there is no barrier {i}")
        return self[i]


@dataclass(eq=False)
class Pending:
    """A matrix product that nobody has waited for yet."""

    value: np.ndarray
    cells: list[Cell]
    done: bool = False


@dataclass(eq=False)
class Boxes:
    """A descriptor: the tensor as the accelerator sees it."""

    array: np.ndarray
    box: tuple[int, ...]

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def overlap(self, at: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """What part of the box at these coordinates is there: in the tensor and in the box."""
        check(all(-(2**31) <= c < 2**31 for c in at), "coordinates are 32-bit")
        sides = zip(at, self.box, self.array.shape, strict=True)
        spans = [(c, max(c, 0), max(min(c + b, n), max(c, 0))) for c, b, n in sides]
        inside = tuple(slice(low, high) for _, low, high in spans)
        return inside, tuple(slice(low - c, high - c) for c, low, high in spans)
