"""What compiles the rewritten graph: Inductor, or less of a compiler for debugging."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from functorch.compile import aot_module_simplified, nop
from torch import fx

from .errors import VedaError

Compiled = Callable[..., Any]


def compile_inner(
    gm: fx.GraphModule, inputs: Sequence[Any], inner: str, config_patches: dict[str, Any]
) -> Compiled:
    """Compile `gm` for `inputs` with the named inner compiler.

    config_patches: Inductor settings for this graph alone; no global setting is touched.
    """
    if inner == "eager":
        return gm.forward
    if inner == "aot_eager":
        compiled: Compiled = aot_module_simplified(gm, list(inputs), nop)
        return compiled
    from torch._inductor.compile_fx import compile_fx

    result: Any = compile_fx(gm, list(inputs), config_patches=config_patches or None)
    if not callable(result):
        raise VedaError(f"Inductor returned a {type(result).__name__}, not a function")
    return cast(Compiled, result)


def fake_input(value: torch.Tensor) -> torch.Tensor:
    """A stand-in for an added input, of fixed shape, in the tracing context of this compilation."""
    context = torch._guards.TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return value
    return context.fake_mode.from_tensor(value, static_shapes=True)
