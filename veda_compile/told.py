"""Grids told for the call that is running: `attach` leaves them, compiled blocks look them up.

They are kept by thread and by nesting of calls, so that models that run at once, or inside one
another, do not see each other's.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from .passes.given import Grid

Grids = tuple[Grid, ...]


@dataclass(frozen=True, eq=False)
class _Call:
    """A running call: who told, what, and the call it is nested in."""

    owner: object
    grids: Grids | None
    outer: _Call | None


_running: ContextVar[_Call | None] = ContextVar("veda_compile_running_call", default=None)


def told_grids() -> Grids | None:
    """The grids of the innermost attached call that is running; None if there is none."""
    call = _running.get()
    return None if call is None else call.grids


def enter(owner: object, grids: Grids | None) -> None:
    """A call of `owner` begins. grids: None where they could not be told."""
    _running.set(_Call(owner, grids, _running.get()))


def leave(owner: object) -> None:
    """The call of `owner` has ended, by returning or raising."""
    call = _running.get()
    if call is not None and call.owner is owner:
        _running.set(call.outer)
