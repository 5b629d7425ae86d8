"""Executors: the ways to run one attention call, and the choice among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from .call import AttentionCall, Selection
from .errors import ExecutorError


class Answer(NamedTuple):
    """Whether an executor can run a call, and if not, why."""

    ok: bool
    reason: str


YES = Answer(True, "")


@dataclass(frozen=True)
class Traits:
    """What decides whether an executor can run a call; known when a graph is compiled.

    device: "cpu", "cuda", ...; tile_size: tokens per tile.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    tile_size: int


class Executor(Protocol):
    """One way to run sparse attention. Implementations keep no state between calls."""

    name: str

    def verify(self, traits: Traits) -> Answer:
        """Can calls with these traits run here?"""
        ...

    def select(self, call: AttentionCall) -> Selection:
        """The key tiles each query tile keeps; `call.keep_all` decides here."""
        ...

    def attend(
        self, call: AttentionCall, selection: Selection
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out (B, H, Nq, D) in q's dtype stored as (B, Nq, H, D), lse (B, H, Nq) float32)."""
        ...


EXECUTOR_NAMES = ("reference", "cpu", "triton", "hopper")


def get_executor(name: str) -> Executor:
    """The executor called `name`. Modules load on first use: triton is absent on some machines."""
    if name == "reference":
        from .reference import ReferenceExecutor

        return ReferenceExecutor()
    if name == "cpu":
        from .cpu import CpuExecutor

        return CpuExecutor()
    if name == "triton":
        try:
            from .triton.executor import TritonExecutor
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            raise ExecutorError(
                "executor 'triton': the package triton is not installed; install it, or give "
                "executor='reference'"
            ) from error
        return TritonExecutor()
    if name == "hopper":
        try:
            from .hopper.executor import HopperExecutor
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "triton":
                raise
            raise ExecutorError(
                "executor 'hopper': it needs Triton 3.6 or later with Gluon; install that, or give "
                "executor='triton'"
            ) from error
        return HopperExecutor()
    raise ExecutorError(f"executor {name!r}: must be one of auto, {', '.join(EXECUTOR_NAMES)}")


def executor_name(requested: str, device: str) -> str:
    """The executor that `requested` stands for on a device type."""
    if requested == "auto":
        return "cpu" if device == "cpu" else "triton"
    return requested


def choose_executor(requested: str, traits: Traits) -> Executor:
    """The executor for calls with `traits`; "auto" means "cpu" on CPU and "triton" elsewhere.

    "hopper" has to be asked for by name, until it is shown to be the faster one on its GPUs.

    Raises ExecutorError when it cannot run such calls. Nothing else is tried in its place: what
    runs is what was asked for, or what "auto" is documented to mean.
    """
    name = executor_name(requested, traits.device)
    executor = get_executor(name)
    answer = executor.verify(traits)
    if not answer.ok:
        raise ExecutorError(f"executor {name!r} cannot run here: {answer.reason}")
    return executor


def execute(requested: str, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, Selection]:
    """Run `call` on the executor that `requested` stands for: (out, lse, selection).

    Raises ExecutorError where that one cannot run it.
    """
    traits = Traits(call.q.device.type, call.q.dtype, call.q.shape[-1], call.plan.tile_size)
    executor = choose_executor(requested, traits)
    # autocast would turn the float32 products of scores and softmax into bfloat16 ones
    with torch.autocast(call.q.device.type, enabled=False):
        selection = executor.select(call)
        out, lse = executor.attend(call, selection)
    return out, lse, selection
