# SPDX-License-Identifier: Apache-2.0
"""Muon that orthogonalises all matrices of one shape together, which a CPU does much faster."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def orthogonalise(update: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Push the singular values of each matrix towards one by Newton-Schulz steps.

    Args:
        update: float ``(N, rows, columns)``.
        coefficients: of the quintic of each step.
        steps: number of steps.

    Returns:
        bfloat16 ``(N, rows, columns)``.
    """
    a, b, c = coefficients
    tall = update.shape[1] > update.shape[2]
    x = update.mT if tall else update
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)).to(torch.bfloat16)
    for _ in range(steps):
        gram = x @ x.mT
        quintic = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, quintic, x, beta=a)
    return x.mT if tall else x


class BatchedMuon(torch.optim.Muon):
    """``torch.optim.Muon`` with the same state and, up to rounding, the same updates.

    It supports what ``train.py`` uses: Nesterov momentum and ``adjust_lr_fn="match_rms_adamw"``.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update every parameter; all of them need gradients. ``closure`` is not supported."""
        if closure is not None:
            raise NotImplementedError("closures are not supported")
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                for p in parameters:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                gradients = [p.grad for p in parameters]
                buffers = [self.state[p]["momentum_buffer"] for p in parameters]
                torch._foreach_lerp_(buffers, gradients, 1.0 - group["momentum"])
                update = torch.stack(gradients).lerp(torch.stack(buffers), group["momentum"])
                update = orthogonalise(update, group["ns_coefficients"], group["ns_steps"])
                rate = 0.2 * math.sqrt(max(shape)) * group["lr"]
                torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(update.float().unbind(0)), alpha=-rate)
        return None
