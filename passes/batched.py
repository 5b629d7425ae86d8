"""Batched tensors: what stands between the entry and the exit of torch.vmap.

vmap(f) computes f of every slice and stacks the results. So a tensor inside is a list of slices,
each tracked like any other tensor, and an operation on it is the operation on every slice: no rule
need know of vmap. A side on which the codes do not depend (heads, most often) has the very same
object in every slice, and equal work is done once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .aliases import undo_view
from .codes import Tracked
from .indexing import Shape
from .joining import stack

ENTER, LEAVE = "_add_batch_dim", "_remove_batch_dim"
"""The functions by which a side is hidden from, and given back by, the function under vmap."""

_MOST = 4096
"""Slices followed, those of all levels together; beyond, they would cost more than they tell."""


@dataclass(frozen=True, eq=False)
class Batched:
    """A tensor inside torch.vmap: its slices along the side that is hidden at `level`.

    Where one vmap is inside another, slices of the outer one (the lower level) are batched again.
    """

    level: int
    slices: tuple[Tracked | Batched, ...]

    @property
    def count(self) -> int:
        """How many slices there are, all levels together."""
        return sum(x.count if isinstance(x, Batched) else 1 for x in self.slices)

    def key(self) -> tuple[object, ...]:
        """Equal for tensors whose slices are equal by their own `key`."""
        return (self.level, *(x.key() for x in self.slices))


def batched_in(args: Any) -> Iterator[Batched]:
    """Every batched tensor among nested arguments."""
    if isinstance(args, Batched):
        yield args
    elif isinstance(args, (tuple, list)):
        for arg in args:
            yield from batched_in(arg)
    elif isinstance(args, dict):
        for arg in args.values():
            yield from batched_in(arg)


def each(
    args: Any, apply: Callable[[Any], Any], below: int | None = None, most: int = _MOST
) -> Any:
    """`apply` to arguments without batched tensors: once, or once for every slice of them.

    below: leave tensors alone that are batched at this level or a deeper one. Slices of several
    levels multiply; raises NotImplementedError where that makes more than `most`.
    """
    found = [x for x in batched_in(args) if below is None or x.level < below]
    if not found:
        return apply(args)
    level = min(x.level for x in found)
    counts = {len(x.slices) for x in found if x.level == level}
    if len(counts) != 1:
        raise NotImplementedError("slices of another vmap")
    count = counts.pop()
    if count > most:
        raise NotImplementedError(f"more than {_MOST} slices")
    results = [
        each(_slice(args, level, place), apply, below, most // count) for place in range(count)
    ]
    return _gathered(level, results)


def _slice(args: Any, level: int, place: int) -> Any:
    """Arguments with one slice in place of every tensor that is batched at `level`."""
    if isinstance(args, Batched):
        return args.slices[place] if args.level == level else args
    if isinstance(args, (tuple, list)):
        parts = [_slice(arg, level, place) for arg in args]
        return tuple(parts) if isinstance(args, tuple) else parts
    if isinstance(args, dict):
        return {name: _slice(arg, level, place) for name, arg in args.items()}
    return args


def _gathered(level: int, results: Sequence[Any]) -> Any:
    if isinstance(results[0], list):
        return [_gathered(level, parts) for parts in zip(*results, strict=True)]
    return Batched(level, tuple(results))


def cross(out: Shape, name: str, x: Tracked | Batched, *args: int) -> Any:
    """What ENTER (x, dim, level) or LEAVE (x, level, size, dim) returns, of shape `out` inside.

    Raises NotImplementedError for what is not followed.
    """
    if name == ENTER:
        dim, level = args
        return each(x, lambda given: _entered(out, given, dim, level, _outer(x)), below=level)
    level, size, dim = args
    return each(x, lambda given: _left(out, given, level, size, dim), below=level)


def undo(name: str, base: Any, args: Sequence[Any], kwargs: Any, view: Any) -> Any:
    """What `base` holds once its view `view` does; see `aliases.undo_view`."""
    if name == ENTER:
        dim, level = args
        return each(
            (base, view), lambda given: _written_inside(given[0], given[1], dim), below=level
        )
    if name == LEAVE:
        level, _, dim = args
        return each(
            (base, view),
            lambda given: _written_outside(given[0], given[1], dim, level),
            below=level,
        )
    return each((base, args, kwargs, view), lambda given: undo_view(name, *given))


def _written_inside(base: Any, view: Any, dim: int) -> Tracked:
    if not isinstance(base, Tracked):
        raise NotImplementedError("slices of another vmap")
    return _joined(base.shape, view, dim)


def _written_outside(base: Any, view: Tracked, dim: int, level: int) -> Batched:
    if not isinstance(base, Batched):
        raise NotImplementedError("a write to what is the same in every slice")
    return _entered(_without(view.shape, dim), view, dim, level, 1)


def _outer(x: Tracked | Batched) -> int:
    return x.count if isinstance(x, Batched) else 1


def _entered(out: Shape, x: Any, dim: int, level: int, times: int) -> Batched:
    if not isinstance(x, Tracked):
        raise NotImplementedError("slices of another vmap")
    dim %= x.rank
    size = x.shape[dim]
    if out != _without(x.shape, dim):
        raise NotImplementedError(f"slices of shape {out}")
    if size * times > _MOST:
        raise NotImplementedError(f"more than {_MOST} slices")
    full = {s: c.unbind(dim) for s, c in x.codes.items() if c.shape[dim] > 1}
    kept = {s: c.squeeze(dim) for s, c in x.codes.items() if c.shape[dim] == 1}
    if not full and x.known is None:
        return Batched(level, (Tracked(out, kept),) * size)
    return Batched(
        level,
        tuple(
            Tracked(
                out,
                {s: full[s][place] if s in full else kept[s] for s in x.codes},
                None if x.known is None else x.known.select(dim, place),
                x.reads,
            )
            for place in range(size)
        ),
    )


def _without(shape: Shape, dim: int) -> Shape:
    dim %= len(shape)
    return (*shape[:dim], *shape[dim + 1 :])


def _left(out: Shape, x: Any, level: int, size: int, dim: int) -> Tracked:
    if isinstance(x, Batched):
        if x.level != level or len(x.slices) != size:
            raise NotImplementedError("slices of another vmap")
    elif dim and x.codes:
        # torch aligns what is the same in every slice with the last sides, whatever `dim`
        raise NotImplementedError("the same for every slice, at another side than the first")
    return _joined(out, x, dim)


def _joined(out: Shape, x: Any, dim: int) -> Tracked:
    """The tensor of shape `out` whose slices along `dim` are those of x, or all x."""
    dim %= len(out)
    slices = [
        part for part in (x.slices if isinstance(x, Batched) else (x,)) if isinstance(part, Tracked)
    ]
    if isinstance(x, Batched) and len(slices) != len(x.slices):
        raise NotImplementedError("slices of another vmap")
    if any(part.shape != _without(out, dim) for part in slices):
        raise NotImplementedError(f"slices of another shape than {out}")
    if all(part is slices[0] for part in slices):
        return slices[0].map(out, lambda c: c.unsqueeze(dim))
    return stack(out, slices, dim)
