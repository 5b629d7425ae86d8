"""Known values: small tensors whose contents are computed along with the codes.

Where an index tensor is made in the graph (arange, comparisons, sorting) its values follow from the
graph alone. Where it is an input its values hold for this call only, and are noted as read.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from .codes import Tracked
from .sizes import example

_MOST = 1 << 20  # elements

_NEVER = frozenset(
    """empty empty_like new_empty empty_strided rand randn randint rand_like randn_like
    randint_like randperm normal bernoulli multinomial dropout feature_dropout item
    tolist""".split()
)
"""Operations whose result is not a function of the values they are given, besides random ones."""

_EXPANDING = frozenset(["expand", "expand_as", "broadcast_to"])
"""Views that take no memory, however large."""

IN_PLACE = frozenset(
    "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift".split()
)
"""Python's operators that write to their first operand."""

_FAILURES = (NotImplementedError, ValueError, TypeError, IndexError, RuntimeError, AttributeError)


def known_input(node: fx.Node, value: torch.Tensor) -> torch.Tensor | None:
    """A CPU copy of an integer input's contents; None if large, symbolic or not to be read."""
    if value.dtype.is_floating_point or value.dtype.is_complex or value.numel() > _MOST:
        return None
    if torch._subclasses.fake_tensor.is_fake(value) or _is_symbolic(example(node)):
        return None
    if value.is_meta:
        return None
    return value.detach().cpu().clone()


def known_result(node: fx.Node, name: str, args: Any, kwargs: Any) -> Any:
    """What a node computes from known tensors: a tensor, a list of them, or None if not known.

    args, kwargs: the node's arguments with tensors replaced by `Tracked`.
    """
    recorded = example(node)
    plain_name = name.rstrip("_")
    if plain_name in _NEVER or _draws(plain_name):
        return None
    if _is_symbolic(recorded) or _takes_symbols(node):
        return None
    if name == "expand_as" and args[0].known is not None:
        return args[0].known.expand(args[1].shape)  # of the other only the shape counts
    values = _values((args, kwargs))
    if values is None or not (name in _EXPANDING or _is_small(recorded)):
        return None
    plain, named = values
    if name in IN_PLACE or (name.endswith("_") and not name.endswith("__")):
        plain = (plain[0].clone(), *plain[1:])
    named.pop("out", None)
    try:
        if node.op == "call_method" or isinstance(node.target, str):
            result = getattr(plain[0], name)(*plain[1:], **named)
        else:
            result = node.target(*plain, **named)  # type: ignore[operator]
    except _FAILURES:
        return None
    return _checked(result, recorded)


@lru_cache(maxsize=1024)
def _draws(name: str) -> bool:
    """Whether torch tags the ATen operator of this name as one that draws random numbers."""
    packet = getattr(torch.ops.aten, name, None)
    return packet is not None and any(
        torch.Tag.nondeterministic_seeded in getattr(packet, overload).tags
        for overload in packet.overloads()
    )


def with_values(result: Any, known: Any, given: list[Tracked]) -> Any:
    """A result, computed from `given`, with the values it is known to have."""
    if isinstance(result, Tracked) and isinstance(known, torch.Tensor):
        return Tracked(result.shape, result.codes, known, reads_of(given))
    if isinstance(result, list) and isinstance(known, list):
        return [with_values(x, value, given) for x, value in zip(result, known, strict=True)]
    return result


def known_assignment(
    base: Tracked, index: Any, value: object
) -> tuple[torch.Tensor | None, frozenset[fx.Node]]:
    """What `base` holds after base[index] = value (None if not known), and inputs it rests on."""
    places, written = _values(index), _values(value)
    if base.known is None or places is None or written is None:
        return None, frozenset()
    result = base.known.clone()
    result[places] = written
    given = [x for x in (base, value) if isinstance(x, Tracked)]
    given += [x for x in (index if isinstance(index, tuple) else [index]) if isinstance(x, Tracked)]
    return result, reads_of(given)


def reads_of(tracked: list[Tracked]) -> frozenset[fx.Node]:
    """The graph inputs whose values are in the given known tensors."""
    return frozenset(node for x in tracked for node in x.reads)


def _values(arg: Any) -> Any:
    """Arguments with tensors in place of known ones, on CPU; None if one is not known."""
    if isinstance(arg, Tracked):
        return None if arg.known is None else arg.known
    if isinstance(arg, torch.device):
        return torch.device("cpu")
    if isinstance(arg, (tuple, list)):
        parts = []
        for part in arg:
            value = _values(part)
            if value is None and part is not None:
                return None
            parts.append(value)
        return tuple(parts) if isinstance(arg, tuple) else parts
    if isinstance(arg, dict):
        found = {}
        for key, part in arg.items():
            value = _values(part)
            if value is None and part is not None:
                return None
            found[key] = torch.device("cpu") if key == "device" else value
        return found
    return arg


def _checked(result: Any, recorded: object) -> Any:
    """A result whose shapes are the recorded ones."""
    if isinstance(result, torch.Tensor) and isinstance(recorded, torch.Tensor):
        return result if tuple(result.shape) == tuple(recorded.shape) else None
    if isinstance(result, (tuple, list)) and isinstance(recorded, (tuple, list)):
        parts = [_checked(a, b) for a, b in zip(result, recorded, strict=False)]
        same = len(parts) == len(recorded) and all(part is not None for part in parts)
        return parts if same else None
    return None


def _tensors(recorded: object) -> Iterator[torch.Tensor]:
    if isinstance(recorded, torch.Tensor):
        yield recorded
    elif isinstance(recorded, (tuple, list)):
        for part in recorded:
            yield from _tensors(part)


def _is_symbolic(recorded: object) -> bool:
    return any(isinstance(side, torch.SymInt) for x in _tensors(recorded) for side in x.shape)


def _is_small(recorded: object) -> bool:
    return all(0 < x.numel() <= _MOST for x in _tensors(recorded))


def _takes_symbols(node: fx.Node) -> bool:
    """Whether a symbolic size is among the arguments: values for other sizes would differ."""
    return any(isinstance(example(n), torch.SymInt) for n in node.all_input_nodes)
