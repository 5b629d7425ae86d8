"""Observing: a model runs dense, and every video self-attention call is handed on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from .call_grid import timestep_of_call
from .compiled_parts import Backend, recompiled, whole
from .layer_names import ModelNames
from .observed_call import ObservedCall, ObservedModel, Observer
from .observing_backend import ObservingBackend
from .options import Options
from .told import Told, enter, leave, running_call

__all__ = ["ObservedCall", "ObservedModel", "Observer", "observed"]


@contextmanager
def observed(
    model: nn.Module, observer: Observer, *, options: Mapping[str, Any] | None = None
) -> Iterator[ObservedModel]:
    """Let `observer` see every video self-attention call of `model` while the context lasts.

    The model computes what it does compiled dense by Inductor, bit for bit. What of it is compiled
    (`torch.compile(model)`, which may be given here, `model.compile()`, `compile_repeated_blocks`)
    is compiled anew for the time; where nothing is, the whole model. Attention that backend "veda"
    would leave dense is not observed: `ObservedModel.left` names it. When the context is left, by
    whatever way, the model is as it was before.

    Args:
        observer: called with an `ObservedCall` for each call, in the order they run, in the middle
            of the model's call. Its tensors are only valid meanwhile: copy what is to be kept. What
            it raises reaches the caller of the model.
        options: those of backend "veda" (`grid`, `min_tokens`, `dense_layers`, ...).

    Raises:
        OptionsError: an option is wrong. Calls of the model raise what those of backend "veda" do.
    """
    chosen = Options.from_dict(options)
    inner: nn.Module = getattr(model, "_orig_mod", model)
    seen = ObservedModel(type(inner).__name__)
    names = ModelNames(inner)

    def backend(patches: Mapping[str, Any]) -> Backend:
        return ObservingBackend(seen, observer, names, chosen, patches)

    try:
        with nullcontext() if whole(model) else _timesteps_told(inner), recompiled(model, backend):
            yield seen
    finally:
        seen.active = False


@contextmanager
def _timesteps_told(model: nn.Module) -> Iterator[None]:
    """Meanwhile calls of `model` tell their timestep, and what was told before of the grid."""

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        outer = running_call()
        grids, measured = (
            (None, False) if outer is None else (outer.told.grids, outer.told.measured)
        )
        enter(hooks, Told(grids, measured, timestep_of_call(model, args, kwargs)))

    def end(*_: Any) -> None:
        call = running_call()
        while call is not None and call.owner is not hooks:
            call = call.outer
        while call is not None and (inner := running_call()) is not None:
            leave(inner.owner)  # an attachment's own end may come after this one
            if inner is call:
                break

    hooks: list[Any] = []
    # first of all, so that what the user attached is told inside, and counts
    hooks.append(model.register_forward_pre_hook(begin, with_kwargs=True, prepend=True))
    hooks.append(model.register_forward_hook(end, always_call=True))
    try:
        yield
    finally:
        end()  # interrupts pass hooks by
        for hook in hooks:
            hook.remove()
