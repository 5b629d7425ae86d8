"""The op that observes: `veda::observe_v1`, which hands the operands of an attention call on.

It stands beside the attention in a compiled graph and changes nothing. A *ticket*, a number that
the graph gets as an input on every run, says who is waiting for the operands; the op returns the
ticket, and a graph that returns it too can neither drop nor reorder the calls of the op.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

OP_NAME = "veda::observe_v1"
"""The version is part of the name: caches key on it, and a changed contract needs a new one."""

IDLE = 0
"""The ticket of a run that nobody observes."""

Receiver = Callable[
    [int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, list[int]], None
]
"""Called with (site, q, k, v, key_valid, layout), as `observe_v1` gets them."""

_numbers = itertools.count(IDLE + 1)
_waiting: dict[int, Receiver] = {}


@contextmanager
def receiving(receiver: Receiver) -> Iterator[torch.Tensor]:
    """The ticket, (1,) int64 on CPU, of one run of a graph whose operands `receiver` gets."""
    number = next(_numbers)
    _waiting[number] = receiver
    try:
        yield torch.tensor([number], dtype=torch.int64, device="cpu")
    finally:
        del _waiting[number]


def idle_ticket() -> torch.Tensor:
    """The ticket of runs that nobody observes."""
    return torch.tensor([IDLE], dtype=torch.int64, device="cpu")


def waiting() -> int:
    """How many runs are being observed now."""
    return len(_waiting)


# strides as they come: to ask for others would copy what attention itself takes as it is
@torch.library.custom_op(OP_NAME, mutates_args=(), tags=(torch._C.Tag.flexible_layout,))
def observe_v1(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_valid: torch.Tensor | None,
    layout: Sequence[int],
    site: int,
    ticket: torch.Tensor,
) -> torch.Tensor:
    """Hand q (B, H, Nq, D), k and v (B, Hkv, Nk, D) and key_valid (B, Nk) to the ticket's holder.

    layout: as `sparse_attention_v2` takes it. site: the number of the call among those observed in
    the graph. Returns a copy of `ticket`, (1,) int64. What the holder raises passes through.
    """
    number = int(ticket)
    if number != IDLE:
        _waiting[number](site, q, k, v, key_valid, list(layout))
    return ticket.clone()


@observe_v1.register_fake
def _(q, k, v, key_valid, layout, site, ticket):  # type: ignore[no-untyped-def]
    return torch.empty_like(ticket)
