"""The timestep of the model call that is running, for compiled parts that do not see it.

A block that is compiled alone gets what was made of the timestep, not the timestep. Who makes the
model's call tells it here, around the call.
"""

from __future__ import annotations

from contextvars import ContextVar, Token

import torch

from .errors import OptionsError
from .passes.timestep import keep_all_at


class _Told:
    """A timestep, and the flags made of it: one call has many blocks."""

    def __init__(self, timestep: torch.Tensor) -> None:
        self._timestep = timestep
        self._flags: dict[tuple[float, torch.device], torch.Tensor] = {}

    def keep_all(self, threshold: float, device: torch.device) -> torch.Tensor:
        """See `told_keep_all`."""
        if (threshold, device) not in self._flags:
            bound = torch.tensor(threshold, dtype=torch.float32, device=device)
            self._flags[threshold, device] = keep_all_at(
                self._timestep.to(device, non_blocking=True), bound
            )
        return self._flags[threshold, device]


_running: ContextVar[_Told | None] = ContextVar("veda_compile_running_timestep", default=None)


def tell_timestep(timestep: torch.Tensor | None) -> Token[_Told | None]:
    """A call with this timestep begins; None where it is not known. Give what it returns to
    `forget_timestep` when the call has ended, by returning or raising."""
    return _running.set(None if timestep is None else _Told(timestep))


def forget_timestep(token: Token[_Told | None]) -> None:
    """The call has ended; an outer one goes on."""
    _running.reset(token)


def timestep_is_told() -> bool:
    """Whether the call that is running told its timestep."""
    return _running.get() is not None


def told_keep_all(threshold: float, device: torch.device) -> torch.Tensor:
    """() bool on `device`: whether the noise of the running call reaches `threshold`.

    Raises OptionsError where no call tells its timestep.
    """
    told = _running.get()
    if told is None:
        raise OptionsError(
            "option dense_timesteps: this graph was compiled in a model call that told its "
            "timestep, but the call that is running tells none: tell it on every call"
        )
    return told.keep_all(threshold, device)
