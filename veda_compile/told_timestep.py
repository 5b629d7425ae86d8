"""The timestep of the model call that is running, for compiled parts that do not see it.

A block that is compiled alone gets what was made of the timestep, not the timestep.
"""

from __future__ import annotations

import torch

from .errors import OptionsError
from .passes.timestep import keep_all_at
from .told import running_call


def timestep_is_told() -> bool:
    """Whether the call that is running told its timestep."""
    call = running_call()
    return call is not None and call.told.timestep is not None


def told_keep_all(threshold: float, device: torch.device) -> torch.Tensor:
    """() bool on `device`: whether the noise of the running call reaches `threshold`.

    Computed once per call of the model, which has many blocks. Raises OptionsError where no call
    tells its timestep.
    """
    call = running_call()
    if call is None or call.told.timestep is None:
        raise OptionsError(
            "option dense_timesteps: this graph was compiled in a model call whose timestep "
            "veda_compile.attach told, but the call that is running tells none: call "
            "veda_compile.attach(model) on the model that makes it, and give it `timestep` as a "
            "tensor"
        )
    if (threshold, device) not in call.flags:
        bound = torch.tensor(threshold, dtype=torch.float32, device=device)
        timestep = call.told.timestep.to(device, non_blocking=True)
        call.flags[threshold, device] = keep_all_at(timestep, bound)
    return call.flags[threshold, device]
