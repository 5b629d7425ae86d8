"""What is told of the call that is running: `attach` leaves it, compiled blocks look it up.

It is kept by thread and by nesting of calls, so that models that run at once, or inside one
another, do not see each other's.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

from .passes.given import Grid

Grids = tuple[Grid, ...]


@dataclass(frozen=True, eq=False)
class Told:
    """What is known of one call of a model; None for what is not.

    measured: the grids were read from the latent of the call, not named by a user, who may be
    mistaken.
    """

    grids: Grids | None = None
    measured: bool = False
    timestep: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Call:
    """A running call: who told, what, and the call it is nested in.

    flags: what was made of its timestep, see `told_timestep`.
    """

    owner: object
    told: Told
    outer: Call | None
    flags: dict[tuple[float, torch.device], torch.Tensor] = field(default_factory=dict)


_running: ContextVar[Call | None] = ContextVar("veda_compile_running_call", default=None)


def running_call() -> Call | None:
    """The innermost call that is running, of those of which something is told."""
    return _running.get()


def told_grids() -> Grids | None:
    """The grids of the innermost attached call that is running; None if there is none."""
    call = _running.get()
    return None if call is None else call.told.grids


def enter(owner: object, told: Told) -> None:
    """A call of `owner` begins."""
    _running.set(Call(owner, told, _running.get()))


def leave(owner: object) -> None:
    """The call of `owner` has ended, by returning or raising."""
    call = _running.get()
    if call is not None and call.owner is owner:
        _running.set(call.outer)
