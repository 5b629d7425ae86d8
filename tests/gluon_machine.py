"""One program of a warp-specialised kernel: its roles, shared memory, barriers, copies, products.

Every role of a program is a thread; one runs at a time, and which goes on is drawn at random where
the hardware may choose: at barriers, and between issuing a copy and its landing. Faults that a GPU
would answer with a hang or with wrong numbers are raised: roles that all wait, shared memory read
before it was filled or written while it is read, products used before they were waited for.

That an order happened to be right is not enough: every role keeps a vector clock, which travels
through the barriers, so that reading and writing again must be ordered by them in every run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
from gluon_memory import Barrier, Barriers, Boxes, Cell, Clock, Pending, Shared, check, join


def _stop() -> bool:
    """What a role waits for once another has failed."""
    return True


class _Stopped(BaseException):
    """Ends the threads of a program in which another role failed."""


@dataclass(eq=False)
class Role:
    """One partition's thread."""

    call: Callable[[], None]
    machine: Machine
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    ready: Callable[[], bool] = lambda: True
    error: BaseException | None = None
    done: bool = False
    known: Clock = field(default_factory=dict)
    products: list[Pending] = field(default_factory=list)
    stores: list[Callable[[], None]] = field(default_factory=list)

    def main(self) -> None:
        self.go.acquire()
        try:
            if self.ready is not _stop:
                with np.errstate(divide="ignore"):  # log2 of rows without keys
                    self.call()
            check(not self.stores, "a role ends before its stores were read")
            check(not self.products, "a role ends before its products")
        except BaseException as error:  # noqa: BLE001 - goes to the machine, whatever it is
            self.error = error
        self.done = True
        self.machine.back.release()


class Machine:
    """What one program's roles share."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.back = threading.Semaphore(0)
        self.roles: list[Role] = []
        self.copies: list[Callable[[], None]] = []
        self.shared: list[Shared] = []
        self.barriers: list[Barrier] = []
        self.current: Role | None = None

    def run(self, roles: list[tuple[Callable[..., None], tuple[Any, ...]]], *_: object) -> None:
        """The roles to their ends, in any order the barriers allow."""
        self.roles = [Role(lambda f=f, a=a: f(*a), self) for f, a in roles]  # type: ignore[misc]
        threads = [threading.Thread(target=role.main, daemon=True) for role in self.roles]
        for thread in threads:
            thread.start()
        try:
            while not all(role.done for role in self.roles):
                able: list[Any] = [r for r in self.roles if not r.done and r.ready()] + self.copies
                check(bool(able), "deadlock: every role waits and no copy is on its way")
                self._advance(self.random.choice(able))
            check(not self.copies, "a program ends before its copies landed")
        finally:
            for role, thread in zip(self.roles, threads, strict=True):
                if not role.done:
                    role.ready = _stop
                    role.go.release()
                thread.join()

    @property
    def role(self) -> Role:
        assert self.current is not None, "outside of warp_specialize"
        return self.current

    def _advance(self, chosen: Any) -> None:
        if not isinstance(chosen, Role):
            self.copies.remove(chosen)
            chosen()
            return
        self.current = chosen
        chosen.go.release()
        self.back.acquire()
        if chosen.error is not None:
            raise chosen.error

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others go first, and until `ready` they must."""
        role = self.role
        role.ready = ready
        self.back.release()
        role.go.acquire()
        if role.ready is _stop:
            raise _Stopped

    # memory and barriers

    def allocate(self, dtype: Any, shape: list[int], layout: object) -> Shared | Barrier | Barriers:
        if dtype == np.int64:
            return Barrier() if len(shape) == 1 else Barriers(Barrier() for _ in range(shape[0]))
        made = Shared(np.full(shape, np.nan, dtype), [Cell() for _ in range(shape[0])], self)
        self.shared.append(made)
        return made

    def init(self, barrier: Barrier, count: int) -> None:
        check(barrier.count == 0, "the barrier is initialised already")
        barrier.count = count
        self.barriers.append(barrier)

    def wait(self, barrier: Barrier, parity: int) -> None:
        check(parity in (0, 1), f"parity {parity}")
        self.pause(lambda: barrier.phase != parity)
        join(self.role.known, barrier.shown)

    def arrive(self, barrier: Barrier) -> None:
        role = self.role
        role.known[role] = role.known.get(role, 0) + 1
        join(barrier.seen, role.known)
        barrier.change(1, 0)
        self.pause()

    def expect(self, barrier: Barrier, data_bytes: int) -> None:
        barrier.change(0, data_bytes)
        barrier.change(1, 0)

    def load_box(self, boxes: Boxes, at: list[int], barrier: Barrier, to: Shared) -> None:
        check(to.data.shape == boxes.box, f"a box {boxes.box} into {to.data.shape}")
        check(barrier.fenced, "the asynchronous side arrives where no fence has shown a barrier")
        cell = to.cell
        cell.free_to_write(self.role)
        to.data[...] = np.nan
        cell.landing += 1
        cell.copies += 1
        inside, part = boxes.overlap(at)

        def land() -> None:
            to.data[...] = 0
            to.data[part] = boxes.array[inside]
            cell.landing -= 1
            barrier.seen[cell] = cell.copies
            barrier.change(0, -to.data.nbytes)

        self.copies.append(land)
        self.pause()

    def store_box(self, boxes: Boxes, at: list[int], what: Shared) -> None:
        check(what.data.shape == boxes.box, f"a box {boxes.box} from {what.data.shape}")
        cell = what.cell
        cell.free_to_read(self.role)
        cell.readers += 1
        inside, part = boxes.overlap(at)

        def read() -> None:
            boxes.array[inside] = what.data[part]
            cell.readers -= 1

        self.role.stores.append(read)
        self.pause()

    def wait_for_stores(self, pending: int) -> None:
        while len(self.role.stores) > pending:
            self.role.stores.pop(0)()

    def fence(self) -> None:
        """What this role wrote, and barriers, may be met by copies and products from now on."""
        for barrier in self.barriers:
            barrier.fenced = True
        for cell in (cell for memory in self.shared for cell in memory.cells):
            if cell.written_by is self.current:
                cell.written_by = None

    # products

    def multiply(
        self, a: Any, b: Shared, acc: np.ndarray, *, use_acc: bool = True, is_async: bool = False
    ) -> Pending:
        operands = [x for x in (a, b) if isinstance(x, Shared)]
        for x in operands:
            x.cell.free_to_read(self.role)
            x.cell.readers += 1
        left, right = (x.data if isinstance(x, Shared) else x for x in (a, b))
        value = left.astype(np.float32) @ right.astype(np.float32)
        check(is_async, "products are asynchronous here")
        product = Pending(value + acc if use_acc else value, [x.cell for x in operands])
        self.role.products.append(product)
        self.pause()
        return product

    def wait_for_products(self, pending: int, deps: list[Pending]) -> np.ndarray:
        while len(self.role.products) > pending:
            product = self.role.products.pop(0)
            product.done = True
            for cell in product.cells:
                cell.readers -= 1
                # told with the next arrival, and not with any before
                cell.read_at[self.role] = self.role.known.get(self.role, 0) + 1
        (product,) = deps
        check(product.done, "a product is used before it was waited for")
        return product.value
