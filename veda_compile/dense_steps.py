"""Dense steps: at the noisy end of the schedule attention stays exact, decided call by call.

The flag is computed on the device, in the graph: the host never waits for a timestep, and neither
another timestep nor another share of the schedule compiles anything again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from .passes.analyse import Finding
from .passes.rewrite import Rewriter
from .passes.sizes import example_tensor
from .passes.timestep import find_timestep, insert_keep_all
from .told_timestep import timestep_is_told, told_keep_all

REMEDY = (
    "compile the whole model in one graph, or call veda_compile.attach(model) before its first "
    "call, with `timestep` as a tensor in either case"
)
"""What makes `dense_timesteps` work where it does not."""


@dataclass(frozen=True, eq=False)
class StepInput:
    """The graph input that was added. value: what it is in the call that is running."""

    node: fx.Node
    value: Callable[[], torch.Tensor]


def add_dense_steps(
    gm: fx.GraphModule,
    rewriter: Rewriter,
    findings: Sequence[Finding],
    inputs: Sequence[object],
    share: float,
) -> StepInput | str:
    """Give what `rewriter` rewrites from now on the flag that makes noisy calls exact.

    findings: the accepted ones, at least one. inputs: the backend's example inputs. share: option
    `dense_timesteps`, above 0. The timestep is an input of the graph, else it is told for the call
    that is running; where neither is so, nothing is changed and a sentence says why.
    """
    dims, query = findings[0].dims, example_tensor(findings[0].site.q.node)
    assert dims is not None and query is not None
    device = query.device
    # a share of 1 is every call, also where a schedule goes below 0
    bound = 1.0 - share if share < 1.0 else -math.inf
    timestep = find_timestep(gm, inputs, dims.batch)
    if not isinstance(timestep, str):
        node = rewriter.add_input("veda_threshold")
        threshold = torch.tensor(bound, dtype=torch.float32, device=device)
        rewriter.keep_all = insert_keep_all(gm, timestep, node, device)
        return StepInput(node, lambda: threshold)
    if timestep_is_told():
        rewriter.keep_all = rewriter.add_input("veda_keep_all")
        return StepInput(rewriter.keep_all, lambda: told_keep_all(bound, device))
    return timestep
