"""Executors: the ways to run one attention call, and the choice among them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from .call import AttentionCall, Selection
from .errors import ExecutorError
from .kernel_tables import FASTER, Kind


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


def default_name(requested: str, device: str) -> str:
    """The executor that `requested` stands for on a device type, measurements aside."""
    if requested == "auto":
        return "cpu" if device == "cpu" else "triton"
    return requested


class Choice(NamedTuple):
    """The name of an executor. reason: why not the one that was measured faster; "" where it is
    that one, or none was, or another was asked for."""

    name: str
    reason: str = ""


def choose(requested: str, traits: Traits, call: AttentionCall | None = None) -> Choice:
    """The executor that `requested` stands for.

    "auto" means "cpu" on CPU, and "triton" elsewhere, but "hopper" where `kernel_tables.FASTER`
    has calls with these traits, on a GPU that it runs on.
    call: what is known of the calls; those that "hopper" refuses run on "triton". Its device does
        not count.
    """
    name = default_name(requested, traits.device)
    if requested != "auto" or traits.device != "cuda":
        return Choice(name)
    dtype = str(traits.dtype).removeprefix("torch.")
    gain = FASTER.get(Kind(capability_here()[0], dtype, traits.head_dim, traits.tile_size))
    if gain is None:
        return Choice(name)
    why = _against_hopper(traits, call)
    if why is None:
        return Choice("hopper")
    return Choice(name, f"hopper, measured {gain:.2f}x as fast, cannot run such calls: {why}")


def _against_hopper(traits: Traits, call: AttentionCall | None) -> str | None:
    try:
        answer = get_executor("hopper").verify(traits)
    except ExecutorError as error:
        return str(error)
    if not answer.ok or call is None:
        return answer.reason or None
    from .hopper.views import refusal

    return refusal(call)


def choose_executor(requested: str, traits: Traits) -> Executor:
    """The executor for calls with `traits`, by name, or for "auto" as `choose` says.

    Raises ExecutorError when one that was asked for by name cannot run such calls, or nothing can:
    nothing is tried in its place. Where "auto" means "hopper", single calls that it refuses run on
    "triton" all the same, and a warning says why.
    """
    name = choose(requested, traits).name
    if requested == "auto" and name == "hopper":
        from .hopper.executor import HopperExecutor

        return HopperExecutor(or_portable=True)
    executor = get_executor(name)
    answer = executor.verify(traits)
    if not answer.ok:
        raise ExecutorError(f"executor {name!r} cannot run here: {answer.reason}")
    return executor


def capability_here() -> tuple[int, int]:
    """The compute capability of the current GPU, (9, 0) for Hopper; (0, 0) without one of NVIDIA's,
    as other vendors' numbers mean something else."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return (0, 0)
    return torch.cuda.get_device_capability()


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes a GPU the current one: kernels launch there, and it need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def execute(requested: str, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, Selection]:
    """Run `call` on the executor that `requested` stands for: (out, lse, selection).

    Raises ExecutorError where that one cannot run it.
    """
    device = call.q.device
    traits = Traits(device.type, call.q.dtype, call.q.shape[-1], call.plan.tile_size)
    # autocast would turn the float32 products of scores and softmax into bfloat16 ones
    with on_device(device), torch.autocast(device.type, enabled=False):
        executor = choose_executor(requested, traits)
        selection = executor.select(call)
        out, lse = executor.attend(call, selection)
    return out, lse, selection
